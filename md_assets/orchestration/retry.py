"""`retry_failed_archives`: a job, and a sensor that starts it, by which archives that failed of something that passes
are tried again, a bounded number of times and ever more rarely.

How often an archive was tried is a tag on the runs of the backfill that tried it again (`md_assets/attempt`).

Here: what is due, the job, the sensor. Not here: what failed and why (`orchestration.failures`), the backfills
(`orchestration.backfills`).
No `from __future__ import annotations`: Dagster reads the annotations of ops.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from pydantic import Field

from md_assets.core.errors import MdAssetsError
from md_assets.core.settings import fingerprint
from md_assets.core.spec import DatasetSpec
from md_assets.datasets import all_specs, spec_of
from md_assets.orchestration.backfills import plan_failed, ui_path
from md_assets.orchestration.failures import FailedArchive, all_failed

RETRY = "retry_failed_archives"

ATTEMPTS = 5
"""Of an archive, the first included. With the waits below the last one is 14 hours after the first: what has not passed
over a night is for a person."""

FIRST_WAIT_S, WAIT_FACTOR = 600.0, 4.0
"""Waits of 10 and 40 minutes, 2 h 40 and 10 h 40 after an attempt. Within each, a run has tried again on its own for
some minutes (`TransferPolicy`, `RETRIES`); 10 minutes are twice the window in which the Hub counts requests."""

EVERY_S = 300
"""Between two looks of the sensor."""

ROWS_SHOWN = 100
"""Archives that a table of the job's run names; its log names all."""


@dataclass(frozen=True)
class Retries:
    """The failed archives of a dataset, by what is to become of them; of each archive all stages in which it failed.

    Attributes:
        due: for the attempt that is the key.
        waiting: for their time.
        under_way: in a backfill that goes on already.
        left: for a person: permanent, or tried often enough.
    """

    due: dict[int, tuple[FailedArchive, ...]]
    waiting: tuple[FailedArchive, ...]
    under_way: tuple[FailedArchive, ...]
    left: tuple[FailedArchive, ...]

    def __str__(self) -> str:
        """One line: how many archives of each."""
        due = sum(_archives(failed) for failed in self.due.values())
        line = f"{due:,} due, {_archives(self.waiting):,} waiting, {_archives(self.under_way):,} under way"
        return f"{line}, {_archives(self.left):,} left for a person"


def wait_s(attempt: int) -> float:
    """How long after an attempt the next one may be made, in seconds; `attempt` is 1 for the first."""
    return FIRST_WAIT_S * WAIT_FACTOR ** (attempt - 1)


def find_retries(
    failed: Iterable[FailedArchive],
    under_way: set[tuple[dg.AssetKey, str]],
    now_s: float,
    *,
    include_permanent: bool = False,
    ignore_backoff: bool = False,
) -> Retries:
    """Sort failed archives by what is to become of them.

    An archive is judged by the first stage in which it failed, as later ones are done again anyway, and by its latest
    failure and attempt in any.

    Args:
        failed: upstream first, as `all_failed` gives them.
        under_way: asset and archive of what a backfill still has to do.
        now_s: Unix time.
        include_permanent: whether what is left otherwise is due too.
        ignore_backoff: whether nothing has to wait.
    """
    by_archive: dict[tuple[str, str], list[FailedArchive]] = {}
    for one in failed:
        # A merged index has no archive: each is one of its own.
        by_archive.setdefault((one.archive, "" if one.archive else one.asset.to_user_string()), []).append(one)
    due: dict[int, list[FailedArchive]] = {}
    waiting, busy, left = [], [], []
    for stages in by_archive.values():
        attempt = max(one.attempt for one in stages)
        if any((asset, one.archive) in under_way for one in stages for asset in (one.asset, one.begin)):
            busy += stages
        elif not include_permanent and (not stages[0].transient or attempt >= ATTEMPTS):
            left += stages
        elif not ignore_backoff and now_s < max(one.at_s for one in stages) + wait_s(attempt):
            waiting += stages
        else:
            due.setdefault(attempt + 1, []).extend(stages)
    in_order = {attempt: tuple(due[attempt]) for attempt in sorted(due)}
    return Retries(in_order, tuple(waiting), tuple(busy), tuple(left))


def under_way(instance: dg.DagsterInstance, asset_graph: BaseAssetGraph) -> set[tuple[dg.AssetKey, str]]:
    """Asset and archive of everything that a backfill still has to do; the archive of an index is empty."""
    found: set[tuple[dg.AssetKey, str]] = set()
    open_ones = instance.get_backfills(BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED]))
    for backfill in open_ones:
        if not backfill.is_asset_backfill:
            continue
        data = backfill.get_asset_backfill_data(asset_graph)
        to_do = data.target_subset - data.materialized_subset - data.failed_and_downstream_subset
        found |= {(key, "") for key in to_do.non_partitioned_asset_keys}
        for key, subset in to_do.partitions_subsets_by_asset_key.items():
            found |= {(key, archive) for archive in subset.get_partition_keys()}
    return found


