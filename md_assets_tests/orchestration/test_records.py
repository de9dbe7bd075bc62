"""Dagster's records in our storages: the same as in Dagster's own, and what belongs together stored whole or not at
all."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import dagster as dg
import pytest
import sqlalchemy
import yaml
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster_postgres import PostgresEventLogStorage

from md_assets.orchestration.postgres_records import PostgresEvents
from md_assets.orchestration.records import stored_together
from md_assets.orchestration.sqlite_records import SqliteEvents
from md_assets_tests.conftest import set_postgres_variables
from md_assets_tests.orchestration.test_run_queue import DEPLOY

KEY = dg.AssetKey(["ds", "raw"])
PARTITIONS = dg.StaticPartitionsDefinition([f"a{number}" for number in range(6)])

Opened = Callable[..., AbstractContextManager[dg.DagsterInstance]]


@pytest.fixture(
    params=["dagster.yaml", pytest.param("dagster.postgres.yaml", marks=[pytest.mark.slow, pytest.mark.postgres])]
)
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Opens an instance with a committed storage, or with Dagster's own in the same place."""
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    storage = yaml.safe_load(DEPLOY.with_name(request.param).read_text())["storage"]
    sqlite = request.param == "dagster.yaml"
    of_dagster = {"sqlite" if sqlite else "postgres": storage["custom"]["config"]}
    classes = (SqliteEvents, SqliteEventLogStorage) if sqlite else (PostgresEvents, PostgresEventLogStorage)

    @contextmanager
    def open_it(own: bool = True) -> Iterator[dg.DagsterInstance]:
        (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"storage": storage if own else of_dagster}))
        with dg.DagsterInstance.get() as instance:
            assert type(instance.event_log_storage) is classes[not own]
            yield instance

    if sqlite:
        yield open_it
    else:
        with set_postgres_variables(monkeypatch):
            yield open_it


@dg.multi_asset(
    specs=[dg.AssetSpec(KEY, partitions_def=PARTITIONS, skippable=True)],
    check_specs=[dg.AssetCheckSpec("whole", asset=KEY, partitions_def=PARTITIONS)],
    can_subset=True,
    backfill_policy=dg.BackfillPolicy.multi_run(6),
)
def a_range(context: dg.AssetExecutionContext) -> Iterator[None]:
    for partition in context.partition_keys:
        with stored_together(context.instance):
            context.log_event(dg.AssetMaterialization(KEY, partition=partition, tags={"dagster/data_version": "1"}))
            context.log_event(
                dg.AssetCheckEvaluation(
                    asset_key=KEY, check_name="whole", passed=partition != "a3", partition=partition
                )
            )
    yield from ()


def run(instance: dg.DagsterInstance) -> str:
    """Run the range; returns the run's ID."""
    job = dg.Definitions(assets=[a_range]).resolve_implicit_global_asset_job_def()
    first, last = PARTITIONS.get_first_partition_key(), PARTITIONS.get_last_partition_key()
    tags = {"dagster/asset_partition_range_start": str(first), "dagster/asset_partition_range_end": str(last)}
    result = job.execute_in_process(instance=instance, tags=tags)
    assert result.success
    return result.run_id


def stored(instance: dg.DagsterInstance, run_id: str) -> list[object]:
    """What an instance knows of a run and its asset."""
    events = [(entry.dagster_event_type, entry.message) for entry in instance.all_logs(run_id)]
    checks = instance.event_log_storage.get_asset_check_partition_info([dg.AssetCheckKey(KEY, "whole")])
    tags = instance.event_log_storage.get_latest_tags_by_partition(
        KEY, dg.DagsterEventType.ASSET_MATERIALIZATION, ["dagster/data_version"]
    )
    statuses = sorted((check.partition_key or "", check.latest_execution_status.value) for check in checks)
    return [events, instance.get_materialized_partitions(KEY), statuses, tags]


def test_each_storage_reads_what_the_other_has_stored(opened: Opened) -> None:
    with opened() as instance:
        ours = run(instance)
        found = stored(instance, ours)
    _, materialized, statuses, tags = found
    assert materialized == set(PARTITIONS.get_partition_keys())
    assert statuses == [(f"a{n}", "FAILED" if n == 3 else "SUCCEEDED") for n in range(6)]
    assert tags == {partition: {"dagster/data_version": "1"} for partition in PARTITIONS.get_partition_keys()}
    with opened(own=False) as instance:
        assert stored(instance, ours) == found
        theirs = run(instance)
        found = stored(instance, theirs)
    with opened() as instance:
        assert stored(instance, theirs) == found


