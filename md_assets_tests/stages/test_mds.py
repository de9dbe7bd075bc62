"""The mds stage: the join of images and captions, exact and repeatable, and what it refuses."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress
from md_assets.core.schema import MDS_COLUMNS
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.datasets.jdb import SPEC
from md_assets.demo.journeydb import REJECTED_BY_MDS, miniature_archive
from md_assets.stages.once import published
from md_assets.storage.mds import iter_rows, read_index, verify_shards
from md_assets.storage.publish import read_ledger
from md_assets_tests.stages.conftest import SAMPLES, SIZE_PX, JourneyDb, wait_until


def rows(jdb: JourneyDb, archive: str = "train/000") -> list[dict[str, Any]]:
    return list(iter_rows(jdb.dir("mds").data(archive)))


def refusal(jdb: JourneyDb, archive: str = "train/000", **options: Any) -> ArchiveError:
    """The error of the archive, one line that tells what to do."""
    with pytest.raises(ArchiveError) as caught:
        jdb.mds(archive, **options)
    text = str(caught.value)
    assert text.startswith(f"jdb {archive}: ") and "\n" not in text and caught.value.remedy
    return caught.value


def with_prompts(jdb: JourneyDb, picture: Callable[..., bytes], prompts: Mapping[str, str | None]) -> None:
    """Publish raw and annotations of an archive with these images in order; None has no row of captions."""
    jdb.put_archive("train/000", {f"./000/{name}.jpg": picture(n) for n, name in enumerate(prompts)})
    jdb.put_prompts("train", {f"./000/{name}.jpg": text for name, text in prompts.items() if text is not None})
    jdb.raw()
    jdb.annotations()


def test_the_join_is_exact(ready: JourneyDb) -> None:
    outcome = ready.mds()
    ledger, raw = outcome.ledger, read_ledger(ready.dir("raw").ledger("train/000"))
    content = miniature_archive("train/000", SAMPLES, SIZE_PX)
    assert raw is not None and not outcome.passed_over
    images = ready.raw_samples()
    assert [row["key"] for row in rows(ready)] == [sample.key for sample in images if sample is not images[3]]
    by_key = {sample.key: sample for sample in images}
    for row in rows(ready):
        image = by_key[row["key"]]
        assert set(row) == set(MDS_COLUMNS)
        assert row["caption"] == content.prompts[f"./{row['key'].removeprefix('train/')}.jpg"]
        assert (row["jpg"], row["width"], row["height"]) == (image.jpeg, image.width, image.height)
    assert ledger.rejected == {Reason.NO_CAPTION: [images[3].key]}
    assert {reason: len(keys) for reason, keys in ledger.rejected.items()} == dict(REJECTED_BY_MDS)
    assert (ledger.read, ledger.kept, ledger.balances) == (raw.kept, 6, True)
    assert ledger.details == {"orphan_captions": 1}  # that of no image; those of rejected images are none
    annotations = read_ledger(ready.dir("annotations").ledger("train"))
    assert annotations is not None
    assert ledger.inputs == {"raw": raw.content_id, "annotations": annotations.content_id}
    assert (ledger.source, ledger.bytes_in) == (raw.source, raw.bytes_out)
    assert ledger.settings == mds_settings(SPEC, ImageSettings())
    assert verify_shards(ready.dir("mds").data("train/000")) == 6
    assert ready.temporaries() == []


def test_the_same_bytes_in_another_place(ready: JourneyDb) -> None:
    ready.mds()
    first = ready.files()
    ready.root = DataRoot(ready.root.path.parent / "second")
    ready.annotations()
    ready.raw()
    ready.mds()
    assert ready.files() == first and any(path.endswith(".mds") for path in first)


def test_second_run_passes_over(ready: JourneyDb) -> None:
    first = ready.mds()
    stamp = ready.dir("mds").ledger("train/000").stat().st_mtime_ns
    again = ready.mds(on_wait=lambda: pytest.fail("it waited"))
    assert again.passed_over and again.ledger == first.ledger
    assert ready.dir("mds").ledger("train/000").stat().st_mtime_ns == stamp


def test_without_a_caption_none_empty_white_space_or_nul(jdb: JourneyDb, picture: Callable[..., bytes]) -> None:
    prompts = {"absent": None, "empty": "", "spaces": " \t\n\u3000", "nul": "\0\0", "nul_space": "\0 \0", "good": "x"}
    with_prompts(jdb, picture, prompts)
    ledger = jdb.mds().ledger
    assert ledger.rejected == {Reason.NO_CAPTION: [f"train/000/{name}" for name in prompts if name != "good"]}
    assert [row["key"] for row in rows(jdb)] == ["train/000/good"] and ledger.balances


def test_captions_are_kept_as_they_are_but_for_nul(jdb: JourneyDb, picture: Callable[..., bytes]) -> None:
    prompts = {
        "long": "wörd " * 20_000,
        "emoji": "👩‍🚀 ☃ 漢字 \u202eltr",
        "html": "<b>bold</b> &amp; https://example.org/?a=1&b=2",
        "lines": "  two\nlines\r\n\ttab  ",
        "nul": "a\0b\0",
        "surrogate": "cut \ud83d",
    }
    with_prompts(jdb, picture, prompts)
    assert jdb.mds().ledger.kept == len(prompts)
    expected = {**prompts, "nul": "ab", "surrogate": "cut �"}
    assert {row["key"].removeprefix("train/000/"): row["caption"] for row in rows(jdb)} == expected
    assert len(expected["long"]) == 100_000


def test_rows_are_in_the_order_of_the_archive_not_of_the_captions(
    jdb: JourneyDb, picture: Callable[..., bytes]
) -> None:
    order = ["m", "z", "a", "k"]
    jdb.put_archive("train/000", {f"./000/{name}.jpg": picture(n) for n, name in enumerate(order)})
    jdb.put_prompts("train", {f"./000/{name}.jpg": name for name in sorted(order)})
    jdb.raw()
    jdb.annotations()
    jdb.mds()
    assert [row["caption"] for row in rows(jdb)] == order


def test_orphans_are_counted_not_read(jdb: JourneyDb, picture: Callable[..., bytes]) -> None:
    with_prompts(jdb, picture, {"a": "x", "b": "y"})
    jdb.put_prompts("train", {f"./000/{name}.jpg": "x" for name in ("a", "b", "c", "d")} | {"./001/e.jpg": "x"})
    jdb.annotations()
    ledger = jdb.mds().ledger
    assert (ledger.read, ledger.kept, ledger.details) == (2, 2, {"orphan_captions": 2})


@pytest.mark.parametrize("prompts", [{}, {"a": None, "b": " "}], ids=["no image", "no caption"])
def test_an_archive_without_a_row_is_published(
    jdb: JourneyDb, picture: Callable[..., bytes], prompts: Mapping[str, str | None]
) -> None:
    with_prompts(jdb, picture, prompts)
    ledger = jdb.mds().ledger
    assert (ledger.read, ledger.kept, ledger.balances) == (len(prompts), 0, True)
    assert read_index(jdb.dir("mds").data("train/000")) == ()
    assert jdb.mds().passed_over


def test_changed_captions_are_joined_anew(ready: JourneyDb) -> None:
    ready.mds()
    keys = [row["key"] for row in rows(ready)]
    ready.put_prompts("train", {f"./{key.removeprefix('train/')}.jpg": f"new {key}" for key in keys[:2]})
    ready.annotations()
    outcome = ready.mds()
    assert not outcome.passed_over
    assert [row["caption"] for row in rows(ready)] == [f"new {key}" for key in keys[:2]]
    assert len(outcome.ledger.rejected[Reason.NO_CAPTION]) == 5


def test_changed_images_are_joined_anew(ready: JourneyDb) -> None:
    ready.mds()
    keys = [row["key"] for row in rows(ready)]
    ready.put_archive("train/000", dict(miniature_archive("train/000", SAMPLES, SIZE_PX).members[:2]))
    ready.raw()
    assert not ready.mds().passed_over
    assert [row["key"] for row in rows(ready)] == keys[:2]


def test_what_it_builds_on_must_be_there(jdb: JourneyDb) -> None:
    error = refusal(jdb)
    assert (error.reason, error.what) == ("upstream_missing", "jdb train/000: raw is not published")
    assert error.remedy == "Materialize jdb/raw of it"
    jdb.raw()
    error = refusal(jdb)
    assert error.reason == "upstream_missing" and "(train) are not indexed" in error.what
    assert error.remedy == "Materialize jdb/annotations"
    assert not jdb.dir("mds").path.exists()


def test_raw_of_other_settings_is_refused(ready: JourneyDb) -> None:
    error = refusal(ready, images=ImageSettings(jpeg_quality=90))
    assert error.reason == "stale" and "raw was made with other settings" in error.what


def _unbalance(jdb: JourneyDb, **changes: int) -> None:
    path = jdb.dir("raw").ledger("train/000")
    ledger = read_ledger(path)
    assert ledger is not None
    path.write_text(replace(ledger, **{name: getattr(ledger, name) + by for name, by in changes.items()}).to_json())


def _flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "reason", "says"),
    [
        (lambda jdb: _unbalance(jdb, kept=1), "unbalanced", "12 read, 8 kept, 5 rejected"),
        (lambda jdb: _unbalance(jdb, kept=1, read=1), "unbalanced", "raw holds 7 samples, its ledger says 8"),
        (lambda jdb: _flip(jdb.dir("raw").data("train/000")), "upstream_damaged", "is not what its ledger says"),
        (lambda jdb: _flip(jdb.dir("raw").data("train/000"), 0), "upstream_damaged", "is not what its ledger says"),
        (lambda jdb: jdb.dir("raw").data("train/000").write_bytes(b""), "upstream_missing", "raw is not published"),
        (lambda jdb: _flip(jdb.dir("annotations").data("train"), 1 - 1e-9), "failed", "caption index"),
        (lambda jdb: jdb.dir("annotations").data("train").unlink(), "upstream_missing", "are not indexed"),
    ],
    ids=["unbalanced", "miscounted", "flipped", "flipped header", "cut", "captions", "no captions"],
)
def test_damage_upstream_is_refused_and_what_was_published_stays(
    ready: JourneyDb, spoil: Callable[[JourneyDb], Any], reason: str, says: str
) -> None:
    ready.mds()
    ledger = published(ready.dir("mds"), "train/000")
    before = {path: data for path, data in ready.files().items() if path.startswith("jdb/mds/")}
    ready.put_prompts("train", {"./000/x.jpg": "so that it must be done again"})
    ready.annotations()
    spoil(ready)
    error = refusal(ready)
    assert error.reason == reason and says in error.what
    assert {path: data for path, data in ready.files().items() if path.startswith("jdb/mds/")} == before
    assert published(ready.dir("mds"), "train/000") == ledger and ready.temporaries() == []


def test_what_a_run_killed_while_publishing_left_is_replaced(ready: JourneyDb) -> None:
    """Between the new data's rename and its ledger the old data lie in the workspace."""
    ledger = ready.mds().ledger
    data = ready.dir("mds").data("train/000")
    shutil.copytree(data, data.with_name(".000.tmp") / "replaced")
    ready.dir("mds").ledger("train/000").unlink()
    again = ready.mds()
    assert not again.passed_over and again.ledger.files == ledger.files
    assert ready.temporaries() == []


