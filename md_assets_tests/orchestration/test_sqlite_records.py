"""Dagster's records in SQLite: the same as in Dagster's own storage, stored whole or not at all."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage

from md_assets.orchestration.records import stored_together
from md_assets.orchestration.sqlite_records import RUNS_OPEN, SqliteEvents, SqliteRecords

KEY = dg.AssetKey(["ds", "raw"])
PARTITIONS = dg.StaticPartitionsDefinition([f"a{number}" for number in range(6)])


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    return tmp_path


@contextmanager
def opened(home: Path, own: bool = True) -> Iterator[dg.DagsterInstance]:
    """An instance as `deploy/dagster.yaml` has it, or with Dagster's own storage in the same place."""
    base = {"base_dir": {"env": "DAGSTER_HOME"}}
    ours = {"custom": {"module": SqliteRecords.__module__, "class": SqliteRecords.__name__, "config": base}}
    (home / "dagster.yaml").write_text(yaml.safe_dump({"storage": ours if own else {"sqlite": base}}))
    with dg.DagsterInstance.get() as instance:
        assert type(instance.event_log_storage) is (SqliteEvents if own else SqliteEventLogStorage)
        yield instance


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


def test_each_storage_reads_what_the_other_has_stored(home: Path) -> None:
    with opened(home) as instance:
        ours = run(instance)
        found = stored(instance, ours)
    _, materialized, statuses, tags = found
    assert materialized == set(PARTITIONS.get_partition_keys())
    assert statuses == [(f"a{n}", "FAILED" if n == 3 else "SUCCEEDED") for n in range(6)]
    assert tags == {partition: {"dagster/data_version": "1"} for partition in PARTITIONS.get_partition_keys()}
    with opened(home, own=False) as instance:
        assert stored(instance, ours) == found
        theirs = run(instance)
        found = stored(instance, theirs)
    with opened(home) as instance:
        assert stored(instance, theirs) == found


def test_what_is_stored_together_appears_at_once_or_never(home: Path) -> None:
    with opened(home) as instance, opened(home) as other:
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


def test_another_thread_that_logs_is_not_held_up(home: Path) -> None:
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

    with opened(home) as instance:
        result = a_job.execute_in_process(instance=instance)
        said = [entry.user_message for entry in instance.all_logs(result.run_id) if not entry.is_dagster_event]
    assert said == ["meanwhile", "before", "after"]


def test_a_killed_process_leaves_nothing_half_stored(home: Path) -> None:
    with opened(home) as instance:
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


def test_the_logs_of_many_runs_do_not_stay_open(home: Path) -> None:
    with opened(home) as instance:
        events = instance.event_log_storage
        assert isinstance(events, SqliteEvents)
        for number in range(RUNS_OPEN + 3):
            with events.run_connection(f"run-{number}"):
                pass
        files = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert sorted({name for name in files if name.startswith("run-") and name.endswith(".db")}) == sorted(
            f"run-{number}.db" for number in range(3, RUNS_OPEN + 3)
        )
        with events.run_connection("run-0"):
            pass


def test_whoever_watches_a_run_sees_what_another_process_stores(home: Path) -> None:
    seen: list[str] = []
    with opened(home) as watching, opened(home) as instance:
        run_id = run(instance)
        take: Callable[..., None] = lambda entry, cursor: seen.append(entry.message)  # noqa: E731
        watching.event_log_storage.watch(run_id, None, take)
        instance.report_engine_event("more", run_id=run_id, job_name="a job", step_key=None)
        end = time.monotonic() + 30
        while "more" not in seen and time.monotonic() < end:
            time.sleep(0.1)
        watching.event_log_storage.end_watch(run_id, take)
    assert "more" in seen and len(seen) > 10
