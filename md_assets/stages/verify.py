"""verify: what can be said of a published archive by reading it again.

Here: the checks, each of which reads the disk and trusts no writer. Not here: when they run and where their
results are shown, see `orchestration.checks`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from md_assets.core.errors import MdAssetsError, one_line
from md_assets.core.ledger import Ledger
from md_assets.core.paths import StageDir
from md_assets.core.schema import ITEM_BYTES, latents_column
from md_assets.core.verdict import CHECKS_OF_STAGE, Verdict
from md_assets.storage.mds import ledgered_files, row_count, spread_rows, verify_shards
from md_assets.storage.publish import output_file, read_ledger

ROWS_SAMPLED = 64
"""Rows of a latents archive that `latents_valid` decodes, spread evenly; reading all would cost as much as writing."""


def verify_archive(
    stage_dir: StageDir, upstream: StageDir | None, archive: str, *, read_all: bool = True
) -> Iterator[Verdict]:
    """The verdicts of all checks of a stage on one published archive, in the order of `CHECKS_OF_STAGE`.

    Args:
        stage_dir: where the archive is published.
        upstream: the stage whose kept samples were read here; None for raw.
        archive: its ID.
        read_all: whether every byte is read and hashed. Otherwise files are compared by their size, which finds
            what is missing or cut at a thousandth of the cost.
    """
    for name in CHECKS_OF_STAGE[stage_dir.stage]:
        if name == "counts_balance":
            yield counts_balance(stage_dir, archive, upstream)
        elif name == "latents_valid":
            yield latents_valid(stage_dir, archive)
        elif read_all:
            yield (tar_intact if name == "tar_intact" else shards_intact)(stage_dir, archive)
        else:
            yield files_present(name, stage_dir, archive)


def counts_balance(stage_dir: StageDir, archive: str, upstream: StageDir | None) -> Verdict:
    """Every sample read is kept or rejected, not all rejected, and as many were read as upstream kept."""

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
                    f"{upstream.stage} kept {kept_upstream}, here {ledger.read} were read",
                    facts,
                )
        if ledger.kept == 0:
            return Verdict("counts_balance", False, f"no sample is kept, of {ledger.read} that were read", facts)
        return Verdict(
            "counts_balance", True, f"{ledger.read} read = {ledger.kept} kept + {ledger.rejected_count} rejected", facts
        )

    return _checked("counts_balance", stage_dir, archive, check)


def files_present(name: str, stage_dir: StageDir, archive: str) -> Verdict:
    """Every ledgered file is there with its size; given as the verdict of check `name`, without reading contents."""

    def check(ledger: Ledger) -> Verdict:
        for file in ledger.files:
            path = stage_dir.path / file.path
            found = path.stat().st_size if path.is_file() else None
            if found != file.bytes:
                what = "is missing" if found is None else f"has {found} bytes, its ledger says {file.bytes}"
                return Verdict(name, False, f"{path} {what}")
        return Verdict(name, True, f"{len(ledger.files)} files have their sizes; hashes were not read again")

    return _checked(name, stage_dir, archive, check)


def tar_intact(stage_dir: StageDir, archive: str) -> Verdict:
    """The raw tar has the size and the hash of its ledger."""

    def check(ledger: Ledger) -> Verdict:
        (expected,) = ledger.files
        found = output_file(stage_dir.path / expected.path, expected.path)
        said = f"{found.bytes} bytes, sha256 {found.sha256[:16]}…"
        if found != expected:
            said += f"; its ledger says {expected.bytes} bytes, sha256 {expected.sha256[:16]}…"
        return Verdict("tar_intact", found == expected, said, {"bytes": found.bytes})

    return _checked("tar_intact", stage_dir, archive, check)


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
        dtype = ledger.details["dtype"]
        shapes = {"caption_latents": tuple(ledger.details["caption_latents"])}
        shapes |= {latents_column(int(px)): tuple(shape) for px, shape in ledger.details["image_latents"].items()}
        rows = row_count(stage_dir.data(archive))
        if rows != ledger.kept:
            return Verdict("latents_valid", False, f"{rows} rows in the index, {ledger.kept} in the ledger")
        sampled = 0
        for row in spread_rows(stage_dir.data(archive), ROWS_SAMPLED):
            if fault := _fault(row, shapes, dtype):
                return Verdict("latents_valid", False, f"sample {row.get('key')}: {fault}")
            sampled += 1
        return Verdict(
            "latents_valid",
            True,
            f"{rows} rows, {sampled} of them decoded: shapes, {dtype} and finite values as promised",
            {"rows": rows, "rows_decoded": sampled},
        )

    return _checked("latents_valid", stage_dir, archive, check)


def _fault(row: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: str) -> str | None:
    for column, shape in shapes.items():
        data = row.get(column)
        expected_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        if not isinstance(data, bytes) or len(data) != expected_bytes:
            return f"{column} has {len(data) if data else 0} bytes, {shape} in {dtype} are {expected_bytes}"
        if not np.isfinite(np.frombuffer(data, dtype)).all():
            return f"{column} has values that are not finite"
    return None


def _checked(name: str, stage_dir: StageDir, archive: str, check: Callable[[Ledger], Verdict]) -> Verdict:
    try:
        return check(_ledger(stage_dir, archive))
    except KeyError as error:
        return Verdict(name, False, one_line(f"{error} is not in the ledger's details"))
    except (MdAssetsError, OSError, AttributeError, TypeError, ValueError, struct.error) as error:
        return Verdict(name, False, one_line(str(error)))


def _ledger(stage_dir: StageDir, archive: str) -> Ledger:
    ledger = read_ledger(stage_dir.ledger(archive))
    if ledger is None:
        raise MdAssetsError(f"{stage_dir.stage} is not published", "Materialize it")
    return ledger
