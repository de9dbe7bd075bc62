"""Backfills: archives × stages that people ask for, handed to Dagster as one asset backfill.

Here: which archives and assets a backfill is about, and its launch into an instance. Not here: following it
(`orchestration.backfill_progress`); carrying it out is the daemon's work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.automation_tick_evaluation_context import build_run_requests_with_backfill_policies
from dagster._core.definitions.events import AssetKeyPartitionKey
from dagster._core.execution.backfill import PartitionBackfill
from dagster._core.utils import make_new_backfill_id

from md_assets.core.errors import SettingsError
from md_assets.core.paths import ARCHIVE_STAGES, Stage
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.failures import ATTEMPT_TAG, FailedArchive, causes
from md_assets.orchestration.partitions import archive_partitions
from md_assets.orchestration.records import keep_connection

SMALL, WHOLE = "small subset", "whole"
"""What the ~1 % subset and all of a dataset are called in titles."""

RANGE = "..."
"""Between the first and the last archive of a range; Dagster forbids it in partition keys."""

DATASET_TAG = "md_assets/dataset"
"""On every run of a backfill, so that limits of the run queue can tell datasets apart."""

HOME_VARIABLE = "DAGSTER_HOME"

HEARTBEAT_S = 90.0
"""Age of the newest heartbeat up to which a daemon is taken to run; daemons give one every 30 s."""


@dataclass(frozen=True)
class AssetPlan:
    """What a backfill asks of an asset that is made archive by archive.

    Attributes:
        asset: e.g. `jdb/mds`.
        archives: IDs in upstream's order, at least one.
        left_out: archives that were asked for, but whose upstream neither exists nor is part of the backfill.
        runs: runs that it takes if nothing fails.
    """

    asset: dg.AssetKey
    archives: tuple[str, ...]
    left_out: tuple[str, ...]
    runs: int


@dataclass(frozen=True)
class BackfillPlan:
    """What a backfill will be about.

    Attributes:
        title: what the UI calls it.
        dataset: slug.
        assets: those that are made archive by archive; upstream first.
        whole: those that are made as a whole: captions that were never indexed, and merged indexes.
        attempt: for how many times these archives are tried, without anybody having asked for it.
        why: lines about the occasion.
    """

    title: str
    dataset: str
    assets: tuple[AssetPlan, ...]
    whole: tuple[dg.AssetKey, ...]
    attempt: int = 1
    why: tuple[str, ...] = ()

    @property
    def archives(self) -> int:
        """How many archives it is about."""
        return len({archive for plan in self.assets for archive in plan.archives})

    @property
    def runs(self) -> int:
        """Runs that it takes if nothing fails."""
        return sum(plan.runs for plan in self.assets) + len(self.whole)

    def lines(self) -> Iterator[str]:
        """What people are told before it starts."""
        yield f"{self.title}: {_count(self.runs, 'run')} if nothing fails"
        for plan in self.assets:
            line = f"  {plan.asset.to_user_string()}: {_count(len(plan.archives), 'archive')}"
            line += f" in {_count(plan.runs, 'run')}"
            yield line + (f"; {len(plan.left_out):,} left out, as their upstream is missing" if plan.left_out else "")
        for asset in self.whole:
            yield f"  {asset.to_user_string()}"
        yield from (f"  {line}" for line in self.why)

    def launch(self, instance: dg.DagsterInstance, asset_graph: BaseAssetGraph) -> str:
        """Hand it to the instance, whose daemon carries it out; returns its ID."""
        wanted = {AssetKeyPartitionKey(plan.asset, archive) for plan in self.assets for archive in plan.archives}
        wanted |= {AssetKeyPartitionKey(asset) for asset in self.whole}
        backfill = PartitionBackfill.from_asset_graph_subset(
            backfill_id=make_new_backfill_id(),
            backfill_timestamp=time.time(),
            tags={DATASET_TAG: self.dataset, **({ATTEMPT_TAG: str(self.attempt)} if self.attempt > 1 else {})},
            dynamic_partitions_store=instance,
            asset_graph_subset=AssetGraphSubset.from_asset_partition_set(wanted, asset_graph),
            title=self.title,
            description=None,
            run_config=None,
        )
        instance.add_backfill(backfill)
        return backfill.backfill_id


def plan_backfill(
    instance: dg.DagsterInstance,
    asset_graph: BaseAssetGraph,
    spec: DatasetSpec,
    archives: Sequence[str],
    stages: Sequence[Stage] = ARCHIVE_STAGES,
    what: str = "",
) -> BackfillPlan:
    """Plan a backfill of `archives` through `stages`.

    A stage is asked for only where its upstream exists or is part of the backfill. Subsets of a dataset belong to
    their stage. Captions are indexed on the way where that was never done; merged indexes are made at the end.

    Args:
        instance: knows what is materialized.
        asset_graph: of the definitions.
        archives: IDs in upstream's order, at least one.
        what: what these archives are, for the title; e.g. `small subset`.

    Raises:
        SettingsError: there is nothing to do.
    """
    assets = archive_assets(asset_graph, spec, stages)
    what = f"{what} of {_count(len(archives), 'archive')}" if what else _some(archives)
    return _plan(instance, asset_graph, spec, dict.fromkeys(assets, archives), stages, what)


def plan_failed(
    instance: dg.DagsterInstance,
    asset_graph: BaseAssetGraph,
    spec: DatasetSpec,
    failed: Iterable[FailedArchive],
    stages: Sequence[Stage] = ARCHIVE_STAGES,
    attempt: int = 1,
) -> BackfillPlan | None:
    """Plan another attempt at what failed: each archive from the stage on where it failed, or where it must be begun.

    Args:
        failed: some or all that `orchestration.failures.all_failed` gives.
        attempt: what to tag its runs with.

    Returns: None if nothing failed in these stages.

    Raises:
        SettingsError: there is nothing that can be done.
    """
    assets = archive_assets(asset_graph, spec, stages)
    indexes = _merged_indexes(asset_graph, spec, assets)
    failed = [one for one in failed if one.asset in (*assets, *indexes)]
    wanted: dict[dg.AssetKey, tuple[str, ...]] = {}
    for asset in assets:
        again = {one.archive for one in failed if asset in (one.asset, one.begin)}
        again = again.union(*(wanted.get(parent, ()) for parent in asset_graph.get(asset).parent_keys))
        if again:
            wanted[asset] = tuple(archive for archive in spec.archives if archive in again)
    unsound = tuple(index for index in indexes if any(one.asset == index for one in failed))
    if not wanted and not unsound:
        return None
    if wanted:
        what = _count(len(set().union(*wanted.values())), "failed archive")
        plan = _plan(instance, asset_graph, spec, wanted, stages, what)
        whole = (*plan.whole, *(index for index in unsound if index not in plan.whole))
    else:
        plan, whole = BackfillPlan(f"{spec.slug}: merged indexes", spec.slug, (), ()), unsound
    return replace(plan, whole=whole, attempt=attempt, why=tuple(causes(failed)))


def plan_merge(
    instance: dg.DagsterInstance, asset_graph: BaseAssetGraph, spec: DatasetSpec, indexes: Sequence[dg.AssetKey]
) -> BackfillPlan | None:
    """Plan a backfill that only merges indexes over what is published; None if there is nothing to merge."""
    whole = tuple(
        index
        for index in indexes
        if any(instance.get_materialized_partitions(stage) for stage in asset_graph.get(index).parent_keys)
    )
    return BackfillPlan(f"{spec.slug}: merged indexes", spec.slug, (), whole) if whole else None


def _plan(
    instance: dg.DagsterInstance,
    asset_graph: BaseAssetGraph,
    spec: DatasetSpec,
    wanted: Mapping[dg.AssetKey, Sequence[str]],
    stages: Sequence[Stage],
    what: str,
) -> BackfillPlan:
    """Plan what is wanted of each asset, upstream first, where its upstream exists or will."""
    plans: dict[dg.AssetKey, AssetPlan] = {}
    for asset, archives in wanted.items():
        there = [
            instance.get_materialized_partitions(parent).union(plans[parent].archives if parent in plans else ())
            for parent in asset_graph.get(asset).parent_keys
            if _is_archive_asset(asset_graph, spec, parent)
        ]
        possible = tuple(archive for archive in archives if all(archive in ids for ids in there))
        left_out = tuple(archive for archive in archives if not all(archive in ids for ids in there))
        if possible:
            plans[asset] = AssetPlan(asset, possible, left_out, _runs(instance, asset_graph, asset, possible))
    if not plans:
        first, archives = next(iter(wanted.items()))
        raise SettingsError(
            f"nothing to do: {first.to_user_string()} of {_some(archives)} has no upstream that is materialized",
            "Add the stage before it to --stages; what is published is passed over",
        )
    whole = (*_captions(instance, asset_graph, plans), *_merged_indexes(asset_graph, spec, plans))
    return BackfillPlan(f"{spec.slug}: {what}, {', '.join(stages)}", spec.slug, tuple(plans.values()), whole)


def archive_assets(
    asset_graph: BaseAssetGraph, spec: DatasetSpec, stages: Sequence[Stage] = ARCHIVE_STAGES
) -> list[dg.AssetKey]:
    """The assets of these stages that are made archive by archive, also those of subsets; upstream first."""
    return [
        key
        for key in asset_graph.toposorted_asset_keys
        if _is_archive_asset(asset_graph, spec, key) and key.path[-1].partition("_")[0] in stages
    ]


def choose_archives(spec: DatasetSpec, text: str) -> tuple[str, ...]:
    """The archives that `text` names: IDs and ranges `FIRST...LAST`, with commas between them; in upstream's order.

    Raises:
        SettingsError: there is no such archive, or a range runs backwards.
    """
    numbers = {archive: number for number, archive in enumerate(spec.archives)}
    chosen: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, found, last = part.partition(RANGE)
        for archive in (first, last) if found else (first,):
            if archive not in numbers:
                raise SettingsError(
                    f"{spec.slug} has no archive {archive!r}",
                    f"Its IDs are {spec.archives[0]} to {spec.archives[-1]}; separate several by commas and write "
                    f"ranges as FIRST{RANGE}LAST",
                )
        if found and numbers[first] > numbers[last]:
            raise SettingsError(f"the range {part} of {spec.slug} runs backwards", f"Write {last}{RANGE}{first}")
        chosen.update(range(numbers[first], numbers[last if found else first] + 1))
    if not chosen:
        raise SettingsError(f"no archive of {spec.slug} is named", f"Its first one is {spec.archives[0]}")
    return tuple(spec.archives[number] for number in sorted(chosen))


def choose_stages(text: str) -> tuple[Stage, ...]:
    """The stages that `text` names, with commas between them; in their order.

    Raises:
        SettingsError: there is no such stage.
    """
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in ARCHIVE_STAGES:
            raise SettingsError(f"there is no stage {name!r}", f"Choose of {','.join(ARCHIVE_STAGES)}")
    return tuple(stage for stage in ARCHIVE_STAGES if stage in named)


def ui_path(backfill_id: str) -> str:
    """Where Dagster's UI shows a backfill, below its address."""
    return f"/runs/b/{backfill_id}"


