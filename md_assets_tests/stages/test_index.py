"""Merged indexes: what goes in, what is left out, and what is refused."""

import gc
import json
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import Ledger, Pruned
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.settings import ImageSettings, fingerprint, mds_settings
from md_assets.datasets.jdb import SPEC
from md_assets.stages.index import METADATA_KEY, MergedIndex, drop_from_index, merge_indexes
from md_assets.storage.mds import INDEX_NAME, iter_rows
from md_assets.storage.publish import output_file, read_ledger
from md_assets_tests.stages.conftest import LATENT_SHAPES, LAYOUT

SETTINGS = mds_settings(SPEC, ImageSettings())
COUNTS = {"train/000": 3, "train/001": 2, "train/003": 4}
ARCHIVES = [f"train/{number:03}" for number in range(5)]


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the lock files of mosaicml-streaming."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def stage_dir(tmp_path: Path, publish_mds: Any, mds_rows: Any) -> StageDir:
    """Three archives of mds, of which the third has another name than its number in the row of archives."""
    for archive, count in COUNTS.items():
        publish_mds(DataRoot(tmp_path), "jdb", archive, mds_rows(archive, count))
    return DataRoot(tmp_path).mds("jdb")


def merge(stage_dir: StageDir, settings: Any = SETTINGS) -> MergedIndex:
    merged = merge_indexes(stage_dir, "train", ARCHIVES, settings)
    assert merged is not None
    return merged


def streamed(directory: Path) -> list[dict[str, Any]]:
    """What mosaicml-streaming reads, in order."""
    from streaming import StreamingDataset

    rows = list(StreamingDataset(local=str(directory), remote=None, shuffle=False, batch_size=1))
    gc.collect()  # its shared memory, before another one begins
    return rows


