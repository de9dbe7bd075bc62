"""Archives that failed, and why, told from Dagster's records.

Here: reading the records. Not here: writing them (`orchestration.archive_run`), checks
(`orchestration.failed_checks`), trying again (`orchestration.backfills`, `orchestration.retry`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import dagster as dg
from dagster._core.events import DagsterEvent, JobFailureData
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG

from md_assets.core.errors import one_line
from md_assets.core.paths import DataRoot
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.archive_run import FAILURES_KEY, REASON_KEY, TRANSIENT_KEY
from md_assets.orchestration.failed_checks import archive_keys, failed_checks
from md_assets.orchestration.partitions import archive_partitions

ATTEMPT_TAG = "md_assets/attempt"
"""On runs of a backfill that tries again what failed: how many attempts that makes, 2 and more. Other runs are first
attempts."""

RUN_DIED = "run_died"
"""Reason of archives whose run ended without a word about them."""

DIED = frozenset({RUN_DIED, "process_died"})
"""Reasons that pass although the run itself does not wait and try again: a killed process, a machine that went down."""

WITHOUT_A_WORD = "its process ended without a word: killed, out of memory, or its machine went down"

_FROM_OUTSIDE = "This run has been marked as failed from outside the execution context"
"""What Dagster says when it finds the process of a run gone."""

RUNS_AT_A_TIME = 500
"""Of which records are asked for in one query."""

CLOCKS_S = 60.0
"""By which the clock of who records a run's end may be ahead of that of who says why."""

_FAILURE = dg.DagsterRunStatus.FAILURE


@dataclass(frozen=True)
class Cause:
    """Why something failed.

    Attributes:
        why: one sentence.
        reason: a short stable word, as in `core.errors`, or a check's name.
        transient: whether another attempt may succeed without anybody's action.
    """

    why: str
    reason: str
    transient: bool


@dataclass(frozen=True)
class FailedArchive(Cause):
    """One archive that failed in one stage.

    Attributes:
        asset: the stage's.
        archive: its ID; empty where an asset without partitions failed.
        why: names the archive.
        attempt: how many attempts there were, as far as they followed from each other; 1 for the first.
        at_s: when it failed, Unix time; 0 where that is not known.
        begin: the asset from which on it must be made again; `asset`, or one before it whose data were pruned.
    """

    asset: dg.AssetKey
    archive: str
    attempt: int
    at_s: float
    begin: dg.AssetKey

    def as_json(self) -> dict[str, Any]:
        """For scripts: these keys stay."""
        names = ("archive", "why", "reason", "transient", "attempt")
        return {"asset": self.asset.to_user_string(), **{name: getattr(self, name) for name in names}, "at": self.at_s}


def all_failed(instance: dg.DagsterInstance, spec: DatasetSpec) -> list[FailedArchive]:
    """What failed last of a dataset, in any of its stages: upstream first, archives in upstream's order.

    An archive failed if its last attempt did, or one of its checks when it was evaluated last; merged indexes only if
    their audit did. What a run works on, or is queued for, is left out.
    """
    found: dict[tuple[dg.AssetKey, str], FailedArchive] = {}
    in_progress: set[tuple[dg.AssetKey, str]] = set()
    for asset in archive_keys(spec):
        statuses = instance.get_status_by_partition(asset, spec.archives, archive_partitions(spec)) or {}
        in_progress |= {(asset, a) for a, status in statuses.items() if status is AssetPartitionStatus.IN_PROGRESS}
        unmade = {archive for archive, status in statuses.items() if status is AssetPartitionStatus.FAILED}
        found |= {(asset, failed.archive): failed for failed in _last_attempts(instance, spec, asset, unmade)}
    unsound = list(failed_checks(instance, spec))
    runs = _run_records(instance, {check.run_id for check in unsound})
    for check in unsound:
        if (check.asset, check.archive) not in found.keys() | in_progress:
            found[check.asset, check.archive] = FailedArchive(
                why=f"{f'{spec.slug} {check.archive}'.rstrip()}: {check.check}: {check.what}",
                reason=check.check,
                transient=check.damaged,
                asset=check.asset,
                archive=check.archive,
                attempt=_attempt(runs[check.run_id].dagster_run) if check.run_id in runs else 1,
                at_s=check.at_s,
                begin=check.begin,
            )
    order = {archive: number for number, archive in enumerate(("", *spec.archives))}
    assets = {asset: number for number, asset in enumerate(archive_keys(spec))}
    last = len(assets)  # merged indexes
    return sorted(found.values(), key=lambda failed: (assets.get(failed.asset, last), order.get(failed.archive, -1)))


