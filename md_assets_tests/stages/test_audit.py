"""Archives and merged indexes read again: what is sound, and everything that is not."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.ledger import Ledger, Pruned
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.core.verdict import AUDITED, BEGIN_FACT, DIRECTORY_FACT, STAGE_FACT, Verdict
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages.audit import Said, audit_archive, audit_index, chain_to, hash_files, state_of
from md_assets.stages.index import merge_indexes
from md_assets.stages.status import stages_of
from md_assets.storage.mds import INDEX_NAME
from md_assets.storage.publish import workspace
from md_assets_tests.stages.made_chain import TAG, ledger_of, publish_chain
from md_assets_tests.stages.sound_archives import latents_of, mds_row, publish

ARCHIVE = "train/000"
ROWS = 205
"""Of which 0, 68, 136 and 204 are decoded."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive in all stages, not to be changed."""
    root = DataRoot(tmp_path_factory.mktemp("made"))
    publish(root, ARCHIVE, [mds_row(ARCHIVE, number) for number in range(ROWS)])
    return root.path


@pytest.fixture
def root(made: Path, tmp_path: Path) -> DataRoot:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "data")
    return DataRoot(tmp_path / "data")


def step(root: DataRoot, stage: str) -> StageDir:
    dirs = {"raw": root.raw, "mds": root.mds}
    return dirs[stage]("jdb") if stage in dirs else root.latents("jdb", TAG)


def audit(root: DataRoot, stage: str, archive: str = ARCHIVE, said: Said | None = None) -> Verdict:
    verdict = audit_archive(chain_to(stages_of(root, JDB), step(root, stage)), archive, said)
    assert verdict.check == AUDITED
    return verdict


