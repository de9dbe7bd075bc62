"""index: merge the indexes of published archives into the one that training reads.

Here: which archives go in, and that what goes in is there. Not here: an archive's own index (`storage.mds`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import Ledger
from md_assets.core.paths import StageDir
from md_assets.core.settings import fingerprint
from md_assets.stages.once import recorded
from md_assets.storage.mds import INDEX_NAME, INDEX_VERSION
from md_assets.storage.publish import fsync_directory, output_file, workspace, write_atomically

METADATA_KEY = "md_assets"
"""Top-level key of a merged index that holds what a reader needs to know; mosaicml-streaming passes it over."""


@dataclass(frozen=True)
class MergedIndex:
    """A merged index as it was written.

    Attributes:
        path: the file.
        archives: IDs that are in it, in order.
        samples, shards: what it lists.
        stale: archives that are published with other settings and were left out.
        missing: archives that are not published.
        empty: archives that are published without a sample, so they have no shard to list.
        pruned: archives whose data were removed on purpose.
    """

    path: Path
    archives: tuple[str, ...]
    samples: int
    shards: int
    stale: tuple[str, ...]
    missing: tuple[str, ...]
    empty: tuple[str, ...]
    pruned: tuple[str, ...] = ()


def merge_indexes(
    stage_dir: StageDir, split: str, archives: Sequence[str], settings: Mapping[str, Any]
) -> MergedIndex | None:
    """Write the merged index of one split of one stage.

    Args:
        stage_dir: of the mds or latents stage.
        split: empty for a dataset without splits.
        archives: all IDs of the split, in upstream's order, which is the order of the shards.
        settings: archives made with other settings are left out.

    Returns: what was written; None where no archive is published, and then nothing is written.

    Raises:
        MdAssetsError: an archive is not what its ledger says; the index that was there stays.
    """
    path = stage_dir.index(split)
    if not any(stage_dir.ledger(archive).exists() for archive in archives):
        return None
    with workspace(path) as own:  # before looking, so that of two merges the later one has seen more
        return _merge(stage_dir, split, archives, fingerprint(settings), own)


def _merge(
    stage_dir: StageDir, split: str, archives: Sequence[str], wanted: str, workspace_dir: Path
) -> MergedIndex | None:
    merged: list[Ledger] = []
    stale, missing, empty, pruned = [], [], [], []
    for archive in archives:
        ledger = _whole(stage_dir, archive)
        if ledger is None:
            missing.append(archive)
        elif ledger.pruned:
            pruned.append(archive)
        elif ledger.fingerprint != wanted:
            stale.append(archive)
        elif ledger.kept == 0:
            empty.append(archive)
        else:
            merged.append(ledger)
    if not merged:
        return None
    shards = [shard for ledger in merged for shard in _archive_shards(stage_dir, ledger, split)]
    samples = sum(ledger.kept for ledger in merged)
    index = {
        "version": INDEX_VERSION,
        "shards": shards,
        METADATA_KEY: {
            "dataset": stage_dir.dataset,
            "stage": stage_dir.asset,
            "fingerprint": wanted,
            "samples": samples,
            "archives": len(merged),
            **_common_layout(merged),
        },
    }
    path = stage_dir.index(split)
    write_atomically(path, json.dumps(index, sort_keys=True).encode(), workspace_dir)
    archive_ids = tuple(ledger.archive for ledger in merged)
    left_out = map(tuple, (stale, missing, empty, pruned))
    return MergedIndex(path, archive_ids, samples, len(shards), *left_out)


def drop_from_index(stage_dir: StageDir, split: str, archives: Collection[str]) -> int:
    """Take archives out of the merged index of a split; removes it when nothing is left in it.

    Args:
        stage_dir: of the mds or latents stage.
        split: empty for a dataset without splits.
        archives: IDs of the split whose ledgers no longer count, so that no merge lists them again.

    Returns: shards taken out.

    Raises:
        MdAssetsError: the index that is there cannot be read.
    """
    path = stage_dir.index(split)
    with workspace(path) as own:  # a merge that read the ledgers before is awaited
        if not path.exists():
            return 0
        folders = {_below_split(archive, split) for archive in archives}
        try:
            index = json.loads(path.read_bytes())
            kept = [shard for shard in index["shards"] if archive_folder(shard) not in folders]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MdAssetsError(
                f"{path} is no merged index: {error}", "Delete it; an index is merged again at any time"
            ) from error
        dropped = len(index["shards"]) - len(kept)
        if not kept:
            path.unlink()
            fsync_directory(path.parent)
        elif dropped:
            said = index.get(METADATA_KEY, {})
            said["samples"] = sum(shard["samples"] for shard in kept)
            said["archives"] = len({archive_folder(shard) for shard in kept})
            write_atomically(path, json.dumps({**index, "shards": kept}, sort_keys=True).encode(), own)
        return dropped


def archive_folder(shard: Mapping[str, Any]) -> str:
    """The archive of a merged index's shard, as its folder below the index."""
    return str(shard["raw_data"]["basename"]).rpartition("/")[0]