def test_streaming_reads_exactly_all_rows_through_it(stage_dir: StageDir) -> None:
    merged = merge(stage_dir)
    assert merged == MergedIndex(
        stage_dir.path / "train" / "index.json", tuple(COUNTS), 9, 3, (), ("train/002", "train/004"), ()
    )
    expected = [row for archive in COUNTS for row in iter_rows(stage_dir.data(archive))]
    found = streamed(stage_dir.path / "train")
    assert [row["key"] for row in found] == [row["key"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert (row["caption"], row["width"], row["height"]) == (other["caption"], other["width"], other["height"])
        assert row["jpg"].size == (row["width"], row["height"])


def test_the_reference_reads_latents_through_it(tmp_path: Path, publish_latents: Callable[..., Ledger]) -> None:
    stage_dir = DataRoot(tmp_path).latents("jdb", "tiny")
    for archive, count in COUNTS.items():
        ledger = publish_latents(stage_dir, archive, count)
    merge(stage_dir, ledger.settings)
    found = streamed(stage_dir.path / "train")
    assert [row["key"] for row in found] == [f"{a}/{n}" for a, count in COUNTS.items() for n in range(count)]
    for row in found:
        for column, shape in LATENT_SHAPES.items():
            assert np.isfinite(np.frombuffer(row[column], dtype=np.float16).reshape(shape)).all()


def test_what_a_reader_needs_to_know_is_in_it(tmp_path: Path, publish_latents: Callable[..., Ledger]) -> None:
    stage_dir = DataRoot(tmp_path).latents("jdb", "tiny")
    ledger = publish_latents(stage_dir, "train/000")
    index = json.loads(merge(stage_dir, ledger.settings).path.read_bytes())
    said = {"dataset": "jdb", "stage": "latents", "fingerprint": ledger.fingerprint, "samples": 3, "archives": 1}
    assert index[METADATA_KEY] == {**said, **LAYOUT}
    assert index["version"] == 2
    assert [shard["raw_data"]["basename"] for shard in index["shards"]] == ["000/shard.00000.mds"]


def test_a_dataset_without_splits_has_one_at_the_top(tmp_path: Path, publish_mds: Any, mds_rows: Any) -> None:
    publish_mds(DataRoot(tmp_path), "cc12m", "cc12m-train-0000", mds_rows("cc12m-train-0000", 2))
    stage_dir = DataRoot(tmp_path).mds("cc12m")
    merged = merge_indexes(stage_dir, "", ["cc12m-train-0000"], SETTINGS)
    assert merged is not None and merged.path == stage_dir.path / "index.json"
    assert len(streamed(stage_dir.path)) == 2


def test_stale_missing_and_empty_ones_are_left_out_and_listed(
    stage_dir: StageDir, publish_mds: Any, mds_rows: Any
) -> None:
    root = DataRoot(stage_dir.path.parents[1])
    publish_mds(root, "jdb", "train/001", mds_rows("train/001", 2), ImageSettings(jpeg_quality=90))
    publish_mds(root, "jdb", "train/004", [])
    merged = merge(stage_dir)
    assert merged.archives == ("train/000", "train/003") and (merged.samples, merged.shards) == (7, 2)
    assert (merged.stale, merged.missing, merged.empty) == (("train/001",), ("train/002",), ("train/004",))
    assert [row["key"][:9] for row in streamed(stage_dir.path / "train")] == ["train/000"] * 3 + ["train/003"] * 4
    assert merge(stage_dir, mds_settings(SPEC, ImageSettings(jpeg_quality=90))).archives == ("train/001",)


def test_nothing_is_written_where_nothing_can_be_merged(tmp_path: Path, publish_mds: Any) -> None:
    stage_dir = DataRoot(tmp_path).mds("jdb")
    assert merge_indexes(stage_dir, "train", ARCHIVES, SETTINGS) is None
    assert not stage_dir.path.exists()
    publish_mds(DataRoot(tmp_path), "jdb", "train/000", [])
    assert merge_indexes(stage_dir, "train", ARCHIVES, SETTINGS) is None
    assert merge_indexes(stage_dir, "train", ARCHIVES, {"other": 1}) is None
    assert sorted(p.name for p in (stage_dir.path / "train").iterdir()) == ["000", "000.json"]


def test_data_without_a_ledger_do_not_exist(stage_dir: StageDir) -> None:
    stage_dir.ledger("train/001").unlink()
    assert merge(stage_dir).archives == ("train/000", "train/003")


def edit_index(stage_dir: StageDir, edit: Callable[[dict[str, Any]], Any], ledgered: bool = False) -> None:
    """Change an archive's own index; with `ledgered`, its ledger agrees."""
    path = stage_dir.data("train/001") / INDEX_NAME
    index = json.loads(path.read_bytes())
    edit(index)
    path.write_text(json.dumps(index))
    if ledgered:
        ledger = read_ledger(stage_dir.ledger("train/001"))
        assert ledger is not None
        files = (*ledger.files[:-1], output_file(path, "train/001/index.json"))
        stage_dir.ledger("train/001").write_text(replace(ledger, files=files).to_json())


def same_size_edit(stage_dir: StageDir) -> None:
    path = stage_dir.data("train/001") / INDEX_NAME
    path.write_bytes(path.read_bytes().replace(b'"samples": 2', b'"samples": 3'))


def recount(stage_dir: StageDir) -> None:
    ledger = read_ledger(stage_dir.ledger("train/001"))
    assert ledger is not None
    stage_dir.ledger("train/001").write_text(replace(ledger, kept=5, read=5).to_json())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: (d.data("train/001") / "shard.00000.mds").unlink(), "missing or cut off"),
        (lambda d: cut(d.data("train/001") / "shard.00000.mds"), "missing or cut off"),
        (lambda d: shutil.rmtree(d.data("train/001")), "missing or cut off"),
        (lambda d: (d.data("train/001") / INDEX_NAME).unlink(), "missing or cut off"),
        (lambda d: d.ledger("train/001").write_text("{}"), "its ledger is damaged"),
        (same_size_edit, "its index was edited after it was written"),
        (lambda d: edit_index(d, lambda i: i["shards"][0].update(samples=9), True), "lists 9 samples, its ledger 2"),
        (lambda d: edit_index(d, lambda i: i["shards"].clear(), True), "lists 0 samples, its ledger 2"),
        (
            lambda d: edit_index(d, lambda i: i["shards"][0]["raw_data"].update(basename="../x.mds"), True),
            "shard ../x.mds is not in its ledger",
        ),
        (
            lambda d: edit_index(d, lambda i: i["shards"][0]["raw_data"].update(bytes=7), True),
            "shard.00000.mds is not in its ledger with 7 bytes",
        ),
        (recount, "its index lists 2 samples, its ledger 5"),
    ],
    ids=["no shard", "cut", "no data", "no index", "ledger", "edited", "samples", "none", "basename", "bytes", "kept"],
)
def test_an_archive_that_is_not_what_its_ledger_says_is_refused(
    stage_dir: StageDir, spoil: Callable[[StageDir], Any], says: str
) -> None:
    before = merge(stage_dir).path.read_bytes()
    spoil(stage_dir)
    with pytest.raises(MdAssetsError) as caught:
        merge(stage_dir)
    assert caught.value.what.startswith("jdb train/001: ") and says in caught.value.what
    assert str(stage_dir.ledger("train/001")) in caught.value.remedy and "materialize jdb/mds" in caught.value.remedy
    assert (stage_dir.path / "train" / "index.json").read_bytes() == before
    assert not list(stage_dir.path.rglob(".*"))


@pytest.mark.parametrize(
    "details",
    [{**LAYOUT, "dtype": "float32"}, {**LAYOUT, "caption_latents": [1, 3, 5]}, {}],
    ids=["dtype", "shape", ""],
)
def test_arrays_of_other_shapes_are_not_merged(
    tmp_path: Path, publish_latents: Callable[..., Ledger], details: dict[str, Any]
) -> None:
    stage_dir = DataRoot(tmp_path).latents("jdb", "tiny")
    settings = publish_latents(stage_dir, "train/000").settings
    before = merge(stage_dir, settings).path.read_bytes()
    publish_latents(stage_dir, "train/001", details=details)
    with pytest.raises(MdAssetsError, match=r"jdb train/001: its arrays are .*, not .*Materialize the latents"):
        merge(stage_dir, settings)
    assert (stage_dir.path / "train" / "index.json").read_bytes() == before