def test_progress_tells_of_rows(ready: JourneyDb) -> None:
    told: list[Progress] = []
    ready.mds(report=told.append)
    assert [(p.done, p.total, p.unit) for p in told] == [(n, 7, "images") for n in (1, 2, 3, 5, 6, 7)]


PROGRAM = """
import sys, time
from pathlib import Path
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings
from md_assets.datasets.jdb import SPEC
from md_assets.stages.mds import convert_archive

def report(progress):
    if progress.done == 3:
        print("amid", flush=True)
        time.sleep(60)

convert_archive(SPEC, "train/000", DataRoot(Path(sys.argv[1])), ImageSettings(), report=report)
"""


@pytest.mark.slow
def test_killed_midway_then_run_again_gives_the_same_bytes(ready: JourneyDb) -> None:
    command = [sys.executable, "-c", PROGRAM, str(ready.root.path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "amid\n"
        process.send_signal(signal.SIGKILL)
    assert ready.temporaries() and published(ready.dir("mds"), "train/000") is None
    wait_until(lambda: process.poll() is not None)
    assert not ready.mds().passed_over
    killed = ready.files()
    assert ready.temporaries() == [] and len(rows(ready)) == 6
    shutil.rmtree(ready.dir("mds").path)
    ready.mds()
    assert ready.files() == killed
