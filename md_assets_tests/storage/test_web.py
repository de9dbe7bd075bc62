"""Plain web servers: what is told of a file, where its checksum comes from, and how refusals read."""

from __future__ import annotations

import base64
import hashlib
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from md_assets.core.errors import MdAssetsError, SettingsError, SourceError
from md_assets.core.source import Checksum, WebFile
from md_assets.demo.loopback_web import LoopbackWeb, etag_and_date
from md_assets.storage.retry import TransferPolicy
from md_assets.storage.web import CHECKSUM_FILE_BYTES, WebClient

CONTENT = random.Random(4).randbytes(400_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
POLICY = TransferPolicy(connect_timeout_s=2, stall_timeout_s=0.25, attempts=3, first_delay_s=0.01)
VARIABLE = "MD_ASSETS_COCO_URL"


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackWeb]:
    """Another base than the official one."""
    (tmp_path / "root" / "zips").mkdir(parents=True)
    (tmp_path / "root" / "zips" / "val2014.zip").write_bytes(CONTENT)
    with LoopbackWeb(tmp_path / "root") as web:
        monkeypatch.setenv(VARIABLE, f"{web.base_url}/")
        yield web


def file(web: LoopbackWeb, official: bool = False, md5: str | None = MD5) -> WebFile:
    base = web.base_url if official else "http://images.invalid"
    return WebFile("zips/val2014.zip", VARIABLE, base, Checksum("md5", md5) if md5 else None)


def client() -> WebClient:
    return WebClient(POLICY)


def asked(web: LoopbackWeb) -> list[str]:
    return [f"{request.kind} {request.name} {request.range_header}".strip() for request in web.history]


def write_md5(web: LoopbackWeb, content: bytes) -> None:
    (web.root / "zips" / "val2014.zip.md5").write_bytes(content)


def test_the_official_file_is_known_by_its_published_checksum(
    web: LoopbackWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (None, web.base_url):
        monkeypatch.setenv(VARIABLE, value) if value else monkeypatch.delenv(VARIABLE)
        one = client()
        remote = one.locate(file(web, official=True))
        assert remote.checksum == Checksum("md5", MD5) and remote.content_id == MD5
        assert (remote.size_bytes, remote.via, remote.expires_s) == (len(CONTENT), "web", None)
        assert remote.name == remote.url == f"{web.base_url}/zips/val2014.zip"
        assert one.fetch(remote, tmp_path / "a") == remote and (tmp_path / "a").read_bytes() == CONTENT
    assert asked(web) == [
        "head zips/val2014.zip",
        "get zips/val2014.zip",
        "head zips/val2014.zip",  # and its bytes are not fetched again
    ]


def test_of_another_base_the_official_checksum_is_not_expected(web: LoopbackWeb, tmp_path: Path) -> None:
    one = client()
    remote = one.locate(file(web, md5="0" * 32))
    etag = etag_and_date(web.root / "zips" / "val2014.zip")["ETag"].strip('"')
    assert remote.checksum is None and remote.content_id == etag
    assert one.locate(file(web, md5="0" * 32)) is remote  # asked for once
    assert asked(web) == ["head zips/val2014.zip", "get zips/val2014.zip.md5"]
    assert one.fetch(remote, tmp_path / "a") == remote


@pytest.mark.parametrize(
    ("beside", "known"),
    [
        (f"{MD5}  val2014.zip\n".encode(), True),
        (f"  {MD5.upper()}\r\n".encode(), True),
        (b"", False),
        (b"d41d8cd9", False),
        (b"\xff\xfe\x00", False),
        (MD5.encode() + b"x" * CHECKSUM_FILE_BYTES, False),
    ],
    ids=["md5sum", "bare", "empty", "short", "binary", "long"],
)
def test_a_checksum_beside_the_file_is_taken_if_it_is_one(web: LoopbackWeb, beside: bytes, known: bool) -> None:
    write_md5(web, beside)
    remote = client().locate(file(web, md5=None))
    assert (remote.checksum == Checksum("md5", MD5)) == (remote.content_id == MD5) == known
    assert remote.checksum is None or known


def test_a_page_is_no_checksum_but_a_failing_server_is_not_taken_for_one_without(web: LoopbackWeb) -> None:
    web.faults.html("*.md5", place="resolve")
    assert client().locate(file(web)).checksum is None
    web.faults.status("*.md5", 403)
    assert client().locate(file(web)).checksum is None
    web.faults.status("*.md5", 503, times=2)
    write_md5(web, MD5.encode())
    assert client().locate(file(web)).content_id == MD5
    web.faults.status("*.md5", 503, times=3)
    with pytest.raises(SourceError, match=r"val2014.zip.md5: the server failed with HTTP 503 \(3 attempts\)"):
        client().locate(file(web))


@pytest.mark.parametrize(
    ("headers", "content_id"),
    [
        ({"ETag": 'W/"v1"', "Last-Modified": "x"}, "v1"),
        ({"Last-Modified": "Thu, 01 Jan 2015 00:00:00 GMT"}, "400000-Thu, 01 Jan 2015 00:00:00 GMT"),
        ({}, ""),
        ({"Content-MD5": base64.b64encode(bytes.fromhex(MD5)).decode(), "ETag": "x"}, MD5),
        ({"Content-MD5": "no base64", "ETag": '"v2"'}, "v2"),
        ({"Content-MD5": "c2hvcnQ=", "ETag": '"v3"'}, "v3"),
    ],
    ids=["weak", "dated", "nothing", "md5", "no md5", "short md5"],
)
def test_the_content_id_is_the_best_that_the_server_tells(
    web: LoopbackWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], content_id: str
) -> None:
    web.headers = lambda _: headers
    one = client()
    remote = one.locate(file(web))
    assert (remote.content_id, remote.size_bytes) == (content_id, len(CONTENT))
    assert (remote.checksum is not None) == (content_id == MD5)
    found = one.fetch(remote, tmp_path / "a")
    assert found.content_id == content_id or hashlib.sha256(CONTENT).hexdigest() == found.content_id


