"""Which failed archives are tried again, when, and how often; nothing that goes on already."""

import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.execution.backfill import BulkActionStatus

from md_assets.datasets.jdb import SPEC as JDB
from md_assets.definitions import defs
from md_assets.orchestration.backfills import plan_backfill
from md_assets.orchestration.failures import ATTEMPT_TAG, FailedArchive
from md_assets.orchestration.retry import (
    ATTEMPTS,
    RETRY,
    Retries,
    find_retries,
    retry_job,
    retry_sensor,
    under_way,
    wait_s,
)
from md_assets_tests.orchestration.test_failures import started_run

GRAPH = defs.resolve_asset_graph()
RAW, MDS, MDS_INDEX = (dg.AssetKey(["jdb", name]) for name in ("raw", "mds", "mds_index"))
NOW_S = 1e9


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def one(
    archive: str,
    asset: dg.AssetKey = RAW,
    *,
    transient: bool = True,
    attempt: int = 1,
    ago_s: float = 1e6,
    begin: dg.AssetKey | None = None,
) -> FailedArchive:
    why, reason = f"jdb {archive}: why", "timeout" if transient else "not_found"
    return FailedArchive(why, reason, transient, asset, archive, attempt, NOW_S - ago_s, begin or asset)


def find(*failed: FailedArchive, busy: set[tuple[dg.AssetKey, str]] | None = None, **options: bool) -> Retries:
    return find_retries(failed, busy or set(), NOW_S, **options)


def test_what_may_pass_is_due_by_its_number_of_attempts() -> None:
    first, second, permanent = one("a"), one("b", attempt=2), one("c", transient=False)
    found = find(first, second, permanent)
    assert found == Retries({2: (first,), 3: (second,)}, (), (), (permanent,))
    assert str(found) == "2 due, 0 waiting, 0 under way, 1 left for a person"


def test_each_attempt_waits_longer_than_the_one_before() -> None:
    assert [wait_s(attempt) / 60 for attempt in (1, 2, 3, 4)] == [10, 40, 160, 640]
    early, late = one("a", attempt=2, ago_s=wait_s(2) - 1), one("b", attempt=2, ago_s=wait_s(2))
    assert find(early, late) == Retries({3: (late,)}, (early,), (), ())
    assert find(early, ignore_backoff=True).due == {3: (early,)}


def test_attempts_come_to_an_end() -> None:
    last, spent = one("a", attempt=ATTEMPTS - 1), one("b", attempt=ATTEMPTS)
    assert find(last, spent) == Retries({ATTEMPTS: (last,)}, (), (), (spent,))
    assert find(spent, include_permanent=True).due == {ATTEMPTS + 1: (spent,)}


def test_an_archive_is_judged_by_the_first_stage_in_which_it_failed() -> None:
    """mds fails for good where raw is missing; that is what another attempt at raw changes."""
    raw, mds = one("a", attempt=2), one("a", MDS, transient=False)
    assert find(raw, mds).due == {3: (raw, mds)}
    raw = one("a", transient=False)
    assert find(raw, one("a", MDS)).left == (raw, one("a", MDS))


def test_what_goes_on_already_is_left_alone() -> None:
    raw, mds, pruned = one("a"), one("b", MDS), one("c", MDS, begin=RAW)
    assert find(raw, mds, pruned, busy={(RAW, "a"), (RAW, "c"), (MDS, "x")}) == Retries(
        {2: (mds,)}, (), (raw, pruned), ()
    )


def test_merged_indexes_are_due_one_by_one() -> None:
    index, other = one("", MDS_INDEX), one("", dg.AssetKey(["jdb", "latents_index"]), transient=False)
    assert find(index, other) == Retries({2: (index,)}, (), (), (other,))


def test_a_backfill_has_to_do_what_it_neither_made_nor_failed(instance: dg.DagsterInstance) -> None:
    assert under_way(instance, GRAPH) == set()
    plan = plan_backfill(instance, GRAPH, JDB, ["train/000", "train/001", "train/002"], ("raw",))
    backfill = instance.get_backfill(plan.launch(instance, GRAPH))
    assert backfill is not None
    assert under_way(instance, GRAPH) == {(RAW, f"train/00{number}") for number in range(3)}

    def subset(archive: str) -> Any:
        target = backfill.get_asset_backfill_data(GRAPH).target_subset
        of_asset = GRAPH.get(RAW).partitions_def.empty_subset().with_partition_keys([archive])
        return target._replace(partitions_subsets_by_asset_key={RAW: of_asset}) if target else None

    data = backfill.get_asset_backfill_data(GRAPH)._replace(
        materialized_subset=subset("train/000"), failed_and_downstream_subset=subset("train/001")
    )
    instance.update_backfill(backfill._replace(asset_backfill_data=data))
    assert under_way(instance, GRAPH) == {(RAW, "train/002")}
    instance.update_backfill(backfill.with_status(BulkActionStatus.CANCELED))
    assert under_way(instance, GRAPH) == set()


