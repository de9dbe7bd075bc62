"""Lists of signed links: every form they come in, what is none, and when links expire."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md_assets.core.errors import SettingsError, SourceError
from md_assets.core.source import HubFile, LinkedFile, RemoteFile
from md_assets.demo.loopback_web import LoopbackWeb, write_link_list
from md_assets.storage.links import Link, LinkLists, expiry_error, parse_links, time_text
from md_assets.storage.retry import TransferPolicy
from md_assets.storage.web import WebClient

VARIABLE = "MD_ASSETS_SA1B_LINKS"
FILE = LinkedFile("sa_000000.tar", VARIABLE, HubFile("org/mirror", "*sa_000000.tar"))
POLICY = TransferPolicy(connect_timeout_s=2, stall_timeout_s=0.5, attempts=2, first_delay_s=0.01)


def lists() -> LinkLists:
    return LinkLists(WebClient(POLICY))


def test_rows_come_in_any_order_and_form() -> None:
    content = (
        b"\xef\xbb\xbfcdn_link \t other\tfile_name\r\n"
        b"https://h/ids.txt?oe=66000000\t\tsa_images_ids.txt\r\n"
        b"\r\n"
        b'"https://h/2.tar?x=1&oe=66000001"\t"a ""b"""\tsa_000002.tar  \r\n'
        b" https://h/1.tar?oe=66000002 \t\t sa_000001.tar\t\r\n"
        b"   \t\t\r\n"
        b"https://h/co.tar\t\tsa_co_gold.tar"
    )
    assert parse_links(content, "list") == {
        "sa_images_ids.txt": Link("https://h/ids.txt?oe=66000000", 0x66000000),
        "sa_000002.tar": Link("https://h/2.tar?x=1&oe=66000001", 0x66000001),
        "sa_000001.tar": Link("https://h/1.tar?oe=66000002", 0x66000002),
        "sa_co_gold.tar": Link("https://h/co.tar", None),
    }


@pytest.mark.parametrize(
    ("query", "expires_s"),
    [
        ("oe=6A1B2C3D", 0x6A1B2C3D),
        ("a=1&oe=6a1b2c3d&sig=2", 0x6A1B2C3D),
        ("oe=0", 0),
        ("OE=6A1B2C3D", None),
        ("oe=", None),
        ("oe=tomorrow", None),
        ("oe=-5", None),
        ("oe=0x12", None),
        ("oe=66000000ffffffffff", None),
        ("xoe=66000000", None),
        ("", None),
    ],
)
def test_expiry_is_the_hexadecimal_parameter_or_unknown(query: str, expires_s: float | None) -> None:
    (link,) = parse_links(f"file_name\tcdn_link\na\thttps://h/a?{query}\n".encode(), "list").values()
    assert link.expires_s == expires_s


def test_of_two_links_of_a_file_the_one_that_lasts_counts() -> None:
    def row(name: str, number: int, oe: str) -> str:
        return f"{name}\thttps://h/{number}{f'?oe={oe}' if oe else ''}\n"

    rows = row("a", 1, "66000000") + row("a", 2, "66000002") + row("a", 3, "66000001")
    rows += row("b", 1, "66000000") + row("b", 2, "") + row("b", 3, "66000001")
    found = parse_links(f"file_name\tcdn_link\n{rows}".encode(), "list")
    assert {name: link.url.partition("?")[0] for name, link in found.items()} == {
        "a": "https://h/2",
        "b": "https://h/2",
    }


@pytest.mark.parametrize("address", ["", "h/a.tar", "ftp://h/a.tar", "file:/etc/passwd", "https://", "http://[x/a"])
def test_rows_without_an_address_are_left_out(address: str) -> None:
    assert parse_links(f"file_name\tcdn_link\na.tar\t{address}\n\thttps://h/b\nc.tar\n".encode(), "list") == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not name the column file_name and cdn_link"),
        (b"sa_000000.tar\thttps://h/a?sig=s3cret\n", "does not name the column file_name and cdn_link"),
        (b"file_name,cdn_link\na,https://h/a?sig=s3cret\n", "does not name the column file_name and cdn_link"),
        (b"file_name\tlink\n", "does not name the column cdn_link"),
        (b"\n <!DOCTYPE html><title>Log in</title>", "it is a web page"),
        (b"PK\x03\x04\x00\x00\n\x00", "does not name the column|no tab-separated list"),
        (b'file_name\tcdn_link\na\t"' + b"x" * 200_000, "it is no tab-separated list"),
    ],
    ids=["empty", "no header", "commas", "other column", "page", "binary", "endless field"],
)
def test_what_is_no_list_is_said_without_quoting_it(content: bytes, says: str) -> None:
    with pytest.raises(SettingsError, match=f"^list: .*({says})") as caught:
        parse_links(content, "list")
    assert "s3cret" not in str(caught.value) and "get it anew" in caught.value.remedy


