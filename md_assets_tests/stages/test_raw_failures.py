"""What goes wrong with an archive: one line that names it, nothing published, what was published untouched."""

import errno
import gzip
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress
from md_assets.core.settings import ImageSettings
from md_assets.datasets.jdb import REPO
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.stages.once import published
from md_assets_tests.stages.conftest import POLICY, JourneyDb, remote_of, wait_until

REPOSITORY = Path(__file__).parents[2]
OTHER = ImageSettings(jpeg_quality=90)
"""Settings other than those of what is published, so that the archive is done again."""


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_in_gzip(path: Path) -> None:
    """Another byte of a picture, so that only gzip's checksum can tell."""
    data = bytearray(gzip.decompress(path.read_bytes()))
    whole = gzip.compress(bytes(data), 0, mtime=0)
    at = len(whole) // 3
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])


def cut_tar_inside(path: Path) -> None:
    """A whole gzip of a tar that is cut off between two members."""
    data = gzip.decompress(path.read_bytes())
    second = data.index(b"ustar", data.index(b"ustar") + 512) - 257
    path.write_bytes(gzip.compress(data[:second], 1))


SPOILED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "truncated": (cut_in_half, "truncated", "is cut off"),
    "truncated inside": (cut_tar_inside, "truncated", "it is cut off"),
    "flipped": (flip_in_gzip, "corrupt", "damaged|no usable tar"),
    "page": (lambda path: path.write_text("<!DOCTYPE html><html>sign in</html>"), "not_an_archive", "it is a web page"),
    "empty": (lambda path: path.write_bytes(b""), "truncated", "it is empty"),
    "noise": (lambda path: path.write_bytes(b"noise" * 400), "not_an_archive", "no usable tar"),
}


def failure(jdb: JourneyDb, archive: str = "train/000", **options: Any) -> ArchiveError:
    """The error of the archive, one line of the right form."""
    with pytest.raises(ArchiveError) as caught:
        jdb.raw(archive, OTHER, **options)
    text = str(caught.value)
    assert text.startswith(f"jdb {archive}: ") and "\n" not in text
    assert caught.value.remedy and text.endswith(caught.value.remedy)
    return caught.value


@pytest.mark.parametrize("kind", SPOILED)
def test_a_spoiled_archive_fails_alone_and_what_was_there_stays(jdb: JourneyDb, kind: str) -> None:
    spoil, reason, says = SPOILED[kind]
    ledger = jdb.raw().ledger
    before = jdb.files()
    whole = jdb.upstream("train/000").read_bytes()
    spoil(jdb.upstream("train/000"))
    error = failure(jdb)
    assert error.reason == reason and not error.transient
    assert re.search(says, error.what), error.what
    assert jdb.files() == before and jdb.temporaries() == []
    assert published(jdb.dir("raw"), "train/000") == ledger
    failure(jdb, "train/000")  # and again
    assert jdb.raw("train/001").ledger.kept == 7  # the others go on
    jdb.upstream("train/000").write_bytes(whole)
    assert not jdb.raw(images=OTHER).passed_over  # mended at the source, it is done


def test_a_spoiled_archive_leaves_nothing_where_nothing_was(jdb: JourneyDb) -> None:
    cut_in_half(jdb.upstream("train/000"))
    failure(jdb)
    assert [p for p in jdb.root.path.rglob("*") if p.is_file()] == [] and jdb.temporaries() == []


@pytest.mark.parametrize(
    ("fault", "reason", "says"),
    [
        (lambda hub: hub.faults.corrupt("*/000.tgz", times=None), "checksum_mismatch", "its sha256 is"),
        (lambda hub: hub.faults.html("*/000.tgz", times=None), "server_error", "an HTML page instead of the file"),
        (lambda hub: hub.faults.status("*/000.tgz", 404, times=None), "not_found", "no such file"),
        (lambda hub: hub.faults.status("*/000.tgz", 503, times=None), "server_error", "HTTP 503"),
        (lambda hub: hub.faults.status("*JourneyDB", 503, place="listing", times=None), "server_error", "HTTP 503"),
        (lambda hub: hub.faults.cut("*/000.tgz", 0, times=None), "connection", "ended after 0|was cut"),
    ],
    ids=["checksum", "page", "404", "503", "listing", "cut"],
)
def test_a_failing_server_is_told(jdb: JourneyDb, fault: Callable[[LoopbackHub], Any], reason: str, says: str) -> None:
    jdb.raw()
    before = jdb.files()
    fault(jdb.hub)
    error = failure(jdb)
    assert error.reason == reason and f"{REPO}" in error.what
    assert error.transient == (reason == "connection" or "503" in says)
    assert jdb.files() == before and jdb.temporaries() == []
    jdb.hub.faults.clear()
    assert not jdb.raw(images=OTHER).passed_over


