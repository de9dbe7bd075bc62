"""Declarative automation: stages follow their upstream, once somebody toggles the sensor `automation`.

An archive is due where its upstream is there, sound and at rest, and it was not made yet, or of another version. One
that failed last is left to the retry. Archives that were never fetched are not due, however many there are: only one
that appears at a source which was observed before. Indexes wait until nothing before them moves.

Dagster's `eager()` asks only for what changes after it was turned on, and cannot see partitioned checks of ranged runs
(decisions/014); so it is composed with conditions of this module, which are evaluated in the code server.

Here: what is due, and the sensor. Not here: which asset has which condition (`orchestration.assets`), what an archive
was made of (`orchestration.archive_run` records it).
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg
from dagster._core.asset_graph_view.entity_subset import EntitySubset
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus

from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.archive_run import DATA_VERSION_TAG, made_of_tag
from md_assets.orchestration.refresh import known_contents

ASK_AGAIN_S = 900.0
"""What was asked for and neither ran nor failed (a run that somebody ended, a backfill that was lost) is due again
after this long: not at once, or what is ended would come back with the next tick."""

OVERLAP_EVENTS = 1000
"""Events before the last tick's newest that are looked at again: PostgreSQL may show a later one first."""

FETCHED_AT_ONCE = 1000
"""Materializations that one query reads."""

_OBSERVED, _MADE = dg.DagsterEventType.ASSET_OBSERVATION, dg.DagsterEventType.ASSET_MATERIALIZATION


class _Stateless(dg.AutomationCondition):
    """A condition without a cursor of its own: Dagster then keeps none of its subsets from tick to tick."""

    @property
    def requires_cursor(self) -> bool:
        return False


class Outdated(dg.AutomationCondition):
    """Archives that were made of another version of their upstream than is there now.

    Judged are those whose upstream has news, by what the archive's materialization says that it was made of; one that
    does not say counts as current. Its cursor remembers up to which event, and what was outdated then.

    Args:
        spec: the dataset.
        upstream: the name of the asset that each archive is made of.
    """

    def __init__(self, spec: DatasetSpec, upstream: str) -> None:
        self._spec = spec
        self._upstream = dg.AssetKey([spec.slug, upstream])
        self._event = _OBSERVED if upstream == "archive" else _MADE

    @property
    def name(self) -> str:
        return f"made of another version of {self._upstream.to_user_string()}"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        log = context.asset_graph_view.instance.event_log_storage
        seen: dict[str, Any] = json.loads(context.cursor) if context.cursor else {"until": 0, "outdated": []}
        before = set(seen["outdated"])
        after = max(0, seen["until"] - OVERLAP_EVENTS)
        news = log.get_latest_storage_id_by_partition(self._upstream, self._event, after_cursor=after)
        judged: dict[str, int] = {}
        if suspects := {*news, *before}:
            made = log.get_latest_storage_id_by_partition(context.key, _MADE, partitions=suspects)
            judged = {archive: at for archive, at in made.items() if archive in before or news[archive] > at}
        outdated = self._outdated(context, judged) if judged else []
        cursor = json.dumps({"until": context.max_storage_id or 0, "outdated": sorted(outdated)})
        return dg.AutomationResult(context, _among(context, outdated), cursor=cursor)

    def _outdated(self, context: dg.AutomationContext, judged: Mapping[str, int]) -> list[str]:
        """Those of some archives, given with the storage ids of their materializations."""
        instance = context.asset_graph_view.instance
        if self._event is _OBSERVED:
            now = known_contents(instance, self._spec)
        else:
            tags = instance.event_log_storage.get_latest_tags_by_partition(self._upstream, _MADE, [DATA_VERSION_TAG])
            now = {archive: of[DATA_VERSION_TAG] for archive, of in tags.items()}
        made_of = _made_of(
            instance, context.key, self._upstream, [at for archive, at in judged.items() if archive in now]
        )
        return [archive for archive, version in made_of.items() if now[archive] != version]


class Appeared(dg.AutomationCondition):
    """Archives that the source did not have when automation first saw a whole observation of it.

    Its cursor remembers the archives that were absent then. Before the first observation there is nothing to compare
    with: what that finds counts as known.
    """

    def __init__(self, spec: DatasetSpec) -> None:
        self._spec = spec
        self._archive = dg.AssetKey([spec.slug, "archive"])

    @property
    def name(self) -> str:
        return "appeared at the source"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        instance = context.asset_graph_view.instance
        cursor = context.cursor
        if cursor is None:
            if self._observed_whole(instance):
                observed = instance.event_log_storage.get_latest_storage_id_by_partition(self._archive, _OBSERVED)
                cursor = json.dumps([archive for archive in self._spec.archives if archive not in observed])
            return dg.AutomationResult(context, context.get_empty_subset(), cursor=cursor)
        absent = set(json.loads(cursor))
        log = instance.event_log_storage
        appeared = log.get_latest_storage_id_by_partition(self._archive, _OBSERVED, partitions=absent) if absent else {}
        return dg.AutomationResult(context, _among(context, appeared), cursor=cursor)

    def _observed_whole(self, instance: dg.DagsterInstance) -> bool:
        """Whether the run of the newest observation succeeded: one that still runs, or died, has not told all."""
        for record in instance.fetch_observations(self._archive, limit=1).records:
            run = instance.get_run_by_id(record.run_id) if record.run_id else None
            return run is None or run.is_success
        return False