@given(st.binary(max_size=200) | st.text(alphabet='file_name\tcdn_link\r\n"<https://h?oe=6', max_size=200))
def test_anything_is_a_list_or_refused(content: bytes | str) -> None:
    data = content.encode() if isinstance(content, str) else content
    try:
        found = parse_links(b"file_name\tcdn_link\n" + data, "list")
    except SettingsError:
        return
    assert all(name and link.url.startswith("http") for name, link in found.items())


def test_a_file_is_read_once_and_a_new_list_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_link_list(tmp_path / "links.tsv", [FILE.name], lambda name: f"https://h/{name}?oe=66000000&sig=s3cret")
    monkeypatch.setenv(VARIABLE, str(path))
    run = lists()
    remote = run.locate(FILE)
    assert remote == RemoteFile(
        f"{VARIABLE}:sa_000000.tar",
        "https://h/sa_000000.tar?oe=66000000&sig=s3cret",
        size_bytes=None,
        checksum=None,
        content_id="",
        revision="",
        via="web",
        expires_s=0x66000000,
    )
    assert "s3cret" not in repr(run.links(VARIABLE))
    write_link_list(path, [FILE.name], lambda name: f"https://h/{name}?oe=67000000")
    assert run.locate(FILE) == remote and lists().locate(FILE).expires_s == 0x67000000
    path.unlink()
    assert run.locate(FILE) == remote


@pytest.fixture
def web(tmp_path: Path) -> Iterator[LoopbackWeb]:
    (tmp_path / "root").mkdir()
    with LoopbackWeb(tmp_path / "root") as web:
        write_link_list(web.root / "links.tsv", [FILE.name], lambda name: f"https://h/{name}")
        yield web


def test_a_list_may_be_an_address_which_is_asked_once(web: LoopbackWeb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{web.base_url}/links.tsv?token=s3cret")
    web.faults.status("links.tsv", 503)
    run = lists()
    assert [run.locate(FILE).url for _ in range(3)] == ["https://h/sa_000000.tar"] * 3
    assert web.requests == {"get": 2}


def test_an_address_that_gives_no_list_is_named_without_its_query(
    web: LoopbackWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{web.base_url}/links.tsv"
    monkeypatch.setenv(VARIABLE, f"{address}?sig=s3cret")
    for fault, says in (
        (lambda: web.faults.status("links.tsv", 404), "not found at the source"),
        (lambda: web.faults.status("links.tsv", 403), "access refused"),
        (lambda: web.faults.html("links.tsv", place="resolve"), "an HTML page"),
    ):
        fault()
        with pytest.raises(SourceError, match=says) as caught:
            lists().locate(FILE)
        assert str(caught.value).startswith(f"{VARIABLE} ({address}): ") and "s3cret" not in str(caught.value)


def test_a_list_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path / "none.tsv", tmp_path):
        monkeypatch.setenv(VARIABLE, str(place))
        with pytest.raises(SettingsError, match="cannot be read") as caught:
            lists().locate(FILE)
        assert f"{VARIABLE} ({place})" in caught.value.what and VARIABLE in caught.value.remedy


def test_a_file_without_link_is_not_found_and_no_list_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(write_link_list(tmp_path / "l", ["x"], lambda _: "https://h/x")))
    with pytest.raises(SourceError, match=f"{VARIABLE}:sa_000000.tar: the list of links has 1, but none for") as caught:
        lists().locate(FILE)
    assert caught.value.reason == "not_found"
    for value in ("", None):
        monkeypatch.setenv(VARIABLE, value) if value is not None else monkeypatch.delenv(VARIABLE)
        assert lists().links(VARIABLE) is None


def test_an_expired_link_says_when_and_what_to_do() -> None:
    link = RemoteFile(f"{VARIABLE}:a.tar", "https://h/a?sig=s3cret", None, None, "", "", via="web")
    assert expiry_error(link) is None
    assert expiry_error(replace(link, expires_s=time.time() + 5)) is None
    error = expiry_error(replace(link, expires_s=0x66000000))
    assert error is not None and error.reason == "link_expired" and not error.transient
    assert str(error) == (
        "MD_ASSETS_SA1B_LINKS:a.tar: its link expired at 2024-03-24 10:27 UTC. Get a new list of links from the "
        "dataset's page and set MD_ASSETS_SA1B_LINKS to it; what is done stays done"
    )
    assert time_text(0) == "1970-01-01 00:00 UTC"