def persistent_instance() -> dg.DagsterInstance:
    """The instance of DAGSTER_HOME, in which a backfill outlives this process; for processes that have no other.

    Raises:
        SettingsError: there is none.
    """
    home = os.environ.get(HOME_VARIABLE, "")
    if not Path(home).is_absolute() or not Path(home).is_dir():
        raise SettingsError(
            f"{HOME_VARIABLE} is {f'{home!r}, which is no folder by its full path' if home else 'not set'}",
            "Set it to the folder that `dagster dev` works with, or the backfill would be lost",
        )
    instance = dg.DagsterInstance.get()
    keep_connection(instance)
    return instance


def a_daemon_runs(instance: dg.DagsterInstance) -> bool:
    """Whether a daemon of the instance gave a heartbeat lately."""
    heartbeats = instance.get_daemon_heartbeats().values()
    return any(time.time() - heartbeat.timestamp < HEARTBEAT_S for heartbeat in heartbeats)


def _is_archive_asset(asset_graph: BaseAssetGraph, spec: DatasetSpec, key: dg.AssetKey) -> bool:
    """Whether an asset is made by this platform, one partition for each archive of the dataset."""
    if key.path[0] != spec.slug or not asset_graph.has(key):
        return False
    node = asset_graph.get(key)
    return node.is_materializable and node.partitions_def == archive_partitions(spec)


