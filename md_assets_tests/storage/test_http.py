"""The downloader against a server that misbehaves in every way a real one was seen to."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st

from md_assets.core.errors import SourceError
from md_assets.core.source import Checksum, RemoteFile
from md_assets.demo.loopback_faults import Fault
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.storage.http import CHUNK_BYTES, TransferPolicy, connection_error, download, redact_url

CONTENT = random.Random(1).randbytes(1_500_000)
SHA256 = Checksum("sha256", hashlib.sha256(CONTENT).hexdigest())
POLICY = TransferPolicy(connect_timeout_s=2, stall_timeout_s=0.3, attempts=3, first_delay_s=0.01)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    repo = tmp_path / "root" / "datasets" / "org" / "name"
    repo.mkdir(parents=True)
    (repo / "a.tar").write_bytes(CONTENT)
    (repo / "empty.txt").touch()
    with LoopbackHub(tmp_path / "root") as hub:
        yield hub


def remote(hub: LoopbackHub, **changes: object) -> RemoteFile:
    url = f"{hub.endpoint}/datasets/org/name/resolve/main/a.tar"
    return replace(RemoteFile("a.tar", url, len(CONTENT), SHA256, SHA256.hexdigest, "main"), **changes)


def ranges(hub: LoopbackHub) -> list[str]:
    return [request.range_header for request in hub.history if request.kind == "cdn"]


def no_leftovers(path: Path) -> bool:
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith(path.name)) == [path.name]


def test_fetches_verifies_reports_and_leaves_nothing_else(hub: LoopbackHub, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = tmp_path / "deep" / "a.tar"
    done = download(remote(hub), path, policy=POLICY, progress=lambda *numbers: told.append(numbers))
    assert (done.path, done.fetched_bytes, done.attempts) == (path, 1_500_000, 1) and done.remote == remote(hub)
    assert path.read_bytes() == CONTENT and no_leftovers(path)
    assert told[-1] == (1_500_000, 1_500_000) and [n for n, _ in told] == sorted({n for n, _ in told})


def test_whole_verified_destination_is_not_fetched_again_but_another_one_is(hub: LoopbackHub, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    download(remote(hub), path)
    assert download(remote(hub), path).attempts == 0
    path.write_bytes(CONTENT[:-1] + b"!" if CONTENT[-1:] != b"!" else CONTENT[:-1] + b"?")
    assert download(remote(hub), path).attempts == 1
    assert path.read_bytes() == CONTENT
    assert download(remote(hub, checksum=None), path).attempts == 1


def test_what_the_source_does_not_tell_is_found_out(hub: LoopbackHub, tmp_path: Path) -> None:
    untold = remote(hub, size_bytes=None, checksum=None, content_id="")
    hub.faults.cut("*/a.tar", 400_000)
    with pytest.raises(SourceError):
        download(untold, tmp_path / "a.tar", policy=replace(POLICY, attempts=1, attempts_in_all=1))
    done = download(untold, tmp_path / "a.tar", policy=POLICY)
    assert done.remote == replace(untold, size_bytes=1_500_000, content_id=SHA256.hexdigest)
    assert 0 < done.fetched_bytes < 1_500_000  # what was there is part of the hash
    named = download(replace(untold, content_id="v1"), tmp_path / "b.tar", policy=POLICY)
    assert named.remote == replace(untold, size_bytes=1_500_000, content_id="v1")


def test_resumes_after_cuts_and_hashes_over_the_seam(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.cut("*/a.tar", 400_000, times=2)
    done = download(remote(hub), tmp_path / "a.tar", policy=POLICY)
    whole, *starts_bytes = [int(header[6:-1] or 0) for header in ranges(hub)]
    assert whole == 0 and len(starts_bytes) == 2
    # urllib3 drops the piece in which the cut falls.
    assert 400_000 - CHUNK_BYTES < starts_bytes[0] <= 400_000
    assert 400_000 - CHUNK_BYTES < starts_bytes[1] - starts_bytes[0] <= 400_000
    assert done.fetched_bytes == len(CONTENT) and done.attempts == 3
    assert (tmp_path / "a.tar").read_bytes() == CONTENT


def test_more_cuts_than_attempts_are_fine_while_each_brings_something(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.cut("*/a.tar", 200_000, times=7)
    assert download(remote(hub), tmp_path / "a.tar", policy=POLICY).attempts == 8


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 400_000), max_size=6), announced=st.booleans())
def test_any_sequence_of_cuts_gives_the_same_bytes(cuts: list[int], announced: bool) -> None:
    policy = replace(POLICY, attempts=10, first_delay_s=0)
    with tempfile.TemporaryDirectory() as folder:
        repo = Path(folder, "datasets", "org", "name")
        repo.mkdir(parents=True)
        (repo / "a.tar").write_bytes(CONTENT)
        with LoopbackHub(folder) as hub:
            for after_bytes in cuts:
                hub.faults.cut("*/a.tar", after_bytes)
            file = remote(hub) if announced else remote(hub, size_bytes=None, checksum=None)
            done = download(file, Path(folder, "a.tar"), policy=policy)
            assert done.path.read_bytes() == CONTENT
            assert hub.faults.pending() == 0


def test_resumes_what_a_killed_process_left(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.throttle("*/a.tar", 1_000_000, times=1)
    file, path = remote(hub, checksum=None), tmp_path / "a.tar"
    program = (
        "from pathlib import Path\n"
        "from md_assets.core.source import RemoteFile\n"
        "from md_assets.storage.http import download\n"
        f"download({file!r}, Path({str(path)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    part = tmp_path / "a.tar.part"
    deadline_s = time.monotonic() + 10
    while not (part.exists() and part.stat().st_size >= 300_000) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left_bytes = part.stat().st_size
    assert 300_000 <= left_bytes < len(CONTENT)
    done = download(file, path, policy=POLICY)
    assert ranges(hub)[-1] == f"bytes={left_bytes}-"
    assert done.fetched_bytes == len(CONTENT) - left_bytes
    assert path.read_bytes() == CONTENT and no_leftovers(path)


def test_complete_part_needs_no_request(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "a.tar.part").write_bytes(CONTENT)
    assert download(remote(hub), tmp_path / "a.tar").attempts == 0
    assert hub.requests.total() == 0 and (tmp_path / "a.tar").read_bytes() == CONTENT


def test_complete_part_of_unannounced_size_ends_with_416(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "a.tar.part").write_bytes(CONTENT)
    done = download(remote(hub, size_bytes=None), tmp_path / "a.tar", policy=POLICY)
    assert done.fetched_bytes == 0 and done.attempts == 1
    assert (tmp_path / "a.tar").read_bytes() == CONTENT


def test_416_for_a_part_longer_than_the_file_begins_anew(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "a.tar.part").write_bytes(CONTENT + b"more")
    done = download(remote(hub, size_bytes=None), tmp_path / "a.tar", policy=POLICY)
    assert done.fetched_bytes == len(CONTENT) and (tmp_path / "a.tar").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["ignore_range", "wrong_range"])
def test_server_that_answers_another_range_cannot_mix_bytes(hub: LoopbackHub, tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.tar.part").write_bytes(CONTENT[:500_000])
    hub.faults.add(Fault("*/a.tar", **{kind: True}))  # type: ignore[arg-type]
    done = download(remote(hub), tmp_path / "a.tar", policy=POLICY)
    assert ranges(hub)[0] == "bytes=500000-" and hub.faults.pending() == 0
    assert done.fetched_bytes == len(CONTENT) and (tmp_path / "a.tar").read_bytes() == CONTENT


def test_file_replaced_since_begins_anew_where_only_the_etag_tells(hub: LoopbackHub, tmp_path: Path) -> None:
    file = remote(hub, checksum=None, size_bytes=None, content_id="link")
    hub.faults.cut("*/a.tar", 600_000)
    with pytest.raises(SourceError):
        download(file, tmp_path / "a.tar", policy=replace(POLICY, attempts=1, attempts_in_all=1))
    other = CONTENT[::-1]
    (tmp_path / "root/datasets/org/name/a.tar").write_bytes(other)
    download(file, tmp_path / "a.tar", policy=POLICY)
    assert ranges(hub)[1].startswith("bytes=") and ranges(hub)[2] == ""
    assert (tmp_path / "a.tar").read_bytes() == other


def test_stall_is_cut_and_resumed(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.stall("*/a.tar", stall_s=30, after_bytes=700_000)
    begun_s = time.monotonic()
    done = download(remote(hub), tmp_path / "a.tar", policy=POLICY)
    assert time.monotonic() - begun_s < 30, "the stall was sat out"
    assert done.attempts == 2 and (tmp_path / "a.tar").read_bytes() == CONTENT
    assert int(ranges(hub)[1].removeprefix("bytes=").rstrip("-")) > 500_000


def test_endless_stall_ends_as_timeout(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.stall("*/a.tar", stall_s=30, times=None)
    with pytest.raises(SourceError, match=r"no byte arrived within the time-out \(2 attempts\)") as caught:
        download(remote(hub), tmp_path / "a.tar", policy=replace(POLICY, attempts=2))
    assert caught.value.reason == "timeout" and caught.value.transient


@pytest.mark.parametrize(
    ("headers", "least_s"),
    [({"Retry-After": "42"}, 42), ({"RateLimit": '"resolvers";r=0;t=267'}, 267), ({}, 0.005)],
)
def test_rate_limit_waits_as_asked(hub: LoopbackHub, tmp_path: Path, headers: dict[str, str], least_s: float) -> None:
    hub.faults.status("*/a.tar", 429, headers)
    slept_s: list[float] = []
    download(remote(hub), tmp_path / "a.tar", policy=POLICY, sleep=slept_s.append)
    assert len(slept_s) == 1 and least_s <= slept_s[0] <= max(least_s * 1.1, 0.01)


@pytest.mark.parametrize("status", [500, 502, 503])
def test_server_errors_are_repeated_then_told(hub: LoopbackHub, tmp_path: Path, status: int) -> None:
    hub.faults.status("*/a.tar", status, times=2)
    assert download(remote(hub), tmp_path / "a.tar", policy=POLICY).attempts == 3
    hub.faults.status("*/a.tar", status, times=3)
    with pytest.raises(SourceError, match=f"HTTP {status}") as caught:
        download(remote(hub), tmp_path / "b.tar", policy=POLICY)
    assert caught.value.reason == "server_error" and caught.value.transient


@pytest.mark.parametrize(("status", "reason"), [(401, "unauthorized"), (403, "unauthorized"), (404, "not_found")])
def test_refusals_are_not_repeated(hub: LoopbackHub, tmp_path: Path, status: int, reason: str) -> None:
    hub.faults.status("*/a.tar", status, times=None)
    with pytest.raises(SourceError) as caught:
        download(remote(hub), tmp_path / "a.tar", sleep=lambda _: pytest.fail("it waited"))
    assert caught.value.reason == reason and hub.requests["resolve"] == 1
    assert list(tmp_path.glob("a.tar*")) == []


def test_damage_on_the_way_is_healed_by_one_clean_download(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "a.tar.part").write_bytes(CONTENT[:1000])
    hub.faults.corrupt("*/a.tar")
    download(remote(hub), tmp_path / "a.tar", policy=POLICY)
    assert ranges(hub) == ["bytes=1000-", ""]
    assert (tmp_path / "a.tar").read_bytes() == CONTENT


def test_damage_at_the_source_is_told_and_nothing_published(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.faults.corrupt("*/a.tar", times=None)
    (tmp_path / "a.tar").write_bytes(b"what was there before")
    with pytest.raises(SourceError, match=f"sha256 is [0-9a-f]{{64}} where .*{SHA256.hexdigest}") as caught:
        download(remote(hub), tmp_path / "a.tar", sleep=lambda _: pytest.fail("it waited"))
    assert caught.value.reason == "checksum_mismatch" and not caught.value.transient
    assert hub.requests["cdn"] == 2
    assert (tmp_path / "a.tar").read_bytes() == b"what was there before" and no_leftovers(tmp_path / "a.tar")


@pytest.mark.parametrize("announced_bytes", [len(CONTENT) - 1, len(CONTENT) + 1])
def test_other_size_than_announced_is_told(hub: LoopbackHub, tmp_path: Path, announced_bytes: int) -> None:
    file = remote(hub, checksum=None, size_bytes=announced_bytes)
    with pytest.raises(SourceError, match=rf"{len(CONTENT)} bytes are sent .* {announced_bytes}") as caught:
        download(file, tmp_path / "a.tar", sleep=lambda _: pytest.fail("it waited"))
    assert caught.value.reason == "size_mismatch" and not caught.value.transient
    assert not (tmp_path / "a.tar").exists()


def test_html_page_is_not_taken_for_the_file(hub: LoopbackHub, tmp_path: Path) -> None:
    file = remote(hub, checksum=None, size_bytes=None)
    hub.faults.html("*/a.tar")
    download(file, tmp_path / "a.tar", policy=POLICY)
    assert (tmp_path / "a.tar").read_bytes() == CONTENT
    hub.faults.html("*/a.tar", times=2)
    with pytest.raises(SourceError, match="an HTML page instead of the file"):
        download(file, tmp_path / "b.tar", policy=POLICY)
    assert not (tmp_path / "b.tar").exists()


def test_empty_file(hub: LoopbackHub, tmp_path: Path) -> None:
    url = f"{hub.endpoint}/datasets/org/name/resolve/main/empty.txt"
    done = download(RemoteFile("empty.txt", url, 0, None, "x", ""), tmp_path / "e", policy=POLICY)
    assert done.remote.size_bytes == 0 and (tmp_path / "e").read_bytes() == b""


def test_full_disk_is_found_before_the_transfer(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_499_999))
    with pytest.raises(SourceError, match="1499999 bytes are free and 1500000 are needed") as caught:
        download(remote(hub), tmp_path / "a.tar", policy=POLICY)
    assert caught.value.reason == "disk_full" and not caught.value.transient


def test_error_of_progress_ends_it_and_the_next_call_resumes(hub: LoopbackHub, tmp_path: Path) -> None:
    def cancel(done_bytes: int, _: int) -> None:
        if done_bytes > 500_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(remote(hub), tmp_path / "a.tar", policy=POLICY, progress=cancel)
    assert download(remote(hub), tmp_path / "a.tar", policy=POLICY).fetched_bytes < 1_000_000


def test_nobody_listens(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path) as hub:
        file = remote(hub)
    with pytest.raises(SourceError, match="the server does not accept connections") as caught:
        download(file, tmp_path / "a.tar", policy=POLICY)
    assert caught.value.reason == "connection" and caught.value.transient


def test_no_secret_is_shown(hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []
    file = remote(hub, url=remote(hub).url + "?Signature=s3cret&Expires=1")
    caplog.set_level("DEBUG", "md_assets")
    hub.faults.cut("*/a.tar", 0, times=None)
    cases = [
        (file, {"authorization": "Bearer hf_t0ken"}),
        (replace(file, url="http://user:s3cret@127.0.0.1:1/a.tar"), {}),
        (replace(file, url="nonsense?Signature=s3cret"), {}),
    ]
    for case, headers in cases:
        with pytest.raises(SourceError) as caught:
            download(case, tmp_path / "a.tar", policy=POLICY, headers=headers)
        shown += traceback.format_exception(caught.value)
    hub.faults.status("*/a.tar", 403, {"X-Error-Message": "hf_t0ken may not read /a.tar?Signature=s3cret"})
    with pytest.raises(SourceError, match="may not read") as caught:
        download(file, tmp_path / "a.tar", policy=POLICY, headers=cases[0][1])
    shown += traceback.format_exception(caught.value)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("md_assets")]
    assert len(ours) >= 4, "the repetitions are logged"
    for text in shown + ours:
        assert "s3cret" not in text and "t0ken" not in text and "Signature=" not in text


def test_redacted_url_keeps_what_helps() -> None:
    assert redact_url("https://u:p@cdn.org:8/a/b.tar?Signature=x#y") == "https://cdn.org:8/a/b.tar"


def test_connect_timeout_is_told_from_a_stall() -> None:
    assert "no connection" in str(connection_error("a", requests.ConnectTimeout()))
    assert "no byte" in str(connection_error("a", requests.ReadTimeout()))
    assert urlsplit(redact_url("http://h/p")).path == "/p"
