"""verify: what can be said of a published archive by reading it again.

Here: the checks, each of which reads the disk and trusts no writer. Not here: when they run and where their
results are shown, see `orchestration.checks`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from md_assets.core.errors import MdAssetsError, one_line
from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.schema import ITEM_BYTES, latents_column
from md_assets.core.spec import DatasetSpec
from md_assets.core.verdict import Verdict, checks_of
from md_assets.stages.index import METADATA_KEY, archive_folder
from md_assets.stages.status import INDEXED_STAGES, stages_of
from md_assets.storage.latent_arrays import stored_shape
from md_assets.storage.mds import INDEX_NAME, ledgered_files, row_count, spread_rows, verify_shards
from md_assets.storage.publish import output_file, read_ledger

CAPTION_ERROR_LIMIT = 0.1
"""‖h - h'‖ / ‖h'‖ of a caption's states stored and computed again: about 1 for another caption's, 0.01 for bfloat16 in
batches of other sizes."""

ROWS_SAMPLED = 64
"""Rows of a latents archive that `latents_valid` decodes, spread evenly; reading all would cost as much as writing."""


def verify_dataset(spec: DatasetSpec, root: DataRoot) -> Iterator[tuple[str, str, Verdict]]:
    """The verdicts on everything of a dataset that has a ledger, and on its merged indexes; reads every byte.

    Returns: (directory of the stage, archive or file, verdict).
    """
    for source in spec.annotations:
        yield from _on_file(root.annotations(spec.slug), source.name)
    for extra in spec.raw_only:
        yield from _on_file(root.raw(spec.slug), extra.name)
    for stage_dir, upstream in stages_of(root, spec):
        place = f"{spec.slug}/{stage_dir.path.name}"
        for archive in spec.archives:
            # By its ledger's file alone: what readers pass over as damaged is just what is to be found.
            if stage_dir.ledger(archive).exists():
                for verdict in verify_archive(stage_dir, upstream, archive):
                    yield place, archive, verdict
        for split in spec.splits or ("",):
            if stage_dir.stage in INDEXED_STAGES and stage_dir.index(split).exists():
                archives = [archive for archive in spec.archives if spec.split_of(archive) == split]
                name = stage_dir.index(split).relative_to(stage_dir.path).as_posix()
                yield place, name, index_agrees(stage_dir, split, archives)


def _on_file(stage_dir: StageDir, name: str) -> Iterator[tuple[str, str, Verdict]]:
    """The verdicts on something that is no archive: a caption index, a file that is only fetched."""
    if stage_dir.ledger(name).exists():
        for verdict in (counts_balance(stage_dir, name, None), file_intact("file_intact", stage_dir, name)):
            yield f"{stage_dir.dataset}/{stage_dir.path.name}", name, verdict


def verify_archive(
    stage_dir: StageDir, upstream: StageDir | None, archive: str, *, read_all: bool = True
) -> Iterator[Verdict]:
    """The verdicts of all checks of a stage on one published archive, in the order of `core.verdict.checks_of`.

    Of a pruned archive the counts are checked like any other's, and that its data are gone.

    Args:
        stage_dir: where the archive is published.
        upstream: the stage whose kept samples were read here; None for raw.
        archive: its ID.
        read_all: whether every byte is read and hashed. Otherwise files are compared by their size, which finds
            what is missing or cut at a thousandth of the cost.
    """
    for name in checks_of(stage_dir.stage, stage_dir.subset):
        if name == "counts_balance":
            yield counts_balance(stage_dir, archive, upstream)
        elif name == "latents_valid":
            yield latents_valid(stage_dir, archive)
        elif read_all:
            yield (tar_intact if name == "tar_intact" else shards_intact)(stage_dir, archive)
        else:
            yield files_present(name, stage_dir, archive)


def counts_balance(stage_dir: StageDir, archive: str, upstream: StageDir | None) -> Verdict:
    """Every sample read is kept or rejected, and as many were read as upstream kept; in the whole dataset, not all
    are rejected, while an archive may well have nothing of a subset."""

    def check(ledger: Ledger) -> Verdict:
        facts = {"read": ledger.read, "kept": ledger.kept, "rejected": ledger.rejected_count}
        if not ledger.balances:
            return Verdict(
                "counts_balance",
                False,
                f"{ledger.read} read, but {ledger.kept} kept + {ledger.rejected_count} rejected",
                facts,
            )
        if upstream is not None:
            kept_upstream = _ledger(upstream, archive).kept
            facts["kept_upstream"] = kept_upstream
            if kept_upstream != ledger.read:
                return Verdict(
                    "counts_balance",
                    False,
                    f"{upstream.asset} kept {kept_upstream}, here {ledger.read} were read",
                    facts,
                )
        if ledger.kept == 0 and stage_dir.subset:
            what = f"none of {ledger.read} samples is in the subset {stage_dir.subset}"
            return Verdict("counts_balance", True, what, facts)
        if ledger.kept == 0:
            return Verdict("counts_balance", False, f"no sample is kept, of {ledger.read} that were read", facts)
        return Verdict(
            "counts_balance", True, f"{ledger.read} read = {ledger.kept} kept + {ledger.rejected_count} rejected", facts
        )

    return _checked("counts_balance", stage_dir, archive, check)


def files_present(name: str, stage_dir: StageDir, archive: str) -> Verdict:
    """Every ledgered file is there with its size; given as the verdict of check `name`, without reading contents."""

    def check(ledger: Ledger) -> Verdict:
        if fault := size_fault(stage_dir, ledger):
            return Verdict(name, False, fault)
        return Verdict(name, True, f"{len(ledger.files)} files have their sizes; hashes were not read again")

    return _checked(name, stage_dir, archive, check)


def size_fault(stage_dir: StageDir, ledger: Ledger) -> str | None:
    """The first of the ledgered files that is not there with its size, None if all are."""
    for file in ledger.files:
        path = stage_dir.path / file.path
        found = path.stat().st_size if path.is_file() else None
        if found != file.bytes:
            what = "is missing" if found is None else f"has {found} bytes, its ledger says {file.bytes}"
            return f"{path} {what}"
    return None


def tar_intact(stage_dir: StageDir, archive: str) -> Verdict:
    """The raw tar has the size and the hash of its ledger."""
    return file_intact("tar_intact", stage_dir, archive)


def file_intact(name: str, stage_dir: StageDir, archive: str) -> Verdict:
    """The one published file has the size and the hash of its ledger; given as the verdict of check `name`."""

    def check(ledger: Ledger) -> Verdict:
        (expected,) = ledger.files
        found = output_file(stage_dir.path / expected.path, expected.path)
        said = f"{found.bytes} bytes, sha256 {found.sha256[:16]}…"
        if found != expected:
            said += f"; its ledger says {expected.bytes} bytes, sha256 {expected.sha256[:16]}…"
        return Verdict(name, found == expected, said, {"bytes": found.bytes})

    return _checked(name, stage_dir, archive, check)


def shards_intact(stage_dir: StageDir, archive: str) -> Verdict:
    """Every shard of the index is there with its size, rows and hash, and index and shards are those of the ledger."""

    def check(ledger: Ledger) -> Verdict:
        rows = verify_shards(stage_dir.data(archive))
        facts = {"rows": rows, "files": len(ledger.files), "bytes": ledger.bytes_out}
        if rows != ledger.kept:
            return Verdict("shards_intact", False, f"{rows} rows in the shards, {ledger.kept} in the ledger", facts)
        if ledgered_files(stage_dir.data(archive), archive) != ledger.files:
            return Verdict("shards_intact", False, "shards and index agree, but are not those of the ledger", facts)
        return Verdict("shards_intact", True, f"{rows} rows, {ledger.bytes_out} bytes, hashes agree", facts)

    return _checked("shards_intact", stage_dir, archive, check)


def latents_valid(stage_dir: StageDir, archive: str) -> Verdict:
    """A sample of rows has the shapes and the element type that the ledger promises, all values finite."""

    def check(ledger: Ledger) -> Verdict:
        dtype, shapes = ledger.details["dtype"], promised_shapes(ledger)
        text_storage = ledger.details.get("text_storage", "full")
        rows = row_count(stage_dir.data(archive))
        if rows != ledger.kept:
            return Verdict("latents_valid", False, f"{rows} rows in the index, {ledger.kept} in the ledger")
        sampled = 0
        for row in spread_rows(stage_dir.data(archive), ROWS_SAMPLED):
            if fault := latents_fault(row, shapes, dtype, text_storage):
                return Verdict("latents_valid", False, f"sample {row.get('key')}: {fault}")
            sampled += 1
        facts, differs = _round_trip(ledger.details.get("round_trip", {}))
        if differs:
            return Verdict("latents_valid", False, differs, facts)
        return Verdict(
            "latents_valid",
            True,
            f"{rows} rows, {sampled} of them decoded: shapes, {dtype} and finite values as promised",
            {"rows": rows, "rows_decoded": sampled, **facts},
        )

    return _checked("latents_valid", stage_dir, archive, check)


def _round_trip(details: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What the encoding process found when it decoded some rows and computed their captions again
    (`encoders.round_trip`), as facts, and what is wrong with it."""
    facts = {f"psnr_db_{px}": min(values) for px, values in details.get("psnr_db", {}).items() if values}
    worst, key = max(zip(details.get("caption_error", []), details.get("keys", []), strict=True), default=(None, ""))
    if worst is None:
        return facts, ""
    fault = f"sample {key}: its caption's states differ by {worst:.0%} when they are computed again"
    return {**facts, "caption_error": worst}, fault if worst > CAPTION_ERROR_LIMIT else ""


