"""What automation asks for, and what it leaves alone, over the real assets and a half-done dataset of 14,000."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any

import dagster as dg
import pytest
from dagster._core.events import AssetObservationData, DagsterEvent
from dagster._core.storage.event_log.schema import AssetEventTagsTable, SqlEventLogStorageTable
from dagster._core.utils import make_new_run_id
from dagster._daemon.sensor import _submit_backfill_request
from sqlalchemy import select

from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.diffdb import SPEC as DIFFDB
from md_assets.datasets.jdb import SPEC
from md_assets.datasets.textcaps import SPEC as TEXTCAPS
from md_assets.definitions import defs
from md_assets.orchestration.archive_run import DATA_VERSION_TAG, made_of_tag
from md_assets.orchestration.assets import archives_per_run
from md_assets.orchestration.automation import ASK_AGAIN_S, automation_sensor

ALL = SPEC.archives
MADE_OF = {"raw": "archive", "mds": "raw", "latents": "mds", "mds_minres512": "mds", "latents_minres512": "latents"}

Asked = dict[str, set[str]]


@dataclass
class Ticks:
    """Automation of one dataset on an instance of its own."""

    instance: dg.DagsterInstance
    dataset: str = SPEC.slug
    now: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    cursor: Any = None

    def key(self, asset: str) -> dg.AssetKey:
        return dg.AssetKey([self.dataset, asset])

    def tick(self, later_s: float = 30) -> Asked:
        """What one tick asks for, by asset; of an asset without partitions, an empty name."""
        self.now += timedelta(seconds=later_s)
        result = dg.evaluate_automation_conditions(
            defs, self.instance, dg.AssetSelection.groups(self.dataset), self.now, self.cursor
        )
        self.cursor = result.cursor
        assets = [one.key for one in result.results]
        asked = {asset.path[-1]: {p or "" for p in result.get_requested_partitions(asset)} for asset in assets}
        return {asset: archives for asset, archives in asked.items() if archives}

    def made(self, asset: str, archives: Iterable[str], version: str = "1", made_of: str = "1") -> None:
        """Record that archives were made, in which version and of which version of their upstream."""
        tags = {DATA_VERSION_TAG: version, made_of_tag(self.key(MADE_OF[asset])): made_of}
        self._record([dg.AssetMaterialization(self.key(asset), partition=archive, tags=tags) for archive in archives])

    def merged(self, *assets: str) -> None:
        """Record that assets without partitions were made."""
        for asset in assets:
            self.instance.report_runless_asset_event(dg.AssetMaterialization(self.key(asset)))

    def observed(self, archives: Iterable[str], version: str = "1") -> None:
        """Record what archives are at their source."""
        tags = {DATA_VERSION_TAG: version}
        self._record([dg.AssetObservation(self.key("archive"), partition=archive, tags=tags) for archive in archives])

    def checked(self, asset: str, archive: str, check: str, passed: bool) -> None:
        """Record the result of a check, in a run of its own."""
        key = self.key(asset)
        result = dg.AssetCheckEvaluation(asset_key=key, check_name=check, passed=passed, metadata={}, partition=archive)
        self._report(dg.DagsterEventType.ASSET_CHECK_EVALUATION, result, make_new_run_id())

    def observed_in(self, run: dg.DagsterRun, archive: str) -> None:
        """Record an observation of an archive by a run."""
        observation = dg.AssetObservation(self.key("archive"), partition=archive, tags={DATA_VERSION_TAG: "1"})
        self._report(dg.DagsterEventType.ASSET_OBSERVATION, AssetObservationData(observation), run.run_id)

    def _report(self, kind: dg.DagsterEventType, what: Any, run_id: str) -> None:
        self.instance.report_dagster_event(DagsterEvent(kind.value, event_specific_data=what, job_name="test"), run_id)

    def started(self, asset: str, first: str = "", last: str = "") -> dg.DagsterRun:
        """A run over a range of archives that has not ended."""
        tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={self.key(asset)})
        selection = frozenset({self.key(asset)})
        return self.instance.create_run_for_job(job, tags=tags if first else {}, asset_selection=selection)

    def failed(self, asset: str, first: str = "", last: str = "") -> None:
        """A run over a range of archives that failed before it made one."""
        self.instance.report_run_failed(self.started(asset, first, last))

    def _record(self, events: Sequence[Any]) -> None:
        """Store events as `report_runless_asset_event` does, all but the first and last as copies of the first's rows:
        one at a time, tens of thousands would take minutes."""
        first, *others = events
        self.instance.report_runless_asset_event(first)
        if others:
            self._copy(first, others[:-1])
            self.instance.report_runless_asset_event(others[-1])

    def _copy(self, first: Any, others: Sequence[Any]) -> None:
        events, tags = SqlEventLogStorageTable, AssetEventTagsTable
        log: Any = self.instance.event_log_storage
        at = log.get_maximum_record_id()
        with log.index_connection() as connection:
            row = connection.execute(select(events).where(events.c.id == at)).mappings().one()
            tag = connection.execute(select(tags).where(tags.c.event_id == at)).mappings().one()
            rows = [
                {
                    **row,
                    "id": at + n,
                    "partition": o.partition,
                    "event": row["event"].replace(first.partition, o.partition),
                }
                for n, o in enumerate(others, 1)
            ]
            if rows:
                connection.execute(events.insert(), rows)
                blank = {name: value for name, value in tag.items() if name != "id"}
                connection.execute(tags.insert(), [{**blank, "event_id": copy["id"]} for copy in rows])


@pytest.fixture
def ticks() -> Iterator[Ticks]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Ticks(instance)


def half_done(ticks: Ticks, raw: int = 40, mds: int = 30, latents: int = 20) -> None:
    """Captions, and the first archives of each stage."""
    ticks.merged("annotations")
    ticks.observed(ALL[: raw + 10])
    for stage, count in (("raw", raw), ("mds", mds), ("latents", latents)):
        ticks.made(stage, ALL[:count])


def test_over_a_half_done_dataset_of_14000_only_what_is_due_is_asked_for(ticks: Ticks) -> None:
    ticks.dataset, archives = DIFFDB.slug, DIFFDB.archives
    assert len(archives) == 14_000
    ticks.merged("annotations")
    ticks.observed(archives)
    for stage, count in (("raw", 7000), ("mds", 6700), ("latents", 6500)):
        ticks.made(stage, archives[:count])
    ticks.merged("mds_index", "latents_index")
    ticks.observed([archives[20]], "2")  # changed at its source
    ticks.made("raw", [archives[10]], "2")  # changed since mds was made of it
    ticks.made("raw", [archives[11]])  # made again, the same
    ticks.failed("mds", archives[6700], archives[6709])
    ticks.started("mds", archives[6710], archives[6719])
    ticks.failed("latents", archives[6500], archives[6500])
    ticks.checked("raw", archives[6720], "tar_intact", passed=False)
    ticks.checked("mds", archives[6501], "audited", passed=False)

    due = {"raw": {archives[20]}, "mds": {archives[10], *archives[6721:7000]}, "latents": {*archives[6502:6700]}}
    assert ticks.tick() == due
    assert ticks.tick() == {}


def test_nothing_is_asked_for_on_a_fresh_instance(ticks: Ticks) -> None:
    assert ticks.tick() == {}
    ticks.observed(ALL[:50])  # the first observation
    assert ticks.tick() == {}


def test_what_changed_goes_through_all_stages_and_then_into_the_indexes(ticks: Ticks) -> None:
    half_done(ticks, 40, 40, 40)
    ticks.merged("mds_index", "latents_index")
    assert ticks.tick() == {}
    ticks.observed([ALL[3]], "2")
    assert ticks.tick() == {"raw": {ALL[3]}}
    ticks.made("raw", [ALL[3]], "2", made_of="2")
    assert ticks.tick() == {"mds": {ALL[3]}}
    ticks.made("mds", [ALL[3]], "2", made_of="2")
    assert ticks.tick() == {"latents": {ALL[3]}, "mds_index": {""}}
    ticks.merged("mds_index")
    ticks.made("latents", [ALL[3]], "2", made_of="2")
    assert ticks.tick() == {"latents_index": {""}}
    ticks.merged("latents_index")
    assert ticks.tick(ASK_AGAIN_S + 1) == {}


def test_archives_that_were_made_again_the_same_change_nothing(ticks: Ticks) -> None:
    half_done(ticks, 10, 10, 10)
    ticks.merged("mds_index", "latents_index")
    for stage in ("raw", "mds", "latents"):
        ticks.made(stage, ALL[:10])
        assert ticks.tick() == {}


def test_an_archive_made_of_an_older_version_than_the_newest_is_asked_for_again(ticks: Ticks) -> None:
    half_done(ticks, 3, 3, 3)
    ticks.tick()
    ticks.made("raw", [ALL[1]], "2")
    assert ticks.tick() == {"mds": {ALL[1]}}
    ticks.made("raw", [ALL[1]], "3")
    ticks.made("mds", [ALL[1]], "2", made_of="2")  # its run had begun before
    assert ticks.tick(ASK_AGAIN_S + 1)["mds"] == {ALL[1]}
    ticks.made("mds", [ALL[1]], "3", made_of="3")
    assert "mds" not in ticks.tick(ASK_AGAIN_S + 1)


def test_a_red_check_holds_back_what_follows_until_it_is_green(ticks: Ticks) -> None:
    half_done(ticks, 2, 1, 1)
    ticks.merged("mds_index", "latents_index")
    ticks.checked("raw", ALL[1], "counts_balance", passed=False)
    assert ticks.tick() == {}
    ticks.checked("raw", ALL[1], "counts_balance", passed=True)
    assert ticks.tick() == {"mds": {ALL[1]}}


def test_what_failed_last_is_left_to_the_retry(ticks: Ticks) -> None:
    half_done(ticks, 2, 2, 2)
    ticks.merged("mds_index", "latents_index")
    ticks.observed([ALL[1]], "2")
    ticks.failed("raw", ALL[1], ALL[1])
    ticks.failed("mds_index")
    ticks.made("mds", [ALL[2]])
    ticks.failed("latents", ALL[2], ALL[2])
    assert ticks.tick() == {}


def test_an_archive_waits_for_its_upstream_which_is_being_made_again(ticks: Ticks) -> None:
    half_done(ticks, 3, 1, 1)
    running = ticks.started("raw", ALL[1], ALL[1])
    assert ticks.tick()["mds"] == {ALL[2]}
    ticks.instance.report_run_canceled(running)
    assert ticks.tick()["mds"] == {ALL[1]}


def test_what_was_ended_is_not_asked_for_again_at_once(ticks: Ticks) -> None:
    half_done(ticks, 3, 2, 2)
    assert ticks.tick() == {"mds": {ALL[2]}}
    ticks.instance.report_run_canceled(ticks.started("mds", ALL[2], ALL[2]))
    assert "mds" not in ticks.tick()
    assert ticks.tick(ASK_AGAIN_S)["mds"] == {ALL[2]}


def test_captions_are_indexed_once_an_archive_waits_for_them(ticks: Ticks) -> None:
    assert ticks.tick() == {}
    ticks.made("raw", ALL[:2])
    assert ticks.tick() == {"annotations": {""}}
    ticks.merged("annotations")
    assert ticks.tick() == {"mds": set(ALL[:2])}
    ticks.merged("annotations")
    assert "annotations" not in ticks.tick(ASK_AGAIN_S + 1)


def test_indexes_wait_until_nothing_before_them_moves(ticks: Ticks) -> None:
    half_done(ticks, 4, 4, 4)
    running = ticks.started("raw", ALL[4], ALL[11])
    assert ticks.tick() == {}
    ticks.made("raw", ALL[4:5])
    assert ticks.tick() == {"mds": {ALL[4]}}
    ticks.made("mds", ALL[4:5])
    assert ticks.tick() == {}
    ticks.instance.report_run_failed(running)
    assert ticks.tick() == {"latents": {ALL[4]}, "mds_index": {""}}
    ticks.made("latents", ALL[4:5])
    assert ticks.tick() == {"latents_index": {""}}


def test_latents_wait_for_as_many_archives_as_a_run_takes_while_others_come(ticks: Ticks) -> None:
    per_run = archives_per_run()["latents"]
    half_done(ticks, per_run + 3, per_run, 1)  # so that one less waits than a run takes
    running = ticks.started("raw", ALL[200], ALL[299])
    assert ticks.tick() == {"mds": set(ALL[per_run : per_run + 3])}
    ticks.made("mds", ALL[per_run : per_run + 1])
    assert ticks.tick() == {"latents": set(ALL[1 : per_run + 1])}
    ticks.made("latents", ALL[1 : per_run + 1])
    ticks.made("mds", ALL[per_run + 1 : per_run + 3])
    assert ticks.tick() == {}
    ticks.instance.report_run_canceled(running)
    assert ticks.tick()["latents"] == set(ALL[per_run + 1 : per_run + 3])


def test_only_an_archive_that_appears_after_a_whole_observation_is_fetched(ticks: Ticks) -> None:
    first = ticks.started("raw_test")  # any run
    for archive in ALL[:2]:
        ticks.observed_in(first, archive)
        assert ticks.tick() == {}
    ticks.instance.report_run_failed(first)
    assert ticks.tick() == {}
    ticks.observed(ALL[:50])
    assert ticks.tick() == {}
    ticks.observed([ALL[7]], "2")  # changed, but was never fetched
    ticks.observed(ALL[50:52])
    assert ticks.tick() == {"raw": {ALL[50], ALL[51]}}
    ticks.made("raw", [ALL[50]])
    assert ticks.tick(ASK_AGAIN_S + 1)["raw"] == {ALL[51]}


def test_a_link_whose_source_tells_no_content_is_never_outdated() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        ticks = Ticks(instance, "sa1b")
        ticks.merged("annotations")
        ticks.made("raw", ["sa_000020"], made_of="f" * 64)
        ticks.made("mds", ["sa_000020"])
        ticks.made("latents", ["sa_000020"])
        ticks.merged("mds_index", "latents_index")
        ticks.observed(["sa_000020"], "sa_000020.tar")
        assert ticks.tick() == {}
        ticks.observed(["sa_000020"], "e" * 64)  # the mirror tells it
        assert ticks.tick() == {"raw": {"sa_000020"}}


def test_subsets_follow_their_whole() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        ticks = Ticks(instance, CC12M.slug)
        ticks.made("raw", CC12M.archives[:3])
        ticks.made("mds", CC12M.archives[:3])
        due = set(CC12M.archives[:3])
        assert ticks.tick() == {"latents": due, "mds_minres512": due, "mds_index": {""}}
        ticks.made("latents", due)
        ticks.merged("mds_index")
        assert ticks.tick() == {"latents_minres512": due, "latents_index": {""}}


def requests(instance: dg.DagsterInstance, cursor: str | None = None) -> tuple[list[dg.RunRequest], str]:
    """What the sensor itself asks for in a tick over all datasets, and its cursor."""
    context = dg.build_sensor_context(
        instance, cursor, repository_def=defs.get_repository_def(), sensor_name=automation_sensor.name
    )
    data = automation_sensor.evaluate_tick(context)
    return list(data.run_requests or ()), data.cursor or ""


def test_the_sensor_is_off_and_asks_for_many_archives_by_a_backfill(ticks: Ticks) -> None:
    assert automation_sensor.default_status is dg.DefaultSensorStatus.STOPPED
    half_done(ticks, 120, 110, 20)
    (request,), cursor = requests(ticks.instance)
    # A backfill gives each run so many archives as its asset's policy says, and waits for what is upstream.
    subset = request.asset_graph_subset
    assert subset is not None and request.asset_selection is None
    partitions = {
        key.path[-1]: set(of.get_partition_keys()) for key, of in subset.partitions_subsets_by_asset_key.items()
    }
    assert partitions == {"mds": set(ALL[110:120]), "latents": set(ALL[20:110])}
    _submit_backfill_request("asked", request, ticks.instance)
    assert requests(ticks.instance, cursor)[0] == []


def test_runs_of_one_tick_belong_to_one_dataset_each(ticks: Ticks) -> None:
    for dataset in ("jdb", "textcaps"):
        ticks.dataset = dataset
        archive = next(spec for spec in (SPEC, TEXTCAPS) if spec.slug == dataset).archives[0]
        ticks.merged("annotations")
        for stage in ("raw", "mds", "latents"):
            ticks.made(stage, [archive])
    cursor: str | None = None
    asked = []
    for _ in range(2):
        found, cursor = requests(ticks.instance, cursor)
        asked += [[key.to_user_string() for key in request.asset_selection or ()] for request in found]
    assert sorted(map(sorted, asked)) == [
        ["jdb/latents_index", "jdb/mds_index"],
        ["textcaps/latents_index", "textcaps/mds_index"],
    ]