class RetryConfig(dg.Config):
    """What is tried again."""

    datasets: list[str] = Field(default=[], description="Slugs, e.g. cc12m. Default: all.")
    include_permanent: bool = Field(
        default=False,
        description=f"Also what waiting does not help, such as an archive that the source does not have, and what was "
        f"tried {ATTEMPTS} times.",
    )
    ignore_backoff: bool = Field(default=False, description="Do not wait between two attempts at an archive.")


@dg.op(
    name="launch_retries",
    description="Launches a backfill over failed archives that are due for another attempt, one for each dataset and "
    "number of attempts, and lists those that are left for a person.",
)
def launch_retries(context: dg.OpExecutionContext, config: RetryConfig) -> None:
    """Launch what is due of each dataset."""
    asset_graph = context.repository_def.asset_graph
    try:
        specs = [spec_of(slug) for slug in dict.fromkeys(config.datasets)] or all_specs()
    except MdAssetsError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    busy = under_way(context.instance, asset_graph)
    metadata: dict[str, dg.MetadataValue] = {}
    for spec in specs:
        retries = find_retries(
            all_failed(context.instance, spec),
            busy,
            time.time(),
            include_permanent=config.include_permanent,
            ignore_backoff=config.ignore_backoff,
        )
        context.log.info(f"{spec.slug}: {retries}")
        for one in retries.left:
            context.log.warning(f"{one.asset.to_user_string()}: left after attempt {one.attempt}: {one.why}")
        for attempt, failed in retries.due.items():
            if backfill_id := _launch(context, asset_graph, spec, failed, attempt):
                metadata[f"{spec.slug}_attempt_{attempt}"] = dg.MetadataValue.url(ui_path(backfill_id))
        if retries.left:
            metadata[f"{spec.slug}_left"] = dg.MetadataValue.md(_table(retries.left))
        metadata[spec.slug] = dg.MetadataValue.text(str(retries))
    context.add_output_metadata(metadata)


def _launch(
    context: dg.OpExecutionContext,
    asset_graph: BaseAssetGraph,
    spec: DatasetSpec,
    failed: Sequence[FailedArchive],
    attempt: int,
) -> str:
    """Launch one attempt; returns the backfill's ID, empty if nothing of it can be done."""
    try:
        plan = plan_failed(context.instance, asset_graph, spec, failed, attempt=attempt)
    except MdAssetsError as error:  # of all of them the stage before is missing
        context.log.warning(f"{spec.slug}: {error}")
        return ""
    if plan is None:
        return ""
    backfill_id = plan.launch(context.instance, asset_graph)
    for line in plan.lines():
        context.log.info(line)
    context.log.info(f"attempt {attempt}: backfill {backfill_id}: {ui_path(backfill_id)}")
    return backfill_id


@dg.job(
    name=RETRY,
    description="Try failed archives again: those whose cause may have passed, unless they were tried too often or a "
    "short time ago. The sensor of the same name starts it when something is due.",
)
def retry_job() -> None:
    """The job `retry_failed_archives`."""
    launch_retries()


@dg.sensor(
    name=RETRY,
    job=retry_job,
    minimum_interval_seconds=EVERY_S,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=f"Starts the job of the same name when failed archives are due: up to {ATTEMPTS} attempts at each, 10 "
    "minutes after the first, four times as long after each further one. Permanent failures are left.",
)
def retry_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """One tick."""
    running = dg.RunsFilter(job_name=RETRY, statuses=list(NOT_FINISHED_STATUSES))
    if context.instance.get_runs_count(running):
        return dg.SensorResult(skip_reason="the job is at work already")
    assert context.repository_def is not None
    busy, now_s = under_way(context.instance, context.repository_def.asset_graph), time.time()
    retries = {spec.slug: find_retries(all_failed(context.instance, spec), busy, now_s) for spec in all_specs()}
    if due := [slug for slug, found in retries.items() if found.due]:
        config = {"ops": {launch_retries.name: {"config": {"datasets": due}}}}
        failures = [one for slug in due for failed in retries[slug].due.values() for one in failed]
        # What the job could do nothing about is asked for once a day, not at every tick.
        run_key = fingerprint({"due": sorted(f"{one.asset} {one.archive} {one.at_s}" for one in failures)})
        request = dg.RunRequest(run_key=f"{run_key} {time.strftime('%F', time.gmtime(now_s))}", run_config=config)
        return dg.SensorResult(run_requests=[request])
    said = "; ".join(f"{slug}: {found}" for slug, found in retries.items() if found != Retries({}, (), (), ()))
    return dg.SensorResult(skip_reason=said or "nothing failed last")


def _archives(failed: Iterable[FailedArchive]) -> int:
    return len({(one.archive, "" if one.archive else one.asset) for one in failed})


def _table(failed: Sequence[FailedArchive]) -> str:
    """What is left, one row for each."""
    rows = [
        f"| {one.asset.to_user_string()} | {one.archive} | {one.reason} | {one.attempt} | {one.why.replace('|', '/')} |"
        for one in failed[:ROWS_SHOWN]
    ]
    more = [f"\n{len(failed) - ROWS_SHOWN:,} more are in the log"] if len(failed) > ROWS_SHOWN else []
    return "\n".join(
        ["| asset | archive | reason | attempts | why |", "| --- | --- | --- | ---: | --- |", *rows, *more]
    )
