"""What people see of an archive in the UI: its ledger as metadata, a table of rejects, a contact sheet.

Here: values for Dagster. Not here: what is counted (`core.ledger`), how a picture is made (`storage.contact_sheet`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import Ledger
from md_assets.core.names import first_of
from md_assets.core.paths import StageDir

if TYPE_CHECKING:
    from md_assets.stages.prune import PruneReport

KEYS_SHOWN = 5
"""Keys of rejected samples in the table; all of them are in the ledger, whose path is shown too."""

SHEET_IMAGES = 16


def archive_metadata(
    stage_dir: StageDir, ledger: Ledger, passed_over: bool, *, pictures: bool = True
) -> dict[str, dg.MetadataValue]:
    """The metadata of one published archive.

    Args:
        stage_dir: where it is published.
        ledger: what happened to its samples.
        passed_over: whether it had been published before this run.
        pictures: whether to make a contact sheet, which takes longer than everything else and up to 14 KB.
    """
    metadata: dict[str, Any] = {
        "read": ledger.read,
        "kept": ledger.kept,
        "rejected": ledger.rejected_count,
    }
    if ledger.rejected:
        metadata["rejected_by_reason"] = dg.MetadataValue.md(rejects_table(ledger.rejected))
    if pictures and (sheet := _contact_sheet(stage_dir, ledger)):
        metadata["contact_sheet"] = dg.MetadataValue.md(f"![samples of {ledger.archive}]({sheet})")
    metadata |= {
        "seconds": ledger.seconds,
        "images_per_s": round(ledger.read / ledger.seconds, 2) if ledger.seconds else 0.0,
        "bytes_in": ledger.bytes_in,
        "bytes_out": ledger.bytes_out,
        "passed_over": passed_over,
        "source": f"{ledger.source.get('name')} @ {ledger.source.get('revision')}",
        "source_content_id": ledger.source.get("content_id", ""),
        "fingerprint": ledger.fingerprint,
        "details": dg.MetadataValue.json(ledger.details),
        "versions": dg.MetadataValue.json(ledger.versions),
        "ledger": dg.MetadataValue.path(str(stage_dir.ledger(ledger.archive))),
        "data": dg.MetadataValue.path(str(stage_dir.data(ledger.archive))),
        "dagster/row_count": ledger.kept,
    }
    return {key: dg.MetadataValue.text(value) if isinstance(value, str) else value for key, value in metadata.items()}


def rejects_table(rejected: Mapping[str, list[str]]) -> str:
    """Markdown: reason, samples, the first keys."""
    rows = ["| reason | samples | keys |", "| --- | ---: | --- |"]
    for reason, keys in sorted(rejected.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(f"`{key}`" for key in keys[:KEYS_SHOWN])
        more = f" and {len(keys) - KEYS_SHOWN:,} more" if len(keys) > KEYS_SHOWN else ""
        rows.append(f"| {reason} | {len(keys):,} | {shown}{more} |")
    return "\n".join(rows)


def pruned_table(report: "PruneReport") -> dg.MetadataValue:
    """Markdown: what pruning removed of a dataset, or would remove, and what stays for which reason."""
    freed = sum(report.bytes.values())
    said = f"{freed:,} bytes would be removed; nothing was" if report.dry_run else f"{freed:,} bytes were removed"
    rows = [said, "", "| what | archives | bytes |", "| --- | ---: | ---: |"]
    rows += [f"| {name} | {count:,} | {report.bytes[name]:,} |" for name, count in report.archives.items()]
    groups = report.kept_back_groups().items()
    rows += ["", *(f"- Not pruned: {why}: {len(ids):,} archives ({first_of(ids)})" for why, ids in groups)]
    return dg.MetadataValue.md("\n".join(rows))


def _contact_sheet(stage_dir: StageDir, ledger: Ledger) -> str | None:
    """A picture of some samples as data URI; None where there is nothing to show."""
    import numpy as np

    from md_assets.storage.contact_sheet import image_sheet, latents_sheet
    from md_assets.storage.mds import spread_rows
    from md_assets.storage.raw_tar import spread_jpegs

    data = stage_dir.data(ledger.archive)
    try:
        if stage_dir.stage == "raw":
            return image_sheet(spread_jpegs(data, SHEET_IMAGES))
        if stage_dir.stage == "mds":
            return image_sheet([row["jpg"] for row in spread_rows(data, SHEET_IMAGES)])
        if stage_dir.stage == "latents":
            px, shape = next(iter(ledger.details["image_latents"].items()))
            arrays = [
                np.frombuffer(row[f"latents_{px}"], ledger.details["dtype"]).reshape(shape)
                for row in spread_rows(data, SHEET_IMAGES)
            ]
            return latents_sheet(arrays)
    except (MdAssetsError, OSError, ValueError):
        return None  # the checks say what is wrong with the data; a missing picture is no failure
    return None