def test_an_archive_that_the_source_does_not_have(jdb: JourneyDb) -> None:
    error = failure(jdb, "train/007")
    assert error.reason == "not_found" and f"{REPO}:data/train/imgs/007.tgz" in error.what
    assert "/tree/" in error.remedy
    assert not jdb.root.path.exists()


def test_a_gated_repository_is_told_in_one_sentence_with_its_page(hub_files: Path, tmp_path: Path) -> None:
    with LoopbackHub(hub_files, gated=[REPO], tokens={"hf_stranger": [], "hf_granted": [REPO]}) as hub:
        for token, lacks in ((None, "no token is set"), ("hf_stranger", "has not been granted access")):
            error = failure(JourneyDb(hub, DataRoot(tmp_path / "data"), token=token))
            assert error.reason == "gated" and not error.transient and lacks in error.what
            assert f"{hub.endpoint}/datasets/{REPO}" in error.remedy and "hf_stranger" not in str(error)
        assert not list((tmp_path / "data").rglob("*.tar"))
        assert JourneyDb(hub, DataRoot(tmp_path / "data"), token="hf_granted").raw().ledger.kept == 7


def test_a_cut_download_goes_on_where_it_was_cut(jdb: JourneyDb) -> None:
    """After the attempts of one run are used up, in the next run."""
    size_bytes = jdb.upstream("train/000").stat().st_size
    jdb.hub.faults.cut("*/000.tgz", size_bytes // 2, times=1)
    jdb.policy = replace(POLICY, attempts=1, attempts_in_all=1)
    error = failure(jdb)
    assert error.reason == "connection" and error.transient
    assert [p.rpartition("/")[2] for p in jdb.temporaries()] == [
        ".000.tmp",
        "archive.tgz.part",
        "archive.tgz.source.part",
    ]
    jdb.raw()
    assert jdb.hub.history[-1].range_header.startswith("bytes=") and jdb.hub.requests["cdn"] == 2
    assert jdb.temporaries() == [] and len(jdb.raw_samples()) == 7


def test_a_download_that_its_user_ends_goes_on_too(jdb: JourneyDb) -> None:
    def cancel(progress: Progress) -> None:
        if progress.done > progress.total / 2:  # type: ignore[operator]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jdb.raw(report=cancel)
    jdb.raw()
    assert int(jdb.hub.history[-1].range_header.removeprefix("bytes=").rstrip("-")) > 0
    assert jdb.temporaries() == []


def test_the_part_of_another_content_is_not_taken_over(jdb: JourneyDb, picture: Callable[..., bytes]) -> None:
    jdb.hub.faults.cut("*/000.tgz", 100_000, times=1)
    jdb.policy = replace(POLICY, attempts=1, attempts_in_all=1)
    failure(jdb)
    jdb.put_archive("train/000", {f"./000/{seed}.jpg": picture(seed) for seed in range(9)})
    assert jdb.raw().ledger.kept == 9
    assert jdb.hub.history[-1].range_header == ""


def test_a_full_disk_is_found_before_the_transfer(jdb: JourneyDb, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    error = failure(jdb)
    assert error.reason == "disk_full" and "1000 bytes are free" in error.what and "MD_ASSETS_DATA" in error.remedy


def test_a_disk_that_takes_no_more_is_an_error_of_the_archive(jdb: JourneyDb) -> None:
    """The kernel's own refusal, of a file that grows beyond the process's limit."""
    ledger = jdb.raw().ledger
    before = jdb.files()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ledger.bytes_in // 2, hard))
    try:
        error = failure(jdb)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.reason == "disk" and "File too large" in error.what
    assert jdb.files().keys() - before.keys() <= {
        f"jdb/raw/train/.000.tmp/archive.tgz{s}.part" for s in ("", ".source")
    }
    assert published(jdb.dir("raw"), "train/000") == ledger
    jdb.raw()
    assert jdb.files() == before


def test_a_write_error_of_the_tar_is_an_error_of_the_archive(jdb: JourneyDb, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("md_assets.storage.raw_tar.RawTarWriter.write", full)
    error = failure(jdb)
    assert error.reason == "disk" and "No space left on device" in error.what and "Check space" in error.remedy
    assert jdb.files() == {} and jdb.temporaries() == []


PROGRAM = """
import sys
from pathlib import Path
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings
from md_assets.datasets.jdb import SPEC
from md_assets.stages.raw import fetch_archive
from md_assets.storage.hub import HubClient
from md_assets.storage.image_pool import ImagePool
import time

endpoint, root, slow_from, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def report(progress):
    if slow_from and (progress.images or 0) >= slow_from:
        time.sleep(60)

client = HubClient(endpoint)
with ImagePool(workers) as pool:
    outcome = fetch_archive(SPEC, "train/000", lambda: client.locate(SPEC.locate("train/000")), DataRoot(Path(root)),
                            ImageSettings(), fetcher=client, pool=pool, report=report)
print(outcome.passed_over)
"""


def start(jdb: JourneyDb, slow_from: int = 0, workers: int = 0) -> subprocess.Popen[str]:
    """The raw stage of train/000 in a process of its own."""
    command = [sys.executable, "-c", PROGRAM, jdb.hub.endpoint, str(jdb.root.path), str(slow_from), str(workers)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
def test_a_download_killed_midway_goes_on_and_gives_the_same_bytes(jdb: JourneyDb) -> None:
    archive_bytes = jdb.upstream("train/000").stat().st_size
    jdb.hub.faults.throttle("*/000.tgz", archive_bytes / 4, times=1)
    process = start(jdb)
    part = jdb.root.path / "jdb/raw/train/.000.tmp/archive.tgz.part"
    wait_until(lambda: size_of(part) > archive_bytes / 4)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left_bytes = size_of(part)
    assert 0 < left_bytes < archive_bytes and published(jdb.dir("raw"), "train/000") is None
    jdb.raw()
    assert jdb.hub.history[-1].range_header == f"bytes={left_bytes}-"
    assert jdb.temporaries() == []
    interrupted = jdb.files()
    jdb.root = DataRoot(jdb.root.path.parent / "undisturbed")
    jdb.raw()
    assert jdb.files() == interrupted


@pytest.mark.slow
def test_killed_amid_the_images_with_its_workers(jdb: JourneyDb) -> None:
    """The archive that was fetched is not fetched again, and what the killed run had written is not appended to."""
    process = start(jdb, slow_from=3, workers=2)
    tar = jdb.root.path / "jdb/raw/train/.000.tmp/out/000.tar"
    wait_until(tar.exists)
    process.send_signal(signal.SIGSTOP)  # between two images or in its sleep
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert jdb.temporaries() and published(jdb.dir("raw"), "train/000") is None
    fetched = jdb.hub.requests["cdn"]
    outcome = jdb.raw()
    assert not outcome.passed_over and jdb.hub.requests["cdn"] == fetched
    assert len(jdb.raw_samples()) == 7 and jdb.temporaries() == []


@pytest.mark.slow
def test_two_processes_at_once_give_one_result(jdb: JourneyDb) -> None:
    archive_bytes = jdb.upstream("train/000").stat().st_size
    jdb.hub.faults.throttle("*/000.tgz", archive_bytes / 2, times=None)
    process = start(jdb)
    wait_until(lambda: size_of(jdb.root.path / "jdb/raw/train/.000.tmp/archive.tgz.part") > 0)
    waited = threading.Event()
    here = jdb.raw(pool=None, on_wait=waited.set)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "False\n")
    assert here.passed_over and waited.is_set() and jdb.hub.requests["cdn"] == 1
    assert len(jdb.raw_samples()) == 7 and jdb.temporaries() == []
    assert here.ledger.inputs == {"archive": remote_of(jdb, "train/000").content_id}