class Idle(_Stateless):
    """What is neither in progress nor failed last."""

    @property
    def name(self) -> str:
        return "neither in progress nor failed last"

    async def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[override]
        view, subset = context.asset_graph_view, context.candidate_subset
        failed = await view.compute_execution_failed_subset(key=context.key, from_subset=subset)
        for other in (failed, *await _moving(context, context.key)):
            subset = subset.compute_difference(other)
        return dg.AutomationResult(context, subset)


class Ready(_Stateless):
    """Archives of which everything upstream is there and at rest, and none of whose checks there failed last.

    Every check of a stage blocks what follows. (`blocking` of Dagster's own works within one run, where it would also
    skip what follows a check that is not evaluated by that run.)
    """

    @property
    def name(self) -> str:
        return "upstream is there, at rest and sound"

    async def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[override]
        view, subset = context.asset_graph_view, context.candidate_subset
        upstream = context.asset_graph.get(context.key).parent_keys
        for asset in sorted(upstream):
            missing = await view.compute_missing_subset(key=asset, from_subset=view.get_full_subset(key=asset))
            for other in (missing, *await _moving(context, asset)):
                subset = subset.compute_difference(other.compute_mapped_subset(context.key, direction="down"))
        archives = subset.expensively_compute_partition_keys()
        unsound = set()
        if archives:
            log = view.instance.event_log_storage
            checks = sorted(context.asset_graph.get_check_keys_for_assets(upstream))
            failed = AssetCheckExecutionRecordStatus.FAILED
            for found in log.get_asset_check_partition_info(checks, partition_keys=sorted(archives)):
                if found.latest_execution_status is failed:
                    unsound.add(found.partition_key)
        return dg.AutomationResult(context, _among(context, archives - unsound))


class AtRest(_Stateless):
    """True where nothing of some assets is in progress or asked for in this tick."""

    def __init__(self, assets: Iterable[dg.AssetKey]) -> None:
        self._assets = tuple(assets)

    @property
    def name(self) -> str:
        return f"nothing of {', '.join(asset.to_user_string() for asset in self._assets)} is in progress"

    async def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[override]
        moving = [subset for asset in self._assets for subset in await _moving(context, asset)]
        at_rest = all(subset.is_empty for subset in moving)
        return dg.AutomationResult(context, context.candidate_subset if at_rest else context.get_empty_subset())


class Enough(_Stateless):
    """Archives, where there are as many as a run takes.

    A run that encodes loads its models first, which takes as long as some archives do: with as many runs as there are
    ticks, a GPU would be busy with that for half of the time.
    """

    def __init__(self, archives: int) -> None:
        self._archives = archives

    @property
    def name(self) -> str:
        return f"{self._archives} archives or more are due"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        subset = context.candidate_subset
        return dg.AutomationResult(context, subset if subset.size >= self._archives else context.get_empty_subset())


class Unmerged(_Stateless):
    """True of a merged index where archives were made since that it does not have, or in another version."""

    def __init__(self, stage: dg.AssetKey) -> None:
        self._stage = stage

    @property
    def name(self) -> str:
        return f"archives of {self._stage.to_user_string()} changed"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        instance = context.asset_graph_view.instance
        record = next(iter(instance.get_asset_records([context.key])), None)
        merged_at = (record.asset_entry.last_materialization_storage_id if record else None) or 0
        log = instance.event_log_storage
        news = log.get_latest_tags_by_partition(self._stage, _MADE, [DATA_VERSION_TAG], after_cursor=merged_at)
        known: Mapping[str, Any] = {}
        if news and merged_at:
            known = log.get_latest_tags_by_partition(
                self._stage, _MADE, [DATA_VERSION_TAG], asset_partitions=list(news), before_cursor=merged_at
            )
        changed = any(known.get(archive) != version for archive, version in news.items())
        return dg.AutomationResult(context, context.candidate_subset if changed else context.get_empty_subset())


class Fetched(_Stateless):
    """True where an archive of the dataset was fetched."""

    def __init__(self, raw: dg.AssetKey) -> None:
        self._raw = raw

    @property
    def name(self) -> str:
        return f"some {self._raw.to_user_string()} is there"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        record = next(iter(context.asset_graph_view.instance.get_asset_records([self._raw])), None)
        there = bool(record and record.asset_entry.last_materialization_storage_id)
        return dg.AutomationResult(context, context.candidate_subset if there else context.get_empty_subset())


