"""Verifying a whole dataset: every stage, caption indexes, merged indexes, what is only fetched and what was pruned."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.ledger import Pruned
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings, latents_settings, mds_settings, subset_settings
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages.index import METADATA_KEY, merge_indexes
from md_assets.stages.verify import counts_balance, index_agrees, verify_archive, verify_dataset
from md_assets_tests.stages.conftest import JourneyDb
from md_assets_tests.stages.made_chain import (
    ENCODERS,
    SIZES,
    TAG,
    ledger_of,
    merge_jdb_mds,
    publish_chain,
    publish_jdb,
)

TRAIN = ("train/000", "train/001")
CC = "cc12m-train-0000"


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    """Three archives of jdb in all stages, with merged indexes of mds."""
    publish_jdb(DataRoot(tmp_path))
    return DataRoot(tmp_path)


def failed(root: DataRoot, spec: Any = JDB) -> dict[tuple[str, str, str], str]:
    return {(p, name, v.check): v.what for p, name, v in verify_dataset(spec, root) if not v.passed}


def test_all_archives_and_merged_indexes_are_verified(root: DataRoot) -> None:
    verdicts = list(verify_dataset(JDB, root))
    assert all(verdict.passed for _, _, verdict in verdicts), verdicts
    latents = f"jdb/mds_latents_{TAG}"
    assert Counter(place for place, _, _ in verdicts) == {"jdb/raw": 6, "jdb/mds": 6 + 2, latents: 9}
    merged = {name: v for place, name, v in verdicts if v.check == "index_agrees"}
    assert list(merged) == ["train/index.json", "valid/index.json"]
    assert merged["train/index.json"].facts == {"archives": 2, "samples": 2 * len(SIZES), "shards": 2}


def test_subsets_and_their_indexes_too(tmp_path: Path) -> None:
    root = DataRoot(tmp_path)
    publish_chain(root, CC12M, CC)
    subset = CC12M.subsets[0]
    mds = mds_settings(CC12M, ImageSettings())
    merge_indexes(root.mds("cc12m", subset.name), "", [CC], subset_settings(mds, subset))
    latents = subset_settings(latents_settings(mds, ENCODERS), subset)
    merge_indexes(root.latents("cc12m", TAG, subset.name), "", [CC], latents)
    verdicts = list(verify_dataset(CC12M, root))
    assert all(verdict.passed for _, _, verdict in verdicts), verdicts
    assert Counter(place for place, _, _ in verdicts) == {
        "cc12m/raw": 2,
        "cc12m/mds": 2,
        "cc12m/mds_minres512": 3,
        f"cc12m/mds_latents_{TAG}": 3,
        f"cc12m/mds_minres512_latents_{TAG}": 4,
    }


def test_caption_indexes_are_compared_with_their_ledgers(ready: JourneyDb) -> None:
    verdicts = [
        v for place, name, v in verify_dataset(JDB, ready.root) if (place, name) == ("jdb/annotations", "train")
    ]
    assert [verdict.check for verdict in verdicts] == ["counts_balance", "file_intact"]
    assert all(verdict.passed for verdict in verdicts), verdicts
    path = ready.dir("annotations").data("train")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert list(failed(ready.root)) == [("jdb/annotations", "train", "file_intact")]
    path.unlink()
    assert "No such file" in failed(ready.root)["jdb/annotations", "train", "file_intact"]


def test_what_is_only_fetched_is_compared_with_its_ledger(root: DataRoot) -> None:
    name = JDB.raw_only[0].name
    ledger = ledger_of(root.raw("jdb"), "train/000")
    place = root.raw("jdb").path / f"{name}.jsonl"
    place.parent.mkdir()
    place.write_bytes(root.raw("jdb").data("train/000").read_bytes())
    files = (replace(ledger.files[0], path=f"{name}.jsonl"),)
    root.raw("jdb").ledger(name).write_text(replace(ledger, archive=name, files=files).to_json())
    assert failed(root) == {}
    place.write_bytes(b"other")
    assert list(failed(root)) == [("jdb/raw", name, "file_intact")]


def edit(root: DataRoot, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the merged index of train."""
    path = root.mds("jdb").index("train")
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))