def promised_shapes(ledger: Ledger) -> dict[str, tuple[int, ...]]:
    """Column -> shape of the arrays in each row, as a latents ledger has it.

    Raises:
        KeyError, TypeError, ValueError: it has them not.
    """
    shapes = {"caption_latents": tuple(ledger.details["caption_latents"])}
    return shapes | {latents_column(int(px)): tuple(shape) for px, shape in ledger.details["image_latents"].items()}


def latents_fault(
    row: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str, text_storage: str = "full"
) -> str | None:
    """What is wrong with the arrays of a row: bytes that `shapes` (of `promised_shapes`) do not give, values that are
    not finite; None where nothing is."""
    for column, whole in shapes.items():
        data = row.get(column)
        try:
            shape = stored_shape(row, column, whole, text_storage)
        except (KeyError, ValueError) as error:
            return f"{column}: {f'there is no {error}' if isinstance(error, KeyError) else error}"
        expected_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        if not isinstance(data, bytes) or len(data) != expected_bytes:
            return f"{column} has {len(data) if data else 0} bytes, {shape} in {dtype} are {expected_bytes}"
        if not np.isfinite(np.frombuffer(data, dtype)).all():
            return f"{column} has values that are not finite"
    return None


def index_agrees(stage_dir: StageDir, split: str, archives: Sequence[str]) -> Verdict:
    """A merged index lists, in order, whole archives whose ledgers have its settings, with their shards and rows.

    Args:
        stage_dir: whose index.
        split: empty for a dataset without splits.
        archives: all IDs of the split, in upstream's order.
    """
    name = "index_agrees"
    path = stage_dir.index(split)
    try:
        index = json.loads(path.read_bytes())
        said, shards = index[METADATA_KEY], index["shards"]
        listed: dict[str, list[Mapping[str, Any]]] = {}
        for shard in shards:
            listed.setdefault(archive_folder(shard), []).append(shard)
        in_split = {archive.removeprefix(f"{split}/") if split else archive: archive for archive in archives}
        if list(listed) != [folder for folder in in_split if folder in listed]:
            return Verdict(name, False, "it lists what is no archive, or archives out of order")
        for folder, of_archive in listed.items():
            archive = in_split[folder]
            if fault := listing_fault(stage_dir, _ledger(stage_dir, archive), of_archive, said["fingerprint"]):
                return Verdict(name, False, f"it lists {archive}: {fault}")
        samples = sum(shard["samples"] for shard in shards)
        if (said["samples"], said["archives"]) != (samples, len(listed)):
            what = f"it says {said['samples']} samples of {said['archives']} archives"
            return Verdict(name, False, f"{what}, and lists {samples} of {len(listed)}")
    except KeyError as error:
        return Verdict(name, False, one_line(f"{path} has no {error}"))
    except (MdAssetsError, OSError, AttributeError, TypeError, ValueError) as error:
        return Verdict(name, False, one_line(str(error)))
    facts = {"archives": len(listed), "samples": samples, "shards": len(shards)}
    return Verdict(name, True, f"{samples} samples in {len(shards)} shards of {len(listed)} archives", facts)