def said_of(root: DataRoot, stage: str) -> Said:
    """What its run records."""
    ledger = ledger_of(step(root, stage), ARCHIVE)
    return Said(ledger.content_id[:32], ledger.fingerprint, ledger.kept)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file by hand."""
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def write_ledger(stage_dir: StageDir, **changes: Any) -> Ledger:
    """A ledger that holds together, with other contents."""
    ledger = replace(ledger_of(stage_dir, ARCHIVE), **changes)
    stage_dir.ledger(ARCHIVE).write_text(ledger.to_json())
    return ledger


def shard(root: DataRoot, stage: str) -> Path:
    (path,) = step(root, stage).data(ARCHIVE).glob("*.mds")
    return path


def hashed(root: DataRoot, stage: str, start: int = 0, go_on: Callable[[], bool] = lambda: True) -> Any:
    return hash_files(chain_to(stages_of(root, JDB), step(root, stage)), ARCHIVE, start, go_on)


@pytest.mark.parametrize("stage", ["mds", "latents"])
def test_a_sound_archive(root: DataRoot, stage: str) -> None:
    verdict = audit(root, stage, said=said_of(root, stage))
    assert verdict.passed, verdict.what
    assert verdict.facts["rows"] == ROWS and verdict.facts["rows_decoded"] == 4
    assert verdict.facts["stages"] == ("raw → mds" if stage == "mds" else "raw → mds → latents")
    assert hashed(root, stage) == (2, True, None)


def test_subsets_are_audited_along_their_own_chain(tmp_path: Path) -> None:
    root, archive = DataRoot(tmp_path), "cc12m-train-0000"
    publish_chain(root, CC12M, archive)
    (subset,) = CC12M.subsets
    chain = chain_to(stages_of(root, CC12M), root.latents("cc12m", TAG, subset.name))
    assert [part.asset for part in chain] == ["raw", "mds", "latents", "latents_minres512"]
    verdict = audit_archive(chain, archive)
    assert verdict.passed, verdict.what
    assert verdict.what == "6 read, kept 4 → 4 → 4 → 2; 2 rows decoded"


@pytest.mark.parametrize("stage", ["mds", "latents"])
def test_a_shard_cut_by_one_byte(root: DataRoot, stage: str) -> None:
    path = shard(root, stage)
    size = path.stat().st_size
    os.truncate(path, size - 1)
    verdict = audit(root, stage)
    assert not verdict.passed
    assert verdict.what == f"{path} has {size - 1} bytes, its ledger says {size}"


@pytest.mark.parametrize("stage", ["mds", "latents"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte(root: DataRoot, stage: str, place: str) -> None:
    path = shard(root, stage)
    content = bytearray(path.read_bytes())
    position = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}[place]
    content[position] ^= 1
    path.write_bytes(content)
    compared, complete, verdict = hashed(root, stage)
    assert (compared, complete) == (0, True)
    assert verdict is not None and not verdict.passed and verdict.what.endswith("does not hash to what its ledger says")


def test_a_picture_that_cannot_be_decoded(tmp_path: Path) -> None:
    root = DataRoot(tmp_path)
    rows = [mds_row(ARCHIVE, number) for number in range(3)]
    rows[2]["jpg"] = rows[2]["jpg"][:-40]
    publish(root, ARCHIVE, rows)
    assert audit(root, "mds").what.startswith("mds, sample train/000/002: image file is truncated")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"width": 17}, "its picture is a JPEG of 16×12 px, not 17×12"),
        ({"jpg": b"GIF89a" + bytes(40)}, "cannot identify image file"),
    ],
)
def test_a_picture_that_is_not_what_its_row_says(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    root = DataRoot(tmp_path)
    publish(root, ARCHIVE, [mds_row(ARCHIVE, 0, **changes)])
    verdict = audit(root, "mds")
    assert not verdict.passed and said in verdict.what


def test_latents_that_are_not_those_of_their_row_of_mds(tmp_path: Path) -> None:
    root = DataRoot(tmp_path)
    rows = [mds_row(ARCHIVE, number) for number in range(3)]
    publish(root, ARCHIVE, rows, [latents_of(row) for row in (rows[0], rows[2], rows[1])])
    verdict = audit(root, "latents")
    assert verdict.what == "latents, sample train/000/001: in mds the same row has another key, that of train/000/002"


@pytest.mark.parametrize(("gone", "said", "passed"), [(0, 0, True), (6, 6, True), (0, 6, False), (6, 0, False)])
def test_samples_that_could_not_be_encoded_move_no_row(tmp_path: Path, gone: int, said: int, passed: bool) -> None:
    rows = [mds_row(ARCHIVE, number) for number in range(7)]
    publish(root := DataRoot(tmp_path), ARCHIVE, rows, [latents_of(row) for row in rows if row is not rows[gone]])
    write_ledger(step(root, "latents"), read=7, rejected={"not_finite": [rows[said]["key"]]})
    assert audit(root, "latents").passed == passed


def test_latents_that_are_not_finite(tmp_path: Path) -> None:
    root = DataRoot(tmp_path)
    row = mds_row(ARCHIVE, 0)
    good = latents_of(row)["latents_32"]
    publish(root, ARCHIVE, [row], [latents_of(row, latents_32=b"\x00\x7e" + good[2:])])  # NaN in float16
    assert audit(root, "latents").what.endswith("latents_32 has values that are not finite")


def test_latents_are_compared_with_mds_only_where_that_is_whole(root: DataRoot) -> None:
    shard(root, "mds").unlink()
    assert audit(root, "latents").passed


@pytest.mark.parametrize("stage", ["mds", "latents"])
def test_a_row_missing_from_the_index(root: DataRoot, stage: str) -> None:
    index = step(root, stage).data(ARCHIVE) / INDEX_NAME
    size = index.stat().st_size

    def drop_row(body: dict[str, Any]) -> None:
        body["shards"][0]["samples"] -= 1

    edit(index, drop_row)
    assert not audit(root, stage).passed
    # With the ledger's size, so that only the count tells:
    index.write_text(index.read_text().ljust(size)[:size])
    assert audit(root, stage).what == f"204 rows in the index of {stage}, 205 in the ledger"


def test_an_index_that_is_not_the_one_of_the_ledger(root: DataRoot) -> None:
    index = step(root, "mds").data(ARCHIVE) / INDEX_NAME
    index.write_text(index.read_text().replace('"caption"', '"capsion"', 1))
    assert audit(root, "mds").what == "the index of mds is not the one of the ledger"


@pytest.mark.parametrize("name", ["kept", "read"])
@pytest.mark.parametrize("edited", ["raw", "mds", "latents"])
def test_an_edited_number_in_a_ledger(root: DataRoot, edited: str, name: str) -> None:
    edit(step(root, edited).ledger(ARCHIVE), lambda body: body.update({name: body[name] + 1}))
    verdict = audit(root, "latents")
    assert not verdict.passed and verdict.what.startswith(f"{edited}: ")


@pytest.mark.parametrize("edited", ["raw", "mds", "latents"])
def test_edited_contents_of_a_ledger(root: DataRoot, edited: str) -> None:
    path = step(root, edited).ledger(ARCHIVE)
    edit(path, lambda body: body["files"][0].update(bytes=1))
    assert audit(root, "latents").what == f"{path} was edited after it was written. Delete it and run the archive again"


def test_a_ledger_that_holds_together_but_is_not_the_recorded_one(root: DataRoot) -> None:
    said = said_of(root, "mds")
    write_ledger(step(root, "mds"), rejected={"no_caption": ["a"]}, kept=ROWS - 1)
    assert audit(root, "mds", said=said).what.startswith("the ledger is not the one that its run recorded: 204 kept")


def test_counts_that_do_not_follow_from_stage_to_stage(root: DataRoot) -> None:
    raw = write_ledger(step(root, "raw"), read=ROWS + 1, kept=ROWS - 1)
    write_ledger(step(root, "mds"), inputs={"raw": raw.content_id})
    assert audit(root, "latents").what == "raw kept 204, mds read 205"


def test_a_stage_made_of_another_content_than_there_is(root: DataRoot) -> None:
    write_ledger(step(root, "mds"), inputs={"raw": "another"})
    assert audit(root, "latents").what == "mds was made of another raw than the one that is there"


def test_a_missing_stage(root: DataRoot) -> None:
    step(root, "raw").ledger(ARCHIVE).unlink()
    assert audit(root, "latents").what == "raw is not published"


def at_fault(verdict: Verdict) -> tuple[str, str, str]:
    assert not verdict.passed
    return tuple(verdict.facts[name] for name in (STAGE_FACT, BEGIN_FACT, DIRECTORY_FACT))  # type: ignore[return-value]


def test_the_stage_in_which_a_fault_lies_is_named(root: DataRoot) -> None:
    latents, directory = step(root, "latents"), f"mds_latents_{TAG}"
    content = shard(root, "latents").read_bytes()
    shard(root, "latents").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    _, _, hashing = hashed(root, "latents")
    assert hashing is not None and at_fault(hashing) == ("latents", "latents", directory)
    index = latents.data(ARCHIVE) / INDEX_NAME
    index.write_text(index.read_text()[:-1])
    assert at_fault(audit(root, "latents")) == ("latents", "latents", directory)
    edit(step(root, "mds").ledger(ARCHIVE), lambda body: body.update(kept=ROWS + 1))
    assert at_fault(audit(root, "latents")) == ("mds", "mds", "mds")
    step(root, "raw").ledger(ARCHIVE).write_text("{")
    assert at_fault(audit(root, "latents")) == ("raw", "raw", "raw")


def test_rows_of_mds_that_cannot_be_read_are_not_the_fault_of_latents(root: DataRoot) -> None:
    path = shard(root, "mds")
    path.write_bytes(b"\xff" * path.stat().st_size)
    verdict = audit(root, "latents")
    assert verdict.what.startswith("mds, the row of sample train/000/000: ") and at_fault(verdict)[0] == "mds"


def test_what_was_pruned_must_be_made_again_first(root: DataRoot) -> None:
    for stage in ("raw", "mds"):
        write_ledger(step(root, stage), pruned=Pruned("2026-11-01T00:00:00+00:00", 10))
    os.truncate(shard(root, "latents"), 100)
    assert at_fault(audit(root, "latents")) == ("latents", "raw", f"mds_latents_{TAG}")


def test_a_latents_directory_of_other_settings(root: DataRoot, tmp_path: Path) -> None:
    """Its files alone, then with their ledger, of encoders with another seed."""
    said = said_of(root, "latents")
    rows = [mds_row(ARCHIVE, number) for number in range(ROWS)]
    publish(
        DataRoot(tmp_path / "other"), ARCHIVE, rows, [latents_of(row, latents_32=bytes(64)) for row in rows], seed=1
    )
    here, there = step(root, "latents"), step(DataRoot(tmp_path / "other"), "latents")
    shutil.rmtree(here.data(ARCHIVE))
    shutil.copytree(there.data(ARCHIVE), here.data(ARCHIVE))
    assert audit(root, "latents", said=said).what == "the index of latents is not the one of the ledger"
    shutil.copyfile(there.ledger(ARCHIVE), here.ledger(ARCHIVE))
    verdict = audit(root, "latents", said=said)
    assert not verdict.passed and verdict.what.startswith("it was made with other settings than its run recorded")


def test_latents_of_other_settings_than_mds(root: DataRoot, tmp_path: Path) -> None:
    """No run needs to have said anything for this."""
    rows = [mds_row(ARCHIVE, number) for number in range(ROWS)]
    publish(DataRoot(tmp_path / "other"), ARCHIVE, rows, images=ImageSettings(jpeg_quality=90))
    here, there = step(root, "latents"), step(DataRoot(tmp_path / "other"), "latents")
    shutil.rmtree(here.path)
    shutil.copytree(there.path, here.path)
    assert audit(root, "latents").what == "latents was made with other settings than mds"


def test_of_a_pruned_archive_the_ledgers_count(root: DataRoot) -> None:
    mds = step(root, "mds")
    shutil.rmtree(mds.data(ARCHIVE))
    write_ledger(mds, pruned=Pruned("2026-11-01T00:00:00+00:00", 10))
    assert audit(root, "mds").what.endswith("its data were pruned on 2026-11-01T00:00:00+00:00")
    assert audit(root, "latents").passed
    assert hashed(root, "mds") == (0, True, None)


def test_hashing_goes_on_where_it_stopped(root: DataRoot) -> None:
    assert hashed(root, "mds", go_on=lambda: False) == (0, False, None)
    answers = iter([True, False])
    assert hashed(root, "mds", go_on=lambda: next(answers)) == (1, False, None)
    content = shard(root, "mds").read_bytes()
    shard(root, "mds").write_bytes(content[:-1] + b"\0")
    assert hashed(root, "mds", start=1) == (2, True, None)


def test_an_archive_that_is_being_made_again_has_no_state(root: DataRoot) -> None:
    chain = chain_to(stages_of(root, JDB), step(root, "latents"))
    before = state_of(chain, ARCHIVE)
    assert before is not None and before == state_of(chain, ARCHIVE)
    with workspace(step(root, "mds").ledger(ARCHIVE)):
        assert state_of(chain, ARCHIVE) is None
    write_ledger(step(root, "raw"), seconds=2.0)
    assert state_of(chain, ARCHIVE) != before


INDEXED = ("train/000", "train/001", "valid/000")


@pytest.fixture
def indexed(tmp_path: Path) -> DataRoot:
    """Three archives, whose ledgers are older than their merged indexes."""
    root = DataRoot(tmp_path)
    for archive in INDEXED:
        publish(root, archive, [mds_row(archive, number) for number in range(3)])
        age(root, archive, 100)
    merge(root, INDEXED)
    return root


def age(root: DataRoot, archive: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(step(root, "mds").ledger(archive), (then, then))


def merge(root: DataRoot, archives: tuple[str, ...], images: ImageSettings | None = None) -> None:
    """As a merge that knows of these archives only."""
    for split in JDB.splits:
        of_split = [archive for archive in archives if archive.startswith(split)]
        merge_indexes(step(root, "mds"), split, of_split, mds_settings(JDB, images or ImageSettings()))


def index_verdict(root: DataRoot) -> Verdict:
    return audit_index(step(root, "mds"), JDB, time.time() - 50)


def test_a_sound_index(indexed: DataRoot) -> None:
    verdict = index_verdict(indexed)
    assert verdict.passed, verdict.what
    assert verdict.what == "9 samples of 3 archives, as their ledgers say"


def test_an_index_merged_from_too_few_archives(indexed: DataRoot) -> None:
    merge(indexed, ("train/001", "valid/000"))
    verdict = index_verdict(indexed)
    assert not verdict.passed
    assert verdict.what.endswith("train/index.json leaves out 1 archives that were published: train/000")


def test_archives_published_since_the_merge_are_not_missed(indexed: DataRoot) -> None:
    publish(indexed, "train/002", [mds_row("train/002", 0)])
    publish(indexed, "train/000", [mds_row("train/000", number) for number in range(2)])
    assert index_verdict(indexed).passed
    for archive in ("train/000", "train/002"):
        age(indexed, archive, 60)
    what = index_verdict(indexed).what
    assert "lists train/000: " in what and "leaves out 1 archives that were published: train/002" in what


def test_stale_archives_belong_in_no_index(indexed: DataRoot) -> None:
    publish(indexed, "train/002", [mds_row("train/002", 0)], images=ImageSettings(jpeg_quality=90))
    age(indexed, "train/002", 60)
    assert index_verdict(indexed).passed


def test_an_index_with_an_archive_of_other_settings_or_none(indexed: DataRoot) -> None:
    publish(indexed, "train/000", [mds_row("train/000", n) for n in range(3)], images=ImageSettings(jpeg_quality=90))
    age(indexed, "train/000", 60)
    assert "lists train/000: it was made with other settings than the index says" in index_verdict(indexed).what
    step(indexed, "mds").ledger("train/000").unlink()
    assert "lists train/000, which is not published" in index_verdict(indexed).what


def test_an_index_that_cannot_be_read_or_is_not_there(indexed: DataRoot) -> None:
    edit(step(indexed, "mds").index("train"), lambda body: body.pop("md_assets"))
    assert index_verdict(indexed).what == "'md_assets' is missing"
    for split in JDB.splits:
        step(indexed, "mds").index(split).unlink()
    assert index_verdict(indexed).what.startswith("there is no merged index below ")