def _captions(
    instance: dg.DagsterInstance, asset_graph: BaseAssetGraph, targets: Collection[dg.AssetKey]
) -> list[dg.AssetKey]:
    """Assets without partitions that `targets` need and that never were materialized.

    One that was is left alone: made again, it would be newer than all shards of the dataset.
    """
    needed = {parent for key in targets for parent in asset_graph.get(key).parent_keys}
    return [
        key
        for key in asset_graph.toposorted_asset_keys
        if key in needed and asset_graph.get(key).is_materializable and not asset_graph.get(key).is_partitioned
        if instance.get_latest_materialization_event(key) is None
    ]


def _merged_indexes(
    asset_graph: BaseAssetGraph, spec: DatasetSpec, targets: Collection[dg.AssetKey]
) -> list[dg.AssetKey]:
    """The assets of the dataset that take all archives of some of `targets` together, and nothing else."""
    return [
        key
        for key in asset_graph.toposorted_asset_keys
        if key.path[0] == spec.slug and not asset_graph.get(key).is_partitioned
        if asset_graph.get(key).parent_keys and asset_graph.get(key).parent_keys <= set(targets)
    ]


def _runs(instance: dg.DagsterInstance, asset_graph: BaseAssetGraph, key: dg.AssetKey, archives: Sequence[str]) -> int:
    """Runs for these archives, as the daemon cuts them: a range each, not longer than the asset's policy says."""
    wanted = {AssetKeyPartitionKey(key, archive) for archive in archives}
    return len(build_run_requests_with_backfill_policies(wanted, asset_graph, instance))


def _some(archives: Sequence[str]) -> str:
    """What a title or a message calls these archives."""
    if len(archives) == 1:
        return archives[0]
    return f"{_count(len(archives), 'archive')} from {archives[0]} to {archives[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