@pytest.mark.parametrize("status", [400, 403, 405, 501])
def test_where_head_is_refused_one_byte_tells_the_size(web: LoopbackWeb, status: int) -> None:
    web.faults.status("*", status, place="head")
    remote = client().locate(file(web, official=True))
    assert remote.size_bytes == len(CONTENT) and remote.content_id
    assert asked(web)[:2] == ["head zips/val2014.zip", "get zips/val2014.zip bytes=0-0"]


def test_a_cut_transfer_goes_on_by_range_and_md5_covers_the_whole(web: LoopbackWeb, tmp_path: Path) -> None:
    one = client()
    remote = one.locate(file(web, official=True))
    web.faults.cut("zips/*", 200_000)
    one.fetch(remote, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT
    start_bytes = int(web.history[-1].range_header.removeprefix("bytes=").rstrip("-"))
    assert 100_000 < start_bytes <= 200_000 and web.requests["get"] - asked(web).count("get zips/val2014.zip.md5") == 2


def test_a_wrong_md5_is_told_after_a_second_clean_download(web: LoopbackWeb, tmp_path: Path) -> None:
    write_md5(web, b"0" * 32)
    one = client()
    remote = one.locate(file(web))
    with pytest.raises(SourceError, match=f"its md5 is {MD5} where the source announces 0000") as caught:
        one.fetch(remote, tmp_path / "a")
    assert caught.value.reason == "checksum_mismatch" and not caught.value.transient
    assert asked(web)[2:] == ["get zips/val2014.zip", "get zips/val2014.zip"]
    assert list(tmp_path.glob("a*")) == []


def test_a_file_of_another_size_than_head_told(web: LoopbackWeb, tmp_path: Path) -> None:
    one = client()
    remote = one.locate(file(web))
    (web.root / "zips" / "val2014.zip").write_bytes(CONTENT[:-1])
    with pytest.raises(SourceError, match="399999 bytes are sent where the source announces 400000") as caught:
        one.fetch(remote, tmp_path / "a")
    assert caught.value.reason == "size_mismatch"


def test_a_file_that_changes_midway_is_fetched_from_its_beginning(web: LoopbackWeb, tmp_path: Path) -> None:
    one = client()
    remote = one.locate(file(web))
    web.faults.cut("zips/*", 200_000)
    changed = CONTENT[::-1]

    def change(done_bytes: int, _: int) -> None:
        if done_bytes and (web.root / "zips" / "val2014.zip").read_bytes() != changed:
            (web.root / "zips" / "new").write_bytes(changed)
            (web.root / "zips" / "new").replace(web.root / "zips" / "val2014.zip")

    one.fetch(remote, tmp_path / "a", change)
    assert (tmp_path / "a").read_bytes() == changed
    assert [line.removeprefix("get zips/val2014.zip")[:7] for line in asked(web)[2:]] == ["", " bytes=", ""]


@pytest.mark.parametrize(
    ("fault", "reason", "transient"),
    [
        (lambda web: web.faults.status("*", 404, times=None), "not_found", False),
        (lambda web: web.faults.status("*", 403, times=None), "unauthorized", False),
        (lambda web: web.faults.status("*", 429, {"Retry-After": "0"}, times=None), "rate_limited", True),
        (lambda web: web.faults.status("*", 500, times=None), "server_error", True),
        (lambda web: web.faults.html("*", place="resolve", times=None), "server_error", False),
        (lambda web: web.faults.stall("*", 30, times=None), "timeout", True),
        (lambda web: web.stop(), "connection", True),
    ],
    ids=["404", "403", "429", "500", "page", "stall", "nobody"],
)
def test_refusals_are_one_sentence_without_secrets(
    web: LoopbackWeb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[LoopbackWeb], None],
    reason: str,
    transient: bool,
) -> None:
    secret_base = f"http://user:s3cret@{web.base_url.removeprefix('http://')}?token=s3cret"
    monkeypatch.setenv(VARIABLE, secret_base)
    named = f"{web.base_url}/zips/val2014.zip"
    one = client()
    remote = one.locate(file(web))
    assert remote.name == named and "s3cret" not in remote.name and remote.url.endswith("val2014.zip?token=s3cret")
    fault(web)
    shown = []
    for attempt in (lambda: client().locate(file(web)), lambda: one.fetch(remote, tmp_path / "a")):
        if reason == "timeout" and not shown:
            shown.append("")  # only the body stalls
            continue
        with pytest.raises(SourceError) as caught:
            attempt()
        assert (caught.value.reason, caught.value.transient) == (reason, transient)
        assert str(caught.value).startswith(f"{named}: ") and "\n" not in str(caught.value) and caught.value.remedy
        shown += traceback.format_exception(caught.value)
    assert all("s3cret" not in text for text in shown)