def test_what_was_found_is_not_asked_for_again(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster asks for tables and columns with each event, and each time inspects the database."""
    with opened() as instance:
        storage = instance.event_log_storage
        found = [storage.has_table("asset_event_tags"), storage.has_asset_key_col("cached_status_data")]
        assert found == [True, True]
        assert not storage.has_table("not_there_yet")
        asked: list[str] = []
        (own,) = (of for of in (SqliteEventLogStorage, PostgresEventLogStorage) if isinstance(storage, of))
        monkeypatch.setattr(own, "has_table", lambda self, name: asked.append(name) or name == "not_there_yet")
        monkeypatch.setattr(sqlalchemy, "inspect", lambda connection: 1 / 0)
        assert [storage.has_table("asset_event_tags"), storage.has_asset_key_col("cached_status_data")] == found
        assert storage.has_table("not_there_yet")
        assert asked == ["not_there_yet"]


def test_what_is_stored_together_appears_at_once_or_never(opened: Opened) -> None:
    with opened() as instance, opened() as other:
        with stored_together(instance):
            instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition="a0"))
            with stored_together(instance):
                instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition="a1"))
            assert other.get_materialized_partitions(KEY) == set()
        assert other.get_materialized_partitions(KEY) == {"a0", "a1"}
        with pytest.raises(RuntimeError, match="no"), stored_together(instance):
            instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition="a2"))
            raise RuntimeError("no")
        instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition="a3"))
        assert other.get_materialized_partitions(KEY) == {"a0", "a1", "a3"}


def test_another_thread_that_logs_is_not_held_up(opened: Opened) -> None:
    """One that waited for the block's end would wait for ever: it holds the log's lock, which the block needs."""

    @dg.op
    def logs(context: dg.OpExecutionContext) -> None:
        with stored_together(context.instance):
            context.log.info("before")
            thread = threading.Thread(target=context.log.info, args=["meanwhile"])
            thread.start()
            thread.join(60)
            assert not thread.is_alive()
            context.log.info("after")

    @dg.job
    def a_job() -> None:
        logs()

    with opened() as instance:
        result = a_job.execute_in_process(instance=instance)
        said = [entry.user_message for entry in instance.all_logs(result.run_id) if not entry.is_dagster_event]
    assert said == ["meanwhile", "before", "after"]


def test_a_batch_that_breaks_is_not_stored_in_part(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as instance, opened() as other:
        events = instance.event_log_storage
        store, stored = events._store_asset_event_tags, list[object]()  # type: ignore[attr-defined]

        def breaks_at_the_second(*arguments: object) -> None:
            stored.append(arguments)
            if len(stored) == 2:
                raise RuntimeError("no")
            store(*arguments)

        monkeypatch.setattr(events, "_store_asset_event_tags", breaks_at_the_second)
        with pytest.raises(RuntimeError, match="no"), stored_together(instance):
            for archive in ("a0", "a1"):
                instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition=archive))
        assert other.get_materialized_partitions(KEY) == set()
        instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition="a2"))
        assert other.get_materialized_partitions(KEY) == {"a2"}


def test_a_killed_process_leaves_nothing_half_stored(opened: Opened) -> None:
    with opened() as instance:
        program = """import dagster as dg, sys, time
from md_assets.orchestration.records import stored_together
key = dg.AssetKey(["ds", "raw"])
with dg.DagsterInstance.get() as instance:
    instance.report_runless_asset_event(dg.AssetMaterialization(key, partition="a0"))
    with stored_together(instance):
        instance.report_runless_asset_event(dg.AssetMaterialization(key, partition="a1"))
        print("stored", flush=True)
        time.sleep(60)"""
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=dict(os.environ))
        assert process.stdout is not None and process.stdout.readline() == b"stored\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert instance.get_materialized_partitions(KEY) == {"a0"}
        instance.report_runless_asset_event(dg.AssetMaterialization(KEY, partition="a2"))
        assert instance.get_materialized_partitions(KEY) == {"a0", "a2"}


def test_whoever_watches_a_run_sees_what_another_process_stores(opened: Opened) -> None:
    seen: list[str] = []
    with opened() as watching, opened() as instance:
        run_id = run(instance)
        take: Callable[..., None] = lambda entry, cursor: seen.append(entry.message)  # noqa: E731
        watching.event_log_storage.watch(run_id, None, take)
        instance.report_engine_event("more", run_id=run_id, job_name="a job", step_key=None)
        end = time.monotonic() + 30
        while "more" not in seen and time.monotonic() < end:
            time.sleep(0.1)
        watching.event_log_storage.end_watch(run_id, take)
    assert "more" in seen and len(seen) > 10