def _below_split(archive: str, split: str) -> str:
    return archive.removeprefix(f"{split}/") if split else archive


def _whole(stage_dir: StageDir, archive: str) -> Ledger | None:
    """The ledger of an archive whose data are all there or pruned, None where it is not published."""
    ledger = recorded(stage_dir, archive)
    if ledger is None and stage_dir.ledger(archive).exists():
        raise _disagrees(stage_dir, archive, "its ledger is damaged, or files that it names are missing or cut off")
    return ledger


def _archive_shards(stage_dir: StageDir, ledger: Ledger, split: str) -> list[dict[str, Any]]:
    """The archive's shards, named relative to the merged index, checked against its ledger."""
    index_path = stage_dir.data(ledger.archive) / INDEX_NAME
    if output_file(index_path, f"{ledger.archive}/{INDEX_NAME}") not in ledger.files:
        raise _disagrees(stage_dir, ledger.archive, "its index was edited after it was written")
    entries = json.loads(index_path.read_bytes())["shards"]
    ledgered = {file.path: file.bytes for file in ledger.files}
    below_split = _below_split(ledger.archive, split)
    for entry in entries:
        raw = entry["raw_data"]
        if ledgered.get(f"{ledger.archive}/{raw['basename']}") != raw["bytes"]:
            raise _disagrees(
                stage_dir, ledger.archive, f"shard {raw['basename']} is not in its ledger with {raw['bytes']} bytes"
            )
        raw["basename"] = f"{below_split}/{raw['basename']}"
    if (rows := sum(entry["samples"] for entry in entries)) != ledger.kept:
        what = f"its index lists {rows} samples, its ledger {ledger.kept}"
        raise _disagrees(stage_dir, ledger.archive, what)
    return entries  # type: ignore[no-any-return]


def _disagrees(stage_dir: StageDir, archive: str, what: str) -> MdAssetsError:
    return MdAssetsError(
        f"{stage_dir.dataset} {archive}: {what}",
        f"Delete {stage_dir.ledger(archive)} and materialize {stage_dir.dataset}/{stage_dir.asset} of it again",
    )


LAYOUT_DETAILS = ("caption_latents", "image_latents", "dtype", "latent_mode", "text_storage")
"""Details of a latents ledger that say how its arrays are shaped; all archives of one fingerprint agree."""


def _common_layout(ledgers: Sequence[Ledger]) -> dict[str, Any]:
    layouts = [{k: ledger.details[k] for k in LAYOUT_DETAILS if k in ledger.details} for ledger in ledgers]
    for ledger, layout in zip(ledgers, layouts, strict=True):
        if layout != layouts[0]:
            raise MdAssetsError(
                f"{ledger.dataset} {ledger.archive}: its arrays are {layout}, not {layouts[0]}",
                "Materialize the latents of one of them again",
            )
    return layouts[0]
