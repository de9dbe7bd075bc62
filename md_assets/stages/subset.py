"""subset: select a subset's rows from the published shards of the whole dataset, at mds and at latents.

Here: which rows, and the ledger. Nothing is encoded again: a row's columns are copied as they are. Not here: which
subsets there are (`datasets/`), what their settings are (`core.settings`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from md_assets.core.errors import DamagedError
from md_assets.core.ledger import Ledger, Reason
from md_assets.core.paths import StageDir
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.schema import MDS_COLUMNS
from md_assets.core.settings import subset_settings
from md_assets.core.spec import Subset
from md_assets.stages.index import LAYOUT_DETAILS
from md_assets.stages.once import Made, Outcome, archive_errors, once, refuse_pruned, upstream_ledger, versions_of
from md_assets.stages.verify import shards_intact
from md_assets.storage.mds import ShardWriter, iter_rows, ledgered_files, read_index
from md_assets.storage.publish import scratch, with_files


def select_archive(
    subset: Subset,
    archive: str,
    whole_dir: StageDir,
    subset_dir: StageDir,
    whole_settings: Mapping[str, Any],
    *,
    report: ReportProgress = silent,
    on_wait: Callable[[], None] | None = None,
) -> Outcome:
    """Publish those rows of `archive` that belong to `subset`, in the order of the whole.

    Args:
        subset: an image belongs to it when its smaller edge, before any resizing, has `min_edge_px` or more. Images are
            never enlarged, and `max_image_size` is not below `min_edge_px`: so the stored size tells.
        archive: ID.
        whole_dir: mds or latents of the whole dataset, which are read and compared with their ledger.
        subset_dir: where the subset's shards go.
        whole_settings: those that the whole must have been made with.
        report: told of rows read.
        on_wait: called when another process works on the same archive of the subset.

    Returns: the ledger; rows that do not belong to the subset are rejected as `not_in_subset`. An archive of which
        nothing belongs to it is published without a row.

    Raises:
        ArchiveError: the whole is missing, pruned, stale or damaged, or its images are too small to tell.

    May be repeated and killed at any time; the same shards give the same bytes.
    """
    with archive_errors(whole_dir.dataset, archive):
        settings = subset_settings(whole_settings, subset)
        whole = upstream_ledger(whole_dir, archive, whole_settings)
    inputs: dict[str, str] = {whole_dir.stage: whole.content_id}

    def make(workspace: Path) -> Made:
        refuse_pruned(whole_dir, archive)
        if not (intact := shards_intact(whole_dir, archive)).passed:
            raise DamagedError(intact.what, f"Materialize {whole_dir.dataset}/{whole_dir.asset} of it again")
        source = whole_dir.data(archive)
        shards = read_index(source)
        columns = {name: encoding for name, encoding, _ in shards[0].columns} if shards else MDS_COLUMNS
        outside: list[str] = []
        with ShardWriter(scratch(workspace, "shards"), columns) as writer:
            for read, row in enumerate(iter_rows(source), 1):
                if min(row["width"], row["height"]) >= subset.min_edge_px:
                    writer.write(row)
                else:
                    outside.append(row["key"])
                report(Progress(archive, "selects", read, whole.kept, "rows"))
        ledger = Ledger(
            dataset=whole_dir.dataset,
            archive=archive,
            stage=whole_dir.stage,
            read=whole.kept,
            kept=writer.row_count,
            rejected={Reason.NOT_IN_SUBSET: outside} if outside else {},
            bytes_in=whole.bytes_out,
            bytes_out=0,
            seconds=0.0,
            source=whole.source,
            inputs=inputs,
            settings=settings,
            versions=versions_of("mosaicml-streaming"),
            files=(),
            details={name: whole.details[name] for name in LAYOUT_DETAILS if name in whole.details},
        )
        return Made(writer.directory, with_files(ledger, ledgered_files(writer.directory, archive)))

    return once(subset_dir, archive, settings, inputs, make, on_wait)