def die(instance: dg.DagsterInstance, *archives: str, attempt: int = 1, asset: dg.AssetKey = RAW) -> None:
    """A run that is killed."""
    tags = {ATTEMPT_TAG: str(attempt)} if attempt > 1 else {}
    instance.report_run_failed(started_run(instance, asset, *archives, tags=tags), "its process died")


def run_job(instance: dg.DagsterInstance, **config: Any) -> dict[str, str]:
    """Run the job as a run's process does it, as only then an op knows its repository; returns its metadata."""
    job = ReconstructableRepository.for_module("md_assets.definitions", "defs").get_reconstructable_job(RETRY)
    ops = {"launch_retries": {"config": {"datasets": ["jdb"], **config}}}
    with dg.execute_job(job, instance, run_config={"ops": ops}) as result:
        assert result.success
        (output,) = [event for event in result.all_events if event.is_successful_output]
        return {name: str(value.value) for name, value in output.step_output_data.metadata.items()}


def backfills(instance: dg.DagsterInstance) -> list[tuple[str, dict[str, str], list[str]]]:
    """Title, tags and archives of raw, the oldest first."""
    found = []
    for backfill in reversed(instance.get_backfills()):
        target = backfill.get_asset_backfill_data(GRAPH).target_subset
        archives = sorted(target.get_partitions_subset(RAW).get_partition_keys())
        found.append((backfill.title or "", dict(backfill.tags), archives))
    return found


def test_the_job_launches_one_backfill_for_each_number_of_attempts(instance: dg.DagsterInstance) -> None:
    die(instance, "train/000", "train/001")
    die(instance, "train/003", attempt=2)
    die(instance, "train/005", attempt=ATTEMPTS)

    metadata = run_job(instance, ignore_backoff=True)

    title = "jdb: {} failed archive{}, raw, mds, latents"
    tags = {"md_assets/dataset": "jdb"}
    assert backfills(instance) == [
        (title.format(2, "s"), {**tags, ATTEMPT_TAG: "2"}, ["train/000", "train/001"]),
        (title.format(1, ""), {**tags, ATTEMPT_TAG: "3"}, ["train/003"]),
    ]
    assert metadata["jdb"] == "3 due, 0 waiting, 0 under way, 1 left for a person"
    assert "| jdb/raw | train/005 | run_died | 5 | jdb train/005: run " in metadata["jdb_left"]
    assert metadata["jdb_attempt_2"].startswith("/runs/b/") and metadata["jdb_attempt_3"].startswith("/runs/b/")

    again = run_job(instance, ignore_backoff=True)
    assert again["jdb"] == "0 due, 0 waiting, 3 under way, 1 left for a person"
    assert len(instance.get_backfills()) == 2


def test_the_job_waits_unless_it_is_told_not_to(instance: dg.DagsterInstance) -> None:
    die(instance, "train/000")
    assert run_job(instance)["jdb"] == "0 due, 1 waiting, 0 under way, 0 left for a person"
    assert backfills(instance) == []


def test_what_cannot_be_done_is_said_and_the_job_goes_on(instance: dg.DagsterInstance) -> None:
    die(instance, "train/000", asset=MDS)  # of which raw was never made
    assert run_job(instance, ignore_backoff=True)["jdb"].startswith("1 due, ")
    assert backfills(instance) == []


def tick(instance: dg.DagsterInstance) -> Any:
    return retry_sensor.evaluate_tick(dg.build_sensor_context(instance=instance, definitions=defs))


def test_the_sensor_is_off_and_asks_for_the_job_when_something_is_due(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert retry_sensor.default_status is dg.DefaultSensorStatus.STOPPED
    assert tick(instance).skip_message == "nothing failed last"
    die(instance, "train/000")
    assert tick(instance).skip_message == "jdb: 0 due, 1 waiting, 0 under way, 0 left for a person"

    later_s = time.time() + wait_s(1)
    monkeypatch.setattr("md_assets.orchestration.retry.time.time", lambda: later_s)
    first, again = (tick(instance).run_requests[0] for _ in range(2))
    assert first.run_config == {"ops": {"launch_retries": {"config": {"datasets": ["jdb"]}}}}
    assert first.run_key == again.run_key  # by which Dagster asks once, should the job be able to do nothing
    die(instance, "train/001")  # at `later_s`, for that is now every clock of this process
    later_s += wait_s(1) + 1  # records keep microseconds, so the pause alone may be one too short
    assert tick(instance).run_requests[0].run_key != first.run_key

    instance.create_run_for_job(retry_job)
    assert tick(instance).skip_message == "the job is at work already"
