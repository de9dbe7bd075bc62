"""Subsets: which rows are selected, that they are copied as they are, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.settings import ImageSettings, latents_settings, mds_settings, subset_settings
from md_assets.core.spec import Subset
from md_assets.datasets.cc12m import SPEC
from md_assets.stages.index import METADATA_KEY, merge_indexes
from md_assets.stages.once import Outcome
from md_assets.stages.subset import select_archive
from md_assets.stages.verify import verify_archive
from md_assets.storage.mds import ShardReader, iter_rows, read_index, row_count
from md_assets.storage.publish import read_ledger
from md_assets_tests.stages.conftest import LAYOUT
from md_assets_tests.stages.made_chain import (
    ENCODERS,
    SIZES,
    TAG,
    mds_rows,
    publish_chain,
    publish_raw,
    publish_shards,
)

SUBSET = Subset("minres512", 512)
ARCHIVE = "cc12m-train-0000"
MDS = mds_settings(SPEC, ImageSettings())
LATENTS = latents_settings(MDS, ENCODERS)
KEYS = [f"{ARCHIVE}/0", f"{ARCHIVE}/2"]
"""Of the rows whose smaller edge is 512 or more."""


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    """One archive in raw, mds and latents."""
    publish_chain(DataRoot(tmp_path), SPEC, ARCHIVE, subsets=False)
    return DataRoot(tmp_path)


def select_mds(root: DataRoot, settings: Any = MDS, **options: Any) -> Outcome:
    return select_archive(SUBSET, ARCHIVE, root.mds("cc12m"), root.mds("cc12m", "minres512"), settings, **options)


def select_latents(root: DataRoot) -> Outcome:
    dirs = root.latents("cc12m", TAG), root.latents("cc12m", TAG, "minres512")
    return select_archive(SUBSET, ARCHIVE, *dirs, LATENTS)


def stored_rows(stage_dir: StageDir) -> dict[str, bytes]:
    """Key -> the bytes of its row in the shard, lengths and all."""
    stored = {}
    for shard in read_index(stage_dir.data(ARCHIVE)):
        reader, data = ShardReader(shard), shard.path.read_bytes()
        for number in range(len(reader)):
            start, end = reader._offsets[number : number + 2]
            stored[reader[number]["key"]] = data[start:end]
    return stored


def test_rows_are_copied_byte_for_byte_in_order(root: DataRoot) -> None:
    assert not select_mds(root).passed_over and not select_latents(root).passed_over
    pairs = (
        (root.mds("cc12m"), root.mds("cc12m", "minres512")),
        (root.latents("cc12m", TAG), root.latents("cc12m", TAG, "minres512")),
    )
    for whole_dir, subset_dir in pairs:
        whole, part = stored_rows(whole_dir), stored_rows(subset_dir)
        assert list(part) == KEYS
        assert part == {key: whole[key] for key in KEYS}
        assert [s.columns for s in read_index(subset_dir.data(ARCHIVE))] == [
            s.columns for s in read_index(whole_dir.data(ARCHIVE))
        ]


def test_paths_are_those_of_the_contract(root: DataRoot) -> None:
    select_mds(root)
    select_latents(root)
    for folder in ("mds_minres512", f"mds_minres512_latents_{TAG}"):
        assert (root.path / "cc12m" / folder / ARCHIVE / "index.json").is_file()
        assert (root.path / "cc12m" / folder / f"{ARCHIVE}.json").is_file()


def test_the_ledger_balances_and_names_what_is_not_in_it(root: DataRoot) -> None:
    mds, latents = select_mds(root).ledger, select_latents(root).ledger
    upstream = [read_ledger(d.ledger(ARCHIVE)) for d in (root.mds("cc12m"), root.latents("cc12m", TAG))]
    for ledger, whole in zip((mds, latents), upstream, strict=True):
        assert whole is not None
        assert (ledger.read, ledger.kept) == (whole.kept, 2) == (4, 2)
        assert ledger.rejected == {"not_in_subset": [f"{ARCHIVE}/1", f"{ARCHIVE}/3"]}
        assert ledger.balances and ledger.stage == whole.stage and ledger.source == whole.source
        assert ledger.inputs == {whole.stage: whole.content_id} and ledger.bytes_in == whole.bytes_out
        assert ledger.settings == {**whole.settings, "subset": {"name": "minres512", "min_edge_px": 512}}
        assert ledger.fingerprint != whole.fingerprint
    assert mds.details == {} and latents.details == LAYOUT


def test_all_checks_pass(root: DataRoot) -> None:
    select_mds(root)
    select_latents(root)
    verdicts = [
        *verify_archive(root.mds("cc12m", "minres512"), root.mds("cc12m"), ARCHIVE),
        *verify_archive(root.latents("cc12m", TAG, "minres512"), root.latents("cc12m", TAG), ARCHIVE),
    ]
    assert [v.check for v in verdicts] == [
        "counts_balance", "shards_intact", "counts_balance", "shards_intact", "latents_valid"
    ]  # fmt: skip
    assert all(v.passed for v in verdicts), verdicts
    assert verdicts[0].facts == {"read": 4, "kept": 2, "rejected": 2, "kept_upstream": 4}


def test_the_same_is_done_once_and_gives_the_same_bytes(root: DataRoot) -> None:
    ledger = select_mds(root).ledger
    again = select_mds(root)
    assert again.passed_over and again.ledger == ledger
    root.mds("cc12m", "minres512").ledger(ARCHIVE).unlink()
    assert select_mds(root).ledger.files == ledger.files


def test_another_whole_is_selected_from_again(root: DataRoot) -> None:
    first = select_mds(root).ledger
    publish_chain(root, SPEC, ARCHIVE, ((800, 800),), subsets=False)
    again = select_mds(root)
    assert not again.passed_over and again.ledger.kept == 1
    assert again.ledger.inputs != first.inputs and again.ledger.fingerprint == first.fingerprint


@pytest.mark.parametrize("sizes", [((511, 2000), (300, 300)), ()], ids=["none in it", "none at all"])
def test_an_archive_without_a_row_is_published_merges_as_nothing_and_its_check_says_so(
    tmp_path: Path, sizes: tuple[tuple[int, int], ...]
) -> None:
    root = DataRoot(tmp_path)
    publish_chain(root, SPEC, ARCHIVE, sizes)
    subset_dir = root.mds("cc12m", "minres512")
    ledger = read_ledger(subset_dir.ledger(ARCHIVE))
    assert ledger is not None and (ledger.read, ledger.kept) == (len(sizes), 0)
    counts, intact = verify_archive(subset_dir, root.mds("cc12m"), ARCHIVE)
    assert counts.passed and counts.what == f"none of {len(sizes)} samples is in the subset minres512"
    assert intact.passed and row_count(subset_dir.data(ARCHIVE)) == 0
    assert merge_indexes(subset_dir, "", [ARCHIVE], ledger.settings) is None


def test_merged_indexes_list_the_subset(root: DataRoot) -> None:
    other = "cc12m-train-0001"
    publish_chain(root, SPEC, other, ((100, 100),))
    select_latents(root)
    subset_dir = root.latents("cc12m", TAG, "minres512")
    merged = merge_indexes(subset_dir, "", [ARCHIVE, other], subset_settings(LATENTS, SUBSET))
    assert merged is not None and merged.archives == (ARCHIVE,) and merged.empty == (other,)
    assert [row["key"] for row in iter_rows(subset_dir.path)] == KEYS
    said = json.loads(merged.path.read_bytes())[METADATA_KEY]
    assert said["stage"] == "latents_minres512" and said["caption_latents"] == LAYOUT["caption_latents"]
    assert merge_indexes(subset_dir, "", [ARCHIVE], LATENTS) is None  # the whole's settings are not the subset's


def refusal(root: DataRoot, settings: Any = MDS) -> str:
    with pytest.raises(ArchiveError, match=f"^cc12m {ARCHIVE}: ") as caught:
        select_mds(root, settings)
    assert not root.mds("cc12m", "minres512").ledger(ARCHIVE).exists()
    return str(caught.value)


def test_stored_images_that_are_too_small_to_tell_are_refused(tmp_path: Path) -> None:
    root, images = DataRoot(tmp_path), ImageSettings(max_image_size=400)
    publish_chain(root, SPEC, ARCHIVE, images=images, subsets=False)
    said = refusal(root, mds_settings(SPEC, images))
    assert "max_image_size 400 makes every stored image smaller than the 512 px" in said
    assert "Choose max_image_size >= 512" in said


def test_a_larger_max_image_size_tells_as_well(tmp_path: Path) -> None:
    root, images = DataRoot(tmp_path), ImageSettings(max_image_size=1024)
    publish_chain(root, SPEC, ARCHIVE, ((1024, 1100), (600, 512), (500, 1400)), images=images, subsets=False)
    assert select_mds(root, mds_settings(SPEC, images)).ledger.kept == 2


def test_a_whole_that_is_not_there_stale_or_damaged_is_refused(root: DataRoot) -> None:
    assert "mds was made with other settings. Materialize cc12m/mds of it" in refusal(root, {**MDS, "more": 1})
    shard = root.mds("cc12m").data(ARCHIVE) / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert f"{shard} does not hash to what its index says" in refusal(root)
    root.mds("cc12m").ledger(ARCHIVE).unlink()
    assert "mds is not published. Materialize cc12m/mds of it" in refusal(root)


def test_rows_are_selected_over_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md_assets.storage.mds.SHARD_SIZE_LIMIT_BYTES", 300)
    root = DataRoot(tmp_path)
    raw = publish_raw(root, SPEC, ARCHIVE, 12, ImageSettings())
    publish_shards(root.mds("cc12m"), ARCHIVE, mds_rows(ARCHIVE, SIZES * 3), raw, MDS)
    assert len(read_index(root.mds("cc12m").data(ARCHIVE))) > 3
    select_mds(root)
    keys = [row["key"] for row in iter_rows(root.mds("cc12m", "minres512").data(ARCHIVE))]
    assert keys == [f"{ARCHIVE}/{number}" for number in (0, 2, 4, 6, 8, 10)]


def test_progress_counts_rows(root: DataRoot) -> None:
    seen: list[Any] = []
    select_mds(root, report=seen.append)
    assert [(p.doing, p.done, p.total) for p in seen] == [("selects", n, 4) for n in (1, 2, 3, 4)]