class NotAsked(dg.AutomationCondition):
    """What was not asked for within `ASK_AGAIN_S`. The last of all conditions: what is left here is asked for now.

    Assets without partitions are asked for one dataset at a time: Dagster gives all those of a tick to one run, which
    then belongs to no dataset.
    """

    @property
    def name(self) -> str:
        return "not asked for lately"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        now_s = context.evaluation_time.timestamp()
        asked: dict[str, float] = json.loads(context.cursor) if context.cursor else {}
        asked = {archive: at_s for archive, at_s in asked.items() if at_s > now_s - ASK_AGAIN_S}
        subset = context.candidate_subset
        if subset.is_partitioned:
            due = subset.expensively_compute_partition_keys() - asked.keys()
            subset = _among(context, due)
        else:
            due = set() if subset.is_empty or asked or _others_asked(context) else {""}
            subset = subset if due else context.get_empty_subset()
        cursor = json.dumps({**asked, **dict.fromkeys(sorted(due), now_s)})
        return dg.AutomationResult(context, subset, cursor=cursor)


async def _moving(context: dg.AutomationContext, asset: dg.AssetKey) -> list[EntitySubset]:
    """What of an asset runs or waits in the queue, is still to come in a backfill, and is asked for in this tick."""
    view = context.asset_graph_view
    full = view.get_full_subset(key=asset)
    return [
        await view.compute_run_in_progress_subset(key=asset, from_subset=full),
        await view.compute_backfill_in_progress_subset(key=asset, from_subset=full),
        context.request_subsets_by_key.get(asset) or view.get_empty_subset(key=asset),
    ]


def _others_asked(context: dg.AutomationContext) -> bool:
    """Whether this tick asks for an asset without partitions of another dataset."""
    return any(
        isinstance(key, dg.AssetKey) and key.path[0] != context.key.path[0] and not subset.is_empty
        for key, subset in context.request_subsets_by_key.items()
        if not subset.is_partitioned
    )


def _among(context: dg.AutomationContext, archives: Iterable[str]) -> EntitySubset:
    """Those of the candidates."""
    return context.candidate_subset.compute_intersection_with_partition_keys(set(archives))


def _made_of(
    instance: dg.DagsterInstance, key: dg.AssetKey, upstream: dg.AssetKey, storage_ids: list[int]
) -> dict[str, str]:
    """The version of the upstream that materializations say they were made of, by archive."""
    found: dict[str, str] = {}
    for start in range(0, len(storage_ids), FETCHED_AT_ONCE):
        wanted = dg.AssetRecordsFilter(key, storage_ids=storage_ids[start : start + FETCHED_AT_ONCE])
        for record in instance.fetch_materializations(wanted, limit=FETCHED_AT_ONCE).records:
            made = record.asset_materialization
            version = (made.tags or {}).get(made_of_tag(upstream)) if made else None
            if made and made.partition and version:
                found[made.partition] = version
    return found


def raw_condition(spec: DatasetSpec) -> dg.AutomationCondition:
    """raw: where the source has another content than it was made of, or an archive that it did not have before."""
    appeared = Appeared(spec) & dg.AutomationCondition.missing()
    return (Outdated(spec, "archive") | appeared) & Idle() & NotAsked()


def follow_condition(spec: DatasetSpec, upstream: str, at_once: int = 1) -> dg.AutomationCondition:
    """A later stage, or a subset's: made of each archive of `upstream`, and again where that changed.

    Args:
        at_once: archives that are waited for, as long as anything of raw or mds moves.
    """
    due = (dg.AutomationCondition.missing() | Outdated(spec, upstream)) & Ready() & Idle()
    if at_once > 1:
        due &= Enough(at_once) | AtRest([dg.AssetKey([spec.slug, name]) for name in ("raw", "mds")])
    return due & NotAsked()


def index_condition(spec: DatasetSpec, stage: str) -> dg.AutomationCondition:
    """A merged index: once for all that changed, when nothing before it moves any more.

    Args:
        stage: the name of the asset whose archives it covers.
    """
    chain = ["raw", "mds", *(["latents"] if stage.startswith("latents") else [])]
    before = [dg.AssetKey([spec.slug, name]) for name in dict.fromkeys([*chain, stage])]
    return AtRest(before) & Unmerged(dg.AssetKey([spec.slug, stage])) & Idle() & NotAsked()


def annotations_condition(spec: DatasetSpec) -> dg.AutomationCondition:
    """The captions: indexed once, as soon as an archive waits for them. Never indexed anew by themselves."""
    raw = dg.AssetKey([spec.slug, "raw"])
    return dg.AutomationCondition.missing() & Fetched(raw) & Idle() & NotAsked()


automation_sensor = dg.AutomationConditionSensorDefinition(
    name="automation",
    target=dg.AssetSelection.all(),
    use_user_code_server=True,  # where this module's conditions are known
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Starts what is due: mds, latents and subsets of archives whose upstream is there and sound, raw of "
    "archives that changed or appeared at their source, captions and merged indexes. It never starts what was not "
    "fetched yet, nor what failed last.",
)
"""Off until somebody toggles it."""
