"""The raw stage against a real client and a loopback Hub: what is kept, counted, published and passed over."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress
from md_assets.core.settings import ImageSettings, raw_settings
from md_assets.demo.journeydb import REJECTED_BY_RAW, miniature_archive
from md_assets.storage.image_pool import ImagePool
from md_assets_tests.stages.conftest import SAMPLES, SIZE_PX, JourneyDb, png, remote_of

KEPT = SAMPLES - sum(REJECTED_BY_RAW.values())


def names(archive: str) -> list[str]:
    """The members' names in the miniature without folder and suffix."""
    members = miniature_archive(archive, SAMPLES, SIZE_PX).members
    return [name.rpartition("/")[2].removesuffix(".jpg") for name, _ in members]


def test_counts_keys_and_ledger_of_the_miniature(jdb: JourneyDb) -> None:
    outcome = jdb.raw()
    ledger, name = outcome.ledger, names("train/000")
    assert not outcome.passed_over
    assert (ledger.read, ledger.kept, ledger.balances) == (SAMPLES, KEPT, True)
    assert {reason: len(keys) for reason, keys in ledger.rejected.items()} == dict(REJECTED_BY_RAW)
    assert ledger.rejected == {
        Reason.TOO_SMALL: [f"train/000/{name[3]}", f"train/000/{name[4]}"],
        Reason.UNDECODABLE: [f"train/000/{name[5]}"],
        Reason.DUPLICATE_KEY: [f"train/000/{name[0]}"],
        Reason.UNSAFE_MEMBER: ["train/000/link"],
    }
    kept = [f"train/000/{name[i]}" for i in (0, 1, 2, 6, 7, 8, 9)]
    assert [sample.key for sample in jdb.raw_samples()] == kept
    remote = remote_of(jdb, "train/000")
    assert (ledger.dataset, ledger.archive, ledger.stage) == ("jdb", "train/000", "raw")
    assert ledger.source == {"name": remote.name, "content_id": remote.content_id, "revision": remote.revision}
    assert ledger.inputs == {"archive": remote.content_id} and ledger.settings == raw_settings(ImageSettings())
    assert ledger.bytes_in == remote.size_bytes == jdb.upstream("train/000").stat().st_size
    assert ledger.bytes_out == jdb.dir("raw").data("train/000").stat().st_size
    assert ledger.seconds > 0 and {"md_assets", "pillow"} <= set(ledger.versions)
    assert jdb.temporaries() == [] and list(jdb.files()) == ["jdb/raw/train/000.tar"]


def test_images_are_resized_and_never_upscaled(jdb: JourneyDb) -> None:
    jdb.raw()
    sizes = [(sample.width, sample.height) for sample in jdb.raw_samples()]
    assert sizes == [(512, 512)] * 6 + [(768, 512)]


def test_original_bytes_stay_where_nothing_must_change(jdb: JourneyDb) -> None:
    ledger = jdb.raw(images=ImageSettings(max_image_size=1024)).ledger
    content = miniature_archive("train/000", SAMPLES, SIZE_PX).members
    assert [sample.jpeg for sample in jdb.raw_samples()] == [content[i][1] for i in (0, 1, 2, 6, 7, 8, 9)]
    assert ledger.details == {"stored_unchanged": KEPT, "orphan_captions": 0}


def test_bytes_are_the_same_in_another_place_and_with_two_workers(jdb: JourneyDb) -> None:
    jdb.raw()
    first = jdb.files()
    jdb.root = DataRoot(jdb.root.path.parent / "second")
    with ImagePool(2) as pool:
        ledger = jdb.raw(pool=pool).ledger
    assert jdb.files() == first
    assert ledger.read == SAMPLES and ledger.balances


def test_second_run_passes_over_and_asks_for_the_listing_only(jdb: JourneyDb) -> None:
    first = jdb.raw()
    before, stamp = jdb.hub.requests, jdb.dir("raw").data("train/000").stat().st_mtime_ns
    again = jdb.raw(pool=None)
    assert again.passed_over and again.ledger == first.ledger
    assert jdb.hub.requests - before == {"listing": 1}
    assert jdb.dir("raw").data("train/000").stat().st_mtime_ns == stamp


def test_changed_upstream_content_is_done_again(jdb: JourneyDb, picture: Callable[..., bytes]) -> None:
    jdb.raw()
    jdb.raw("train/001")
    jdb.put_archive("train/000", {"./000/new.jpg": picture()})
    outcome = jdb.raw()
    assert not outcome.passed_over and (outcome.ledger.read, outcome.ledger.kept) == (1, 1)
    assert [sample.key for sample in jdb.raw_samples()] == ["train/000/new"]
    assert jdb.raw("train/001").passed_over  # though the repository has a new commit


def test_changed_settings_are_done_again(jdb: JourneyDb) -> None:
    jdb.raw()
    outcome = jdb.raw(images=ImageSettings(min_image_size=200))
    assert not outcome.passed_over and Reason.TOO_SMALL not in outcome.ledger.rejected
    assert not jdb.raw().passed_over and jdb.raw().passed_over


@pytest.mark.parametrize("keep", [True, False])
def test_the_upstream_file_stays_where_wanted(jdb: JourneyDb, keep: bool) -> None:
    jdb.raw(keep_archive=keep)
    kept = jdb.root.kept_archive("jdb", "train/000", ".tgz")
    assert kept.exists() == keep
    assert not keep or kept.read_bytes() == jdb.upstream("train/000").read_bytes()
    assert jdb.temporaries() == []