@pytest.mark.parametrize("base", ["images.cocodataset.org", "ftp://h/x", "/data/coco", "http://", "http://[x"])
def test_a_base_that_is_no_address_is_named_by_its_variable(
    web: LoopbackWeb, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    monkeypatch.setenv(VARIABLE, base)
    with pytest.raises(SettingsError, match=f"^{VARIABLE} is no http or https address. Set it to"):
        client().locate(file(web))
    assert web.requests.total() == 0


def test_small_files_are_read_up_to_their_limit(web: LoopbackWeb) -> None:
    url = f"{web.base_url}/zips/val2014.zip"
    assert client().read(url, "list", len(CONTENT)) == CONTENT
    with pytest.raises(SourceError, match="list: it has more than 399999 bytes"):
        client().read(url, "list", len(CONTENT) - 1)
    web.faults.cut("*", 100_000)
    assert client().read(url, "list", len(CONTENT)) == CONTENT
    with pytest.raises(MdAssetsError, match="list: its address is not valid"):
        client().read("http://[x", "list", 1)


def test_names_with_odd_characters_are_escaped(web: LoopbackWeb) -> None:
    (web.root / "zips" / "a b#?ä.zip").write_bytes(b"odd")
    remote = client().locate(replace(file(web), path="zips/a b#?ä.zip"))
    assert remote.size_bytes == 3 and web.history[0].name == "zips/a b#?ä.zip"
