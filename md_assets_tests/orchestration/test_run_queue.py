"""Runs in the queue carry their dataset, and the committed instances load with the limits that they promise."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy
import yaml
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.storage.tags import PRIORITY_TAG
from dagster._utils.tags import TagConcurrencyLimitsCounter

from md_assets.datasets import all_specs
from md_assets.definitions import defs
from md_assets.orchestration.backfills import DATASET_TAG
from md_assets.orchestration.postgres_records import PostgresRecords
from md_assets.orchestration.run_queue import DatasetRunCoordinator
from md_assets.orchestration.sqlite_records import SqliteRecords
from md_assets_tests.conftest import set_postgres_variables

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy" / "dagster.yaml"
DEMO = REPOSITORY / "md_assets" / "demo" / "dagster.yaml"

ORIGIN = RemoteJobOrigin(
    repository_origin=RemoteRepositoryOrigin(
        code_location_origin=RegisteredCodeLocationOrigin("location"), repository_name="repository"
    ),
    job_name="job",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the committed instances keep their records."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """The committed one, with an order of datasets."""
    config = yaml.safe_load(DEPLOY.read_text())
    config["run_coordinator"]["config"]["dataset_order"] = ["textcaps", "jdb"]
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump(config))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


def queued(instance: dg.DagsterInstance, *assets: str, **tags: str) -> dg.DagsterRun:
    """A run as the daemon submits it."""
    keys = frozenset(dg.AssetKey(asset.split("/")) for asset in assets)
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection=set(keys))
    run = instance.create_run_for_job(job, asset_selection=keys, tags=tags, remote_job_origin=ORIGIN)
    workspace: Any = None  # which the coordinator has no need of
    submitted = instance.run_coordinator.submit_run(SubmitRunContext(run, workspace))
    assert submitted.status is dg.DagsterRunStatus.QUEUED
    return submitted


def test_a_run_is_tagged_with_its_dataset(instance: dg.DagsterInstance) -> None:
    assert isinstance(instance.run_coordinator, DatasetRunCoordinator)
    assert queued(instance, "jdb/mds").tags[DATASET_TAG] == "jdb"
    assert queued(instance, "jdb/mds", "jdb/latents").tags[DATASET_TAG] == "jdb"
    assert DATASET_TAG not in queued(instance, "textcaps/mds", "textcaps/raw", "coco2014/mds").tags
    assert queued(instance, "jdb/mds", **{DATASET_TAG: "mine"}).tags[DATASET_TAG] == "mine"


def test_runs_of_an_earlier_dataset_go_first(instance: dg.DagsterInstance) -> None:
    priorities = [queued(instance, f"{slug}/mds").tags.get(PRIORITY_TAG) for slug in ("textcaps", "jdb", "coco2014")]
    assert priorities == ["2", "1", None]
    assert queued(instance, "textcaps/mds", **{PRIORITY_TAG: "9"}).tags[PRIORITY_TAG] == "9"


def test_waiting_runs_of_a_dataset_hold_back_none_of_its_own(instance: dg.DagsterInstance) -> None:
    """Dagster counts them against a limit of their tag although they wait for a pool."""
    queue = instance.get_concurrency_config().run_queue_config
    assert queue is not None and queue.max_concurrent_runs == 4 and not queue.tag_concurrency_limits


def test_a_dataset_can_be_held(instance: dg.DagsterInstance) -> None:
    """As the comment in the file says."""
    (line,) = [line for line in DEPLOY.read_text().splitlines() if "value: sa1b" in line]
    limits = yaml.safe_load(line.strip().lstrip("# "))["tag_concurrency_limits"]
    counter = TagConcurrencyLimitsCounter(limits, [])
    assert counter.is_blocked(queued(instance, "sa1b/raw")) and not counter.is_blocked(queued(instance, "jdb/raw"))


def test_the_order_in_the_file_names_every_dataset() -> None:
    (line,) = [line for line in DEPLOY.read_text().splitlines() if "dataset_order" in line]
    assert set(yaml.safe_load(line.strip().lstrip("# "))["dataset_order"]) == {spec.slug for spec in all_specs()}


@pytest.mark.parametrize("file", [DEPLOY, DEMO], ids=["deploy", "demo"])
def test_a_committed_instance_loads(tmp_path: Path, file: Path) -> None:
    shutil.copyfile(file, tmp_path / "dagster.yaml")
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        pools = instance.get_concurrency_config().pool_config
        assert pools.default_pool_limit == 1 and pools.pool_granularity is not None
        assert pools.pool_granularity.value == "run"
        assert instance.run_monitoring_enabled and not instance.telemetry_enabled and not instance.nux_enabled
        assert instance.get_settings("run_monitoring")["free_slots_after_run_end_seconds"] == 60
        assert instance.run_retries_enabled and not instance.get_settings("run_retries")["retry_on_asset_or_op_failure"]
        assert instance.get_settings("sensors")["use_threads"]


def test_ticks_are_kept_for_a_time(instance: dg.DagsterInstance) -> None:
    from dagster._core.definitions.run_request import InstigatorType

    days = instance.get_tick_retention_settings(InstigatorType.SENSOR)
    assert {status.value: kept for status, kept in days.items()} == {
        "STARTED": 30,
        "SKIPPED": 3,
        "SUCCESS": 30,
        "FAILURE": 90,
    }


def test_the_instance_on_postgresql_differs_in_its_storage_only() -> None:
    sqlite, postgres = (
        yaml.safe_load(path.read_text()) for path in (DEPLOY, DEPLOY.with_name("dagster.postgres.yaml"))
    )
    storage, own = postgres.pop("storage"), sqlite.pop("storage")
    assert postgres == sqlite
    assert own["custom"]["class"] == SqliteRecords.__name__ and storage["custom"]["class"] == PostgresRecords.__name__
    settings = storage["custom"]["config"]["postgres_db"]
    assert settings.pop("scheme") == "postgresql+psycopg2"
    assert all(value == {"env": value["env"]} for value in settings.values()), "no credentials in the file"
    assert set(settings) == {"hostname", "port", "db_name", "username", "password"}


@pytest.mark.slow
@pytest.mark.postgres
def test_who_queues_runs_on_postgresql_keeps_its_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(DEPLOY.with_name("dagster.postgres.yaml"), tmp_path / "dagster.yaml")
    with set_postgres_variables(monkeypatch), dg.DagsterInstance.get() as instance:

        def sessions() -> int:
            """How many the server has seen, this one too."""
            with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
                connection.execute(sqlalchemy.text("select pg_stat_clear_snapshot()"))
                return int(connection.execute(sqlalchemy.text("select sum(sessions) from pg_stat_database")).scalar())

        def stored(events: int) -> int:
            """Sessions that it takes to store so many."""
            before = sessions()
            for number in range(events):
                instance.report_runless_asset_event(dg.AssetMaterialization("an_asset", partition=str(number)))
            time.sleep(2)  # a session's statistics are flushed once a second
            return sessions() - before

        assert stored(20) >= 20
        assert queued(instance, "jdb/mds").tags[DATASET_TAG] == "jdb"
        stored(1)
        assert stored(20) <= 5
        assert len(instance.get_materialized_partitions(dg.AssetKey("an_asset"))) == 20