@pytest.mark.parametrize("members", [{}, {"./000/a.jpg": b"no image", "./000/b.jpg": b""}], ids=["empty", "no image"])
def test_an_archive_without_a_usable_sample_is_published(jdb: JourneyDb, members: dict[str, bytes]) -> None:
    jdb.put_archive("train/000", members)
    ledger = jdb.raw().ledger
    assert (ledger.read, ledger.kept, ledger.balances) == (len(members), 0, True)
    assert jdb.raw_samples() == [] and jdb.raw().passed_over


def test_member_names_are_never_trusted(jdb: JourneyDb, picture: Callable[..., bytes]) -> None:
    images = [picture(seed) for seed in range(9)]
    samples = {
        "./000/plain.jpg": images[0],
        "./000/två ord ☃.jpg": images[1],
        "./000/line\nend.jpg": images[2],
        "./000/\udcff\udcfe.jpg": images[3],  # the bytes FF FE, which are not UTF-8
        "./000/dotted.name.PNG": images[4],
        "./000/deep/er.jpg": images[5],
        "./000/../../evil.jpg": images[6],
        "/absolute.jpg": images[7],
        "./000/link.jpg": None,
    }
    jdb.put_archive("train/000", samples)
    ledger = jdb.raw().ledger
    assert [sample.key for sample in jdb.raw_samples()] == [
        "train/000/plain",
        "train/000/två ord ☃",
        "train/000/line%0Aend",
        "train/000/%FF%FE",
        "train/000/dotted%2Ename",
        "train/000/deep/er",
    ]
    assert ledger.balances and len(ledger.rejected.pop(Reason.UNSAFE_MEMBER)) == 3 and not ledger.rejected
    assert [sample.jpeg for sample in jdb.raw_samples()] == images[:6]
    written = {p.relative_to(jdb.root.path) for p in jdb.root.path.rglob("*") if p.is_file()}
    assert {str(path) for path in written} == {"jdb/raw/train/000.tar", "jdb/raw/train/000.json"}
    assert not list(jdb.root.path.parent.rglob("*evil*")) and not list(jdb.root.path.parent.rglob("absolute*"))


def test_each_bad_image_is_rejected_alone_and_the_edges_are_inclusive(
    jdb: JourneyDb, picture: Callable[..., bytes]
) -> None:
    whole = picture()
    jdb.put_archive(
        "train/000",
        {
            "./000/zero.jpg": b"",
            "./000/text.jpg": b"this is no image",
            "./000/cut.jpg": whole[: len(whole) // 2],
            "./000/bomb.png": png(30_000, 30_000),
            "./000/255x256.jpg": picture(1, 255, 256),
            "./000/256x256.jpg": picture(2, 256, 256),
            "./000/257x256.jpg": picture(3, 257, 256),
            "./000/3000x256.jpg": picture(4, 3000, 256),
            "./000/grey.png": png(256, 256),
            "./000/large.jpg": whole + b"\0" * 2_000_000,
            "./000/256x256.png": png(256, 256),
        },
    )
    ledger = jdb.raw(images=ImageSettings(max_member_bytes=2_000_000)).ledger
    assert ledger.rejected[Reason.TOO_LARGE] == ["train/000/bomb", "train/000/large"]
    assert ledger.rejected[Reason.UNDECODABLE] == [f"train/000/{key}" for key in ("zero", "text", "cut")]
    assert ledger.rejected[Reason.TOO_SMALL] == ["train/000/255x256"]
    assert ledger.rejected[Reason.DUPLICATE_KEY] == ["train/000/256x256"]  # the .png
    assert [sample.key[10:] for sample in jdb.raw_samples()] == ["256x256", "257x256", "3000x256", "grey"]
    assert ledger.balances and ledger.read == 11


def test_nothing_is_extracted_and_the_archive_goes_with_the_workspace(jdb: JourneyDb) -> None:
    """The disk holds at most the archive and what is made of it."""
    seen: set[str] = set()
    most_bytes = 0

    def look(progress: Progress) -> None:
        nonlocal most_bytes
        workspace = jdb.root.path / "jdb" / "raw" / "train" / ".000.tmp"
        files = [p for p in workspace.rglob("*") if p.is_file()]
        seen.update(str(p.relative_to(workspace)) for p in files)
        most_bytes = max(most_bytes, sum(p.stat().st_size for p in files))

    ledger = jdb.raw(report=look).ledger
    assert seen == {"archive.tgz.part", "archive.tgz.source.part", "archive.tgz", "out/000.tar"}
    assert ledger.bytes_in <= most_bytes <= ledger.bytes_in + ledger.bytes_out
    assert jdb.temporaries() == []


def test_progress_tells_of_bytes_and_images(jdb: JourneyDb) -> None:
    told: list[Progress] = []
    size_bytes = jdb.raw(report=told.append).ledger.bytes_in
    fetched = [p for p in told if p.doing == "fetches"]
    prepared = [p for p in told if p.doing == "prepares images"]
    assert {(p.archive, p.total, p.unit) for p in told} == {("train/000", size_bytes, "bytes")}
    assert fetched[-1].done == size_bytes
    assert [p.images for p in prepared] == list(range(1, SAMPLES + 1))
    assert all(0 < p.done <= size_bytes for p in prepared)


def test_a_ledger_can_be_read_without_this_code(jdb: JourneyDb) -> None:
    jdb.raw()
    told: dict[str, Any] = json.loads(jdb.dir("raw").ledger("train/000").read_bytes())
    assert told["read"] == told["kept"] + sum(map(len, told["rejected"].values())) == SAMPLES
    (file,) = told["files"]
    content = (jdb.root.path / "jdb" / "raw" / file["path"]).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