def failed_in_runs(
    instance: dg.DagsterInstance,
    spec: DatasetSpec,
    asset: dg.AssetKey,
    archives: Iterable[str],
    runs: Iterable[dg.RunRecord],
) -> list[FailedArchive]:
    """Why archives failed in a stage.

    Args:
        asset: the stage's.
        archives: that failed; an empty ID where `asset` has no partitions.
        runs: that failed, the newest last; those of other assets are passed over.
    """
    found: dict[str, FailedArchive] = {}
    of_asset = [record for record in runs if asset in (record.dagster_run.asset_selection or ())]
    said = _said_by_runs(instance, of_asset)
    for record in of_asset:
        run = record.dagster_run
        failed = _in_run(spec, asset, record, said[run.run_id], _covered(run, spec) or [""])
        found |= {one.archive: one for one in failed}
    return [found.get(archive) or _unknown(spec, asset, archive) for archive in archives]


def said_by_run(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[Cause, dict[str, Cause]]:
    """What a failed run says of itself, and of each archive that failed in it, by ID."""
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE):
        return _said(entry.get_dagster_event())
    return _nothing_said(run)


def _said_by_runs(
    instance: dg.DagsterInstance, records: Sequence[dg.RunRecord]
) -> dict[str, tuple[Cause, dict[str, Cause]]]:
    """What failed runs say, by their ID. Told from the events that Dagster keeps of all runs together: to open the log
    of each would take a tenth of a second with SQLite."""
    said = {record.dagster_run.run_id: _nothing_said(record.dagster_run) for record in records}
    missing = {run.run_id for run in (record.dagster_run for record in records) if run.status is _FAILURE}
    after_s = min(map(_ended_s, records), default=0.0) - CLOCKS_S
    wanted = dg.RunStatusChangeRecordsFilter(dg.DagsterEventType.RUN_FAILURE, after_timestamp=after_s)
    cursor, more = None, True
    while missing and more:
        page = instance.fetch_run_status_changes(wanted, limit=RUNS_AT_A_TIME, cursor=cursor)
        for record in page.records:
            if record.run_id in missing:
                missing.remove(record.run_id)
                said[record.run_id] = _said(record.event_log_entry.get_dagster_event())
        cursor, more = page.cursor, page.has_more
    return said


def _said(failure: DagsterEvent) -> tuple[Cause, dict[str, Cause]]:
    """What the event of a run's failure says; its first failed step is part of it."""
    data = failure.event_specific_data  # none where a monitor has found the run dead
    error, by_user = None, None
    if isinstance(data, JobFailureData):
        error, step = data.error, data.first_step_failure_event
        by_user = step.step_failure_data.user_failure_data if step is not None else None
    if by_user is not None:
        told = {name: value.value for name, value in by_user.metadata.items()}
        archives = cast("Mapping[str, Mapping[str, Any]]", told.get(FAILURES_KEY) or {})
        of_run = Cause(
            one_line(by_user.description or ""),
            # Archives that it does not name are those that it did not come to.
            RUN_DIED if archives else str(told.get(REASON_KEY, "failed")),
            bool(archives or told.get(TRANSIENT_KEY, False)),
        )
        return of_run, {archive: _cause(**said) for archive, said in archives.items()}
    if error is not None:
        interrupted = error.cls_name == "DagsterExecutionInterruptedError"
        return Cause(one_line(error.message), RUN_DIED if interrupted else "internal", interrupted), {}
    said = one_line(failure.message or "")
    return Cause(WITHOUT_A_WORD if said in ("", _FROM_OUTSIDE) else said, RUN_DIED, True), {}


def _nothing_said(run: dg.DagsterRun) -> tuple[Cause, dict[str, Cause]]:
    """Of a run that has left no word."""
    canceled = run.status is dg.DagsterRunStatus.CANCELED
    return Cause(f"it was {run.status.value.lower()}", "canceled" if canceled else RUN_DIED, not canceled), {}


def causes(failed: Iterable[FailedArchive]) -> Iterator[str]:
    """Lines that tell how many archives failed of what: those that may pass, and those that will not."""
    counts = Counter((one.transient, one.reason) for one in failed)
    for transient, what in ((True, "may pass"), (False, "permanent unless somebody mends it")):
        reasons = {reason: count for (of, reason), count in sorted(counts.items()) if of is transient}
        if reasons:
            yield f"{sum(reasons.values()):,} {what}: " + ", ".join(f"{r} {n:,}" for r, n in reasons.items())


