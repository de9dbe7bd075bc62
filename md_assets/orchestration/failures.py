"""Archives that failed, and why, told from Dagster's records.

Here: reading the records. Not here: writing them (`orchestration.archive_run`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG

from md_assets.core.errors import one_line
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.archive_run import FAILURES_KEY


@dataclass(frozen=True)
class FailedArchive:
    """One archive that failed in one stage.

    Attributes:
        asset: the stage's.
        archive: its ID; empty where an asset without partitions failed.
        why: one sentence that names the archive.
    """

    asset: dg.AssetKey
    archive: str
    why: str


def failed_archives(
    instance: dg.DagsterInstance, asset_graph: BaseAssetGraph, spec: DatasetSpec, asset: dg.AssetKey
) -> set[str]:
    """Archives whose last attempt in a stage failed, or one of whose checks there failed last."""
    statuses = instance.get_status_by_partition(asset, spec.archives, asset_graph.get(asset).partitions_def) or {}
    unmade = {archive for archive, status in statuses.items() if status is AssetPartitionStatus.FAILED}
    checks = list(asset_graph.get_check_keys_for_assets({asset}))
    records = instance.event_log_storage.get_asset_check_partition_info(checks) if checks else []
    failed = AssetCheckExecutionRecordStatus.FAILED
    unsound = {record.partition_key or "" for record in records if record.latest_execution_status is failed}
    return unmade | (unsound & set(spec.archives))


def failed_in_runs(
    instance: dg.DagsterInstance,
    spec: DatasetSpec,
    asset: dg.AssetKey,
    archives: Iterable[str],
    runs: Iterable[dg.DagsterRun],
) -> list[FailedArchive]:
    """Why archives failed in a stage.

    Args:
        asset: the stage's.
        archives: that failed; an empty ID where `asset` has no partitions.
        runs: that failed, the newest last; those of other assets are passed over.
    """
    why: dict[str, str] = {}
    for run in runs:
        if asset in (run.asset_selection or ()):
            of_run, of_archives = said_by_run(instance, run)
            for archive in _covered(run, spec):
                why[archive] = f"{spec.slug} {archive}: run {run.run_id[:8]} ended before it: {of_run}"
            why |= {"": of_run, **of_archives}
    unknown = f"{spec.slug}: no run says why; see the runs of the backfill in Dagster's UI"
    return [FailedArchive(asset, archive, why.get(archive, unknown)) for archive in archives]


def _covered(run: dg.DagsterRun, spec: DatasetSpec) -> Sequence[str]:
    """The archives of a run; none for an asset without partitions."""
    first, last = run.tags.get(ASSET_PARTITION_RANGE_START_TAG), run.tags.get(ASSET_PARTITION_RANGE_END_TAG)
    if first is None or last is None:
        return ()
    return spec.archives[spec.archives.index(first) : spec.archives.index(last) + 1]


def said_by_run(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[str, dict[str, str]]:
    """What a failed run says of itself, and of each archive that failed in it, by ID."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        data = entry.get_dagster_event().step_failure_data
        by_user = data.user_failure_data
        if by_user is not None:
            recorded = by_user.metadata.get(FAILURES_KEY)
            archives = cast("dict[str, Any]", recorded.value) if recorded else {}
            return one_line(by_user.description or ""), {archive: said["why"] for archive, said in archives.items()}
        if data.error is not None:
            return one_line(data.error.message), {}
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE):
        return one_line(entry.get_dagster_event().message or "no reason given"), {}
    return f"it was {run.status.value.lower()}", {}