def test_the_same_archives_give_the_same_bytes_and_leave_nothing_else(stage_dir: StageDir) -> None:
    path = merge(stage_dir).path
    first, inode = path.read_bytes(), path.stat().st_ino
    assert merge(stage_dir).path.read_bytes() == first
    assert path.stat().st_ino != inode  # another file in its place, not the same one rewritten
    assert sorted(p.name for p in path.parent.iterdir() if p.is_file()) == [
        "000.json", "001.json", "003.json", "index.json"
    ]  # fmt: skip
    assert not list(stage_dir.path.rglob(".*"))


def test_readers_see_the_old_or_the_new_one(stage_dir: StageDir, publish_mds: Any, mds_rows: Any) -> None:
    path = merge(stage_dir).path
    seen: set[int] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(json.loads(path.read_bytes())[METADATA_KEY]["samples"])

    reader = threading.Thread(target=read)
    reader.start()
    publish_mds(DataRoot(stage_dir.path.parents[1]), "jdb", "train/002", mds_rows("train/002", 5))
    for _ in range(20):
        merge(stage_dir)
    done.set()
    reader.join(10)
    assert seen <= {9, 14} and 14 in seen


def test_several_merges_at_once(stage_dir: StageDir) -> None:
    merged: list[MergedIndex] = []
    threads = [threading.Thread(target=lambda: merged.append(merge(stage_dir))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(merged) == 4 and len(set(merged)) == 1
    index = json.loads(merged[0].path.read_bytes())
    assert index[METADATA_KEY]["fingerprint"] == fingerprint(SETTINGS)


def prune(stage_dir: StageDir, archive: str) -> None:
    """As `stages.prune` leaves an archive."""
    ledger = read_ledger(stage_dir.ledger(archive))
    assert ledger is not None
    stage_dir.ledger(archive).write_text(replace(ledger, pruned=Pruned("2026-11-22", 1)).to_json())
    shutil.rmtree(stage_dir.data(archive))


def test_pruned_archives_are_left_out_and_listed(stage_dir: StageDir) -> None:
    prune(stage_dir, "train/001")
    merged = merge(stage_dir)
    assert (merged.archives, merged.pruned) == (("train/000", "train/003"), ("train/001",))
    assert merged.missing == ("train/002", "train/004")


def test_archives_are_dropped_from_an_index_and_the_rest_stays_as_it_is(stage_dir: StageDir) -> None:
    path = merge(stage_dir).path
    before = json.loads(path.read_bytes())
    assert drop_from_index(stage_dir, "train", ["train/001", "train/002"]) == 1
    after = json.loads(path.read_bytes())
    assert after["shards"] == [before["shards"][0], before["shards"][2]]
    assert after[METADATA_KEY] == {**before[METADATA_KEY], "samples": 7, "archives": 2}
    stage_dir.ledger("train/001").unlink()
    assert merge(stage_dir).path.read_bytes() == json.dumps(after, sort_keys=True).encode()


def test_dropping_what_is_not_in_an_index_writes_nothing(stage_dir: StageDir) -> None:
    path = merge(stage_dir).path
    before = path.stat().st_ino, path.stat().st_mtime_ns
    assert drop_from_index(stage_dir, "train", ["train/002"]) == 0
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    assert drop_from_index(stage_dir, "valid", ["valid/000"]) == 0
    assert not stage_dir.index("valid").exists()


def test_an_index_with_nothing_left_is_removed(stage_dir: StageDir) -> None:
    path = merge(stage_dir).path
    assert drop_from_index(stage_dir, "train", list(COUNTS)) == 3
    assert not path.exists() and not list(stage_dir.path.rglob(".*"))


def test_of_a_dataset_without_splits_too(tmp_path: Path, publish_mds: Any, mds_rows: Any) -> None:
    stage_dir = DataRoot(tmp_path).mds("cc12m")
    for archive in ("cc12m-train-0000", "cc12m-train-0001"):
        publish_mds(DataRoot(tmp_path), "cc12m", archive, mds_rows(archive, 2))
    merged = merge_indexes(stage_dir, "", ["cc12m-train-0000", "cc12m-train-0001"], SETTINGS)
    assert merged is not None and drop_from_index(stage_dir, "", ["cc12m-train-0000"]) == 1
    assert [row["key"][:16] for row in iter_rows(stage_dir.path)] == ["cc12m-train-0001"] * 2


@pytest.mark.parametrize("text", ["{", "[]", '{"shards": 3}', '{"shards": [{}]}'])
def test_an_index_that_cannot_be_read_is_left_and_named(stage_dir: StageDir, text: str) -> None:
    path = merge(stage_dir).path
    path.write_text(text)
    with pytest.raises(MdAssetsError, match=r"index\.json is no merged index: .*Delete it"):
        drop_from_index(stage_dir, "train", ["train/000"])
    assert path.read_text() == text
