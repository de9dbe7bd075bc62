"""Following a backfill: lines about each asset while it runs, and what failed.

Here: reading what Dagster records of a backfill. Not here: launching one (`orchestration.backfills`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.execution.asset_backfill import AssetBackfillData
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus, PartitionBackfill
from dagster._core.storage.tags import BACKFILL_ID_TAG

from md_assets.core.errors import MdAssetsError
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.backfills import a_daemon_runs
from md_assets.orchestration.failures import FailedArchive, failed_in_runs

POLL_S = 2.0
"""Seconds between looks at a backfill; the daemon moves it every 30 s."""

NO_DAEMON_S = 120.0
"""Seconds without a daemon after which waiting is given up: time enough to start one."""


@dataclass(frozen=True)
class BackfillResult:
    """What came of a backfill.

    Attributes:
        status: Dagster's word for it, e.g. `COMPLETED_SUCCESS`.
        failed: archives (and assets without partitions) that failed themselves; assets upstream first.
        unmade: assets without partitions that were never asked for, since something upstream of them failed.
        error: what stopped the backfill as a whole; empty where nothing did.
    """

    status: str
    failed: tuple[FailedArchive, ...]
    unmade: tuple[dg.AssetKey, ...]
    error: str = ""

    @property
    def success(self) -> bool:
        """Whether everything that was asked for is done."""
        return self.status == BulkActionStatus.COMPLETED_SUCCESS.value


@dataclass(frozen=True)
class AssetProgress:
    """How far an asset of a backfill is, by archives; an asset without partitions has one with an empty ID.

    Attributes:
        target: all that the backfill is about.
        requested: for which runs were asked.
        done: materialized by the backfill.
        failed: that failed, or have an upstream that did.
    """

    target: frozenset[str]
    requested: frozenset[str]
    done: frozenset[str]
    failed: frozenset[str]

    @classmethod
    def of(cls, data: AssetBackfillData, asset: dg.AssetKey) -> AssetProgress:
        """Told from a backfill's data."""
        subsets = (data.target_subset, data.requested_subset, data.materialized_subset)
        target, requested, done, failed = (
            frozenset({""})
            if asset in subset.non_partitioned_asset_keys
            else frozenset(subset.get_partitions_subset(asset).get_partition_keys())
            if asset in subset.partitions_subsets_by_asset_key
            else frozenset[str]()
            for subset in (*subsets, data.failed_and_downstream_subset)
        )
        return cls(target, requested, done, failed - done)

    def __str__(self) -> str:
        """One line; empty before anything is asked for."""
        if not self.requested and not self.failed:
            return ""
        failed, behind = self.failed & self.requested, self.failed - self.requested
        if self.target == {""}:
            return "done" if self.done else "failed" if failed else "not made" if behind else "in progress"
        in_progress = self.requested - self.done - self.failed
        line = f"{len(self.done):,} done, {len(failed):,} failed, {len(in_progress):,} in progress"
        return line + (f", {len(behind):,} behind a failure" if behind else "") + f", of {len(self.target):,}"


def follow(
    instance: dg.DagsterInstance,
    asset_graph: BaseAssetGraph,
    spec: DatasetSpec,
    backfill_id: str,
    report: Callable[[str], object],
    *,
    poll_s: float = POLL_S,
    no_daemon_s: float = NO_DAEMON_S,
) -> BackfillResult:
    """Wait until a backfill has come to its end; only reads.

    Args:
        report: takes a line whenever the numbers of an asset have changed.

    Raises:
        MdAssetsError: there was no daemon for `no_daemon_s`; the backfill stays where it is.
    """
    shown: dict[dg.AssetKey, str] = {}
    alive = time.monotonic()
    while True:
        backfill = _backfill(instance, backfill_id)
        data = backfill.get_asset_backfill_data(asset_graph)
        for asset in data.get_targeted_asset_keys_topological_order(asset_graph):
            line = str(AssetProgress.of(data, asset))
            if shown.get(asset, "") != line:
                report(f"{asset.to_user_string()}: {line}")
                shown[asset] = line
        if backfill.status in BULK_ACTION_TERMINAL_STATUSES:
            return _result(instance, asset_graph, spec, backfill)
        if a_daemon_runs(instance):
            alive = time.monotonic()
        elif time.monotonic() - alive > no_daemon_s:
            raise MdAssetsError(
                f"backfill {backfill_id} waits, and no daemon runs on this instance",
                "Start `dagster dev` with the same DAGSTER_HOME; it goes on there",
            )
        time.sleep(poll_s)


def _result(
    instance: dg.DagsterInstance, asset_graph: BaseAssetGraph, spec: DatasetSpec, backfill: PartitionBackfill
) -> BackfillResult:
    """What came of a backfill that has ended."""
    data = backfill.get_asset_backfill_data(asset_graph)
    over = [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
    runs = instance.get_run_records(dg.RunsFilter(tags={BACKFILL_ID_TAG: backfill.backfill_id}, statuses=over))
    failed, unmade = [], []
    for asset in data.get_targeted_asset_keys_topological_order(asset_graph):
        progress = AssetProgress.of(data, asset)
        failing = progress.failed & progress.requested
        archives = [archive for archive in ("", *spec.archives) if archive in failing]
        failed += failed_in_runs(instance, spec, asset, archives, reversed(runs))
        if "" in progress.failed - progress.requested:
            unmade.append(asset)
    error = backfill.error.message.strip() if backfill.error else ""
    return BackfillResult(backfill.status.value, tuple(failed), tuple(unmade), error)


def _backfill(instance: dg.DagsterInstance, backfill_id: str) -> PartitionBackfill:
    backfill = instance.get_backfill(backfill_id)
    if backfill is None:
        raise MdAssetsError(f"this instance has no backfill {backfill_id}", "Check DAGSTER_HOME")
    return backfill
