"""Checks that failed last, told from Dagster's records: of which archive, and in which stage the fault lies.

A check counts until it is evaluated again: that a run has planned it, and died before, changes nothing. What the audit
found counts until the stage in which the fault lies, and the one that was audited, are materialized again.

Here: reading the records. Not here: the checks (`stages.verify`, `stages.audit`), what is done about it
(`orchestration.failures`, `orchestration.stage_runs`).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import dagster as dg
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecord,
    AssetCheckExecutionRecordStatus,
)

from md_assets.core.paths import ARCHIVE_STAGES
from md_assets.core.spec import DatasetSpec
from md_assets.core.verdict import AUDITED, BEGIN_FACT, DIRECTORY_FACT, STAGE_FACT, checks_of
from md_assets.stages.status import INDEXED_STAGES

OF_WHAT_IS_ON_DISK = frozenset({"tar_intact", "shards_intact", AUDITED})
"""Checks that read files: one that fails says that they are damaged, and files that are made again may be whole. The
others fail again on what is made of the same input with the same settings."""

FAILED_RESULTS = 20_000
"""Failed results of one check that are looked through: of each archive of the largest dataset one, and some more."""

ARCHIVES_AT_A_TIME = 500
"""Named in one query; SQLite takes some thousands."""

_PLANNED = AssetCheckExecutionRecordStatus.PLANNED
_FAILED, _SUCCEEDED = AssetCheckExecutionRecordStatus.FAILED, AssetCheckExecutionRecordStatus.SUCCEEDED


@dataclass(frozen=True)
class FailedCheck:
    """A check of one archive that failed when it was evaluated last.

    Attributes:
        asset: in which the fault lies.
        begin: to be materialized first, so that it can be mended: `asset`, or one before it whose data were pruned.
        archive: its ID; empty of a merged index.
        check: its name.
        what: what it said.
        damaged: whether what `asset` has published is not to be trusted.
        directory: of the stage in which the fault lies, below the dataset's; empty where that is not known.
        at_s: when it was evaluated, Unix time.
        run_id: of the run that published what failed.
    """

    asset: dg.AssetKey
    begin: dg.AssetKey
    archive: str
    check: str
    what: str
    damaged: bool
    directory: str
    at_s: float
    run_id: str


def archive_keys(spec: DatasetSpec) -> list[dg.AssetKey]:
    """The assets of a dataset that are made archive by archive, those of subsets too; upstream first."""
    subsets = [subset.name for subset in spec.subsets]
    names = [name for stage in ARCHIVE_STAGES for name in (stage, *(f"{stage}_{s}" for s in subsets if stage != "raw"))]
    return [dg.AssetKey([spec.slug, name]) for name in names]


def audited_keys(spec: DatasetSpec) -> list[dg.AssetKey]:
    """The assets that have the check `audited`: mds, latents, those of subsets, and the merged indexes of all these."""
    stages = [key.path[-1] for key in archive_keys(spec) if key.path[-1].partition("_")[0] in INDEXED_STAGES]
    return [dg.AssetKey([spec.slug, name + ending]) for name in stages for ending in ("", "_index")]


def failed_checks(instance: dg.DagsterInstance, spec: DatasetSpec) -> Iterator[FailedCheck]:
    """The checks of a dataset that failed last, and that nothing was done about since."""
    keys = []
    for key in archive_keys(spec):
        stage, _, subset = key.path[-1].partition("_")
        for own in ARCHIVE_STAGES:
            keys += [dg.AssetCheckKey(key, name) for name in checks_of(own, subset) if own == stage]
    yield from _failed_of(instance, [*keys, *(dg.AssetCheckKey(key, AUDITED) for key in audited_keys(spec))], None)


def damaged_archives(
    instance: dg.DagsterInstance, spec: DatasetSpec, asset: dg.AssetKey, archives: Collection[str]
) -> list[FailedCheck]:
    """Those of `archives` whose data in `asset` were found damaged: by its own checks, or by an audit of it or of what
    is made of it. Three or four queries, and one for each archive of which such a check ever failed.
    """
    keys = archive_keys(spec)
    audited = [key for key in keys[keys.index(asset) :] if key in audited_keys(spec)]
    checks = [dg.AssetCheckKey(key, AUDITED) for key in audited]
    checks += [dg.AssetCheckKey(asset, name) for name in _of_files(spec, asset)]
    found = _failed_of(instance, checks, archives) if archives else ()
    return [check for check in found if check.damaged and check.asset == asset]


def _of_files(spec: DatasetSpec, asset: dg.AssetKey) -> Iterator[str]:
    """The checks of a stage itself that read its files."""
    for stage in ARCHIVE_STAGES:
        if asset.path[-1].partition("_")[0] == stage:
            yield from (name for name in checks_of(stage) if name in OF_WHAT_IS_ON_DISK)


def _failed_of(
    instance: dg.DagsterInstance, keys: Sequence[dg.AssetCheckKey], archives: Collection[str] | None
) -> Iterator[FailedCheck]:
    for key in keys:
        for record in _failed_last(instance, key, archives):
            found = _failed_check(instance, key, record)
            if found is not None:
                yield found


def _failed_last(
    instance: dg.DagsterInstance, key: dg.AssetCheckKey, archives: Collection[str] | None
) -> Iterator[AssetCheckExecutionRecord]:
    """The result of each archive of which the check failed when it was evaluated last."""
    storage = instance.event_log_storage
    history = storage.get_asset_check_execution_history
    failed: dict[str | None, AssetCheckExecutionRecord] = {}
    for record in history(key, limit=FAILED_RESULTS, status={_FAILED}):  # the newest first
        if archives is None or record.partition in archives:
            failed.setdefault(record.partition, record)
    if None in failed:  # of a merged index
        (latest,) = history(key, limit=1, status={_FAILED, _SUCCEEDED})
        if latest.id == failed[None].id:
            yield failed[None]
    partitions = [archive for archive in failed if archive is not None]
    for start in range(0, len(partitions), ARCHIVES_AT_A_TIME):
        some = partitions[start : start + ARCHIVES_AT_A_TIME]
        for info in storage.get_asset_check_partition_info([key], partition_keys=some):
            status = info.latest_execution_status
            if status is _PLANNED:  # by a run that goes on, or has died: what was there before counts
                of_archive = PartitionKeyFilter(key=info.partition_key)
                (latest,) = history(key, limit=1, status={_FAILED, _SUCCEEDED}, partition_filter=of_archive)
                status = latest.status
            if status is _FAILED:
                yield failed[info.partition_key]


def _failed_check(
    instance: dg.DagsterInstance, key: dg.AssetCheckKey, record: AssetCheckExecutionRecord
) -> FailedCheck | None:
    """What a failed result says today; None if what it says was mended since."""
    assert record.event is not None
    evaluation = record.event.get_dagster_event().asset_check_evaluation_data
    own, at_s = key.asset_key, record.event.timestamp
    facts = {name: value.value for name, value in evaluation.metadata.items()}
    asset, begin = (dg.AssetKey([own.path[0], str(facts.get(name, own.path[-1]))]) for name in (STAGE_FACT, BEGIN_FACT))
    # An audit that names no stage has not found the data where their run has put them, and says nothing of their state.
    damaged = key.name in OF_WHAT_IS_ON_DISK and (key.name != AUDITED or STAGE_FACT in facts)
    if key.name == AUDITED and _made_since(instance, asset, record.partition, at_s):
        if asset == own or _made_since(instance, own, record.partition, at_s):
            return None
        asset, begin, damaged = own, own, False  # the stage before is mended, and this one waits for its next audit
    return FailedCheck(
        asset=asset,
        begin=begin,
        archive=record.partition or "",
        check=key.name,
        what=evaluation.description or "failed",
        damaged=damaged,
        directory=str(facts.get(DIRECTORY_FACT, "")),
        at_s=at_s,
        run_id=record.run_id,
    )


def _made_since(instance: dg.DagsterInstance, asset: dg.AssetKey, archive: str | None, at_s: float) -> bool:
    partitions = None if archive is None else [archive]
    wanted = dg.AssetRecordsFilter(asset, asset_partitions=partitions, after_timestamp=at_s)
    return bool(instance.fetch_materializations(wanted, limit=1).records)