def listing_fault(
    stage_dir: StageDir, ledger: Ledger, shards: Sequence[Mapping[str, Any]], fingerprint: str
) -> str | None:
    """What is wrong with the `shards` that a merged index lists of an archive, whose ledger is given."""
    archive = ledger.archive
    if ledger.pruned:
        return "it was pruned"
    if ledger.fingerprint != fingerprint:
        return "it was made with other settings than the index says"
    found = set()
    for shard in shards:
        raw = shard["raw_data"]
        path = stage_dir.data(archive) / str(raw["basename"]).rpartition("/")[2]
        found.add((f"{archive}/{path.name}", raw["bytes"], raw["hashes"]["sha256"]))
        if not path.is_file() or path.stat().st_size != raw["bytes"]:
            return f"{path} is missing or cut off"
    if found != {(f.path, f.bytes, f.sha256) for f in ledger.files if not f.path.endswith(f"/{INDEX_NAME}")}:
        return "its shards are not those of the ledger"
    if (rows := sum(shard["samples"] for shard in shards)) != ledger.kept:
        return f"{rows} rows, {ledger.kept} in the ledger"
    return None


def _checked(name: str, stage_dir: StageDir, archive: str, check: Callable[[Ledger], Verdict]) -> Verdict:
    try:
        ledger = _ledger(stage_dir, archive)
        return _gone(name, stage_dir, ledger) if ledger.pruned and name != "counts_balance" else check(ledger)
    except KeyError as error:
        return Verdict(name, False, one_line(f"{error} is not in the ledger's details"))
    except (MdAssetsError, OSError, AttributeError, TypeError, ValueError, struct.error) as error:
        return Verdict(name, False, one_line(str(error)))


def _gone(name: str, stage_dir: StageDir, ledger: Ledger) -> Verdict:
    """The data of a pruned archive are gone; given as the verdict of check `name`."""
    assert ledger.pruned is not None
    pruned = f"pruned on {ledger.pruned.at}, {ledger.pruned.bytes_freed} bytes"
    if (path := stage_dir.data(ledger.archive)).exists():
        return Verdict(name, False, f"{pruned}, but {path} is still there. Run md-assets prune again")
    return Verdict(name, True, pruned)


def _ledger(stage_dir: StageDir, archive: str) -> Ledger:
    ledger = read_ledger(stage_dir.ledger(archive))
    if ledger is None:
        raise MdAssetsError(f"{stage_dir.asset} is not published", "Materialize it")
    return ledger