def by_directory(failed: Iterable[FailedArchive], root: DataRoot, encoder_tag: str) -> dict[str, set[str]]:
    """Directory of a stage, below the dataset's -> archives that failed there.

    Args:
        encoder_tag: of the latents that runs make now.
    """
    found: dict[str, set[str]] = {}
    for one in failed:
        if one.archive:
            slug, (stage, _, subset) = one.asset.path[0], one.asset.path[-1].partition("_")
            if stage == "latents":
                stage_dir = root.latents(slug, encoder_tag, subset)
            else:
                stage_dir = root.mds(slug, subset) if stage == "mds" else root.raw(slug)
            found.setdefault(stage_dir.path.name, set()).add(one.archive)
    return found


def _last_attempts(
    instance: dg.DagsterInstance, spec: DatasetSpec, asset: dg.AssetKey, unmade: set[str]
) -> Iterator[FailedArchive]:
    """Why archives whose last attempt failed did so."""
    if not unmade:
        return
    storage = instance.event_log_storage
    attempts = storage.get_latest_asset_partition_materialization_attempts_without_materializations(asset)
    of_run: dict[str, list[str]] = {}
    for archive in unmade:
        run_id, _ = attempts.get(archive, ("", 0))
        of_run.setdefault(run_id, []).append(archive)
    records = _run_records(instance, of_run)
    said = _said_by_runs(instance, list(records.values()))
    for run_id, archives in of_run.items():
        if run_id in records:
            yield from _in_run(spec, asset, records[run_id], said[run_id], archives)
        else:
            yield from (_unknown(spec, asset, archive) for archive in archives)


def _in_run(
    spec: DatasetSpec,
    asset: dg.AssetKey,
    record: dg.RunRecord,
    said: tuple[Cause, Mapping[str, Cause]],
    archives: Sequence[str],
) -> Iterator[FailedArchive]:
    """Why archives failed in one run, by what it said."""
    run = record.dagster_run
    of_run, of_archives = said
    for archive in archives:
        cause = of_archives.get(archive, of_run)
        before = f"{spec.slug} {archive}: run {run.run_id[:8]} ended before it: " if archive else ""
        yield FailedArchive(
            why=cause.why if archive in of_archives else before + cause.why,
            reason=cause.reason,
            transient=cause.transient,
            asset=asset,
            archive=archive,
            attempt=_attempt(run),
            at_s=_ended_s(record),
            begin=asset,
        )


def _unknown(spec: DatasetSpec, asset: dg.AssetKey, archive: str) -> FailedArchive:
    """Of an archive that failed in a run of which nothing is left."""
    why = f"{f'{spec.slug} {archive}'.rstrip()}: no run says why; see the runs of the backfill in Dagster's UI"
    return FailedArchive(why, "unknown", False, asset, archive, 1, 0.0, asset)


def _cause(why: str, reason: str, transient: bool) -> Cause:
    return Cause(why, reason, transient or reason in DIED)


def _attempt(run: dg.DagsterRun) -> int:
    return int(run.tags.get(ATTEMPT_TAG, 1))


def _ended_s(record: dg.RunRecord) -> float:
    """When a run ended, Unix time."""
    return record.end_time or record.update_timestamp.timestamp()


def _run_records(instance: dg.DagsterInstance, run_ids: Iterable[str]) -> dict[str, dg.RunRecord]:
    ids = sorted(filter(None, run_ids))
    chunks = [ids[start : start + RUNS_AT_A_TIME] for start in range(0, len(ids), RUNS_AT_A_TIME)]
    records = [record for chunk in chunks for record in instance.get_run_records(dg.RunsFilter(run_ids=chunk))]
    return {record.dagster_run.run_id: record for record in records}


def _covered(run: dg.DagsterRun, spec: DatasetSpec) -> Sequence[str]:
    """The archives of a run; none for an asset without partitions."""
    first, last = run.tags.get(ASSET_PARTITION_RANGE_START_TAG), run.tags.get(ASSET_PARTITION_RANGE_END_TAG)
    if first is None or last is None:
        return ()
    return spec.archives[spec.archives.index(first) : spec.archives.index(last) + 1]