def rewrite(root: DataRoot, **changes: Any) -> None:
    """Change the mds ledger of train/001."""
    stage_dir = root.mds("jdb")
    stage_dir.ledger("train/001").write_text(replace(ledger_of(stage_dir, "train/001"), **changes).to_json())


def shard(index: dict[str, Any], number: int) -> Any:
    return index["shards"][number]["raw_data"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: r.mds("jdb").ledger("train/001").unlink(), "mds is not published"),
        (lambda r: rewrite(r, settings={"other": 1}), "train/001: it was made with other settings than the index says"),
        (lambda r: rewrite(r, pruned=Pruned("2026-11-22", 1)), "it lists train/001: it was pruned"),
        (lambda r: rewrite(r, kept=9, read=9), "it lists train/001: 4 rows, 9 in the ledger"),
        (lambda r: (r.mds("jdb").data("train/001") / "shard.00000.mds").unlink(), "is missing or cut off"),
        (lambda r: edit(r, lambda i: shard(i, 1).update(bytes=7)), "is missing or cut off"),
        (lambda r: edit(r, lambda i: shard(i, 1)["hashes"].update(sha256="0")), "its shards are not those of the"),
        (lambda r: edit(r, lambda i: i["shards"].reverse()), "archives out of order"),
        (lambda r: edit(r, lambda i: shard(i, 1).update(basename="999/shard.00000.mds")), "lists what is no archive"),
        (lambda r: edit(r, lambda i: i["shards"][1].update(samples=3)), "it lists train/001: 3 rows, 4 in the ledger"),
        (lambda r: edit(r, lambda i: i["shards"].pop()), "it says 8 samples of 2 archives, and lists 4 of 1"),
        (lambda r: edit(r, lambda i: i[METADATA_KEY].update(fingerprint="0")), "other settings than the index says"),
        (lambda r: edit(r, lambda i: i.pop(METADATA_KEY)), "has no 'md_assets'"),
        (lambda r: r.mds("jdb").index("train").write_text("{"), "Expecting property name"),
    ],
)
def test_a_merged_index_that_does_not_agree_with_ledgers_or_disk(
    root: DataRoot, spoil: Callable[[DataRoot], Any], says: str
) -> None:
    assert index_agrees(root.mds("jdb"), "train", TRAIN).passed
    spoil(root)
    verdict = index_agrees(root.mds("jdb"), "train", TRAIN)
    assert not verdict.passed and says in verdict.what and "\n" not in verdict.what
    assert ("jdb/mds", "train/index.json", "index_agrees") in failed(root)
    assert ("jdb/mds", "valid/index.json", "index_agrees") not in failed(root)


def test_an_archive_that_came_after_the_merge_is_no_fault(root: DataRoot) -> None:
    publish_chain(root, JDB, "train/002")
    assert index_agrees(root.mds("jdb"), "train", (*TRAIN, "train/002")).passed
    assert failed(root) == {}


def test_pruned_archives_pass_when_their_data_are_gone(root: DataRoot) -> None:
    raw = root.raw("jdb")
    ledger = replace(ledger_of(raw, "train/000"), pruned=Pruned("2026-11-22T10:00:00+00:00", 1800))
    raw.ledger("train/000").write_text(ledger.to_json())
    counts, intact = verify_archive(raw, None, "train/000")
    assert counts.passed and not intact.passed
    assert intact.what.endswith(f"but {raw.data('train/000')} is still there. Run md-assets prune again")
    raw.data("train/000").unlink()
    for read_all in (True, False):
        counts, intact = verify_archive(raw, None, "train/000", read_all=read_all)
        assert counts.passed and intact.passed
        assert intact.what == "pruned on 2026-11-22T10:00:00+00:00, 1800 bytes"
    assert counts_balance(root.mds("jdb"), "train/000", raw).passed


def test_nothing_published_is_nothing_to_verify(tmp_path: Path) -> None:
    assert list(verify_dataset(JDB, DataRoot(tmp_path / "none"))) == []


def test_merging_again_mends_the_index(root: DataRoot) -> None:
    edit(root, lambda index: index["shards"].pop())
    assert failed(root)
    merge_jdb_mds(root, "train")
    assert failed(root) == {}
