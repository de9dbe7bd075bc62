"""Checks that failed last: until when they count, and in which stage the fault lies."""

import time
from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._core.events import DagsterEvent, DagsterEventType
from dagster._core.utils import make_new_run_id

from md_assets.core.verdict import AUDITED, BEGIN_FACT, DIRECTORY_FACT, STAGE_FACT
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.definitions import defs
from md_assets.orchestration.backfills import archive_assets
from md_assets.orchestration.failed_checks import archive_keys, damaged_archives, failed_checks

RAW, MDS, LATENTS, INDEX = (dg.AssetKey(["jdb", name]) for name in ("raw", "mds", "latents", "latents_index"))
ARCHIVE = "train/000"


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def evaluate(
    instance: dg.DagsterInstance,
    asset: dg.AssetKey,
    check: str,
    passed: bool,
    archive: str | None = ARCHIVE,
    run_id: str = "",
    **facts: str,
) -> None:
    """A result, as the audit stores it: with a run."""
    evaluation = dg.AssetCheckEvaluation(
        asset_key=asset, check_name=check, passed=passed, partition=archive, description="cut", metadata=facts
    )
    event_type = DagsterEventType.ASSET_CHECK_EVALUATION.value
    event = DagsterEvent(event_type, "job", event_specific_data=evaluation)
    instance.report_dagster_event(event, run_id or make_new_run_id())


def at_fault(stage: str, begin: str = "") -> dict[str, str]:
    return {STAGE_FACT: stage, BEGIN_FACT: begin or stage, DIRECTORY_FACT: stage}


def materialize(instance: dg.DagsterInstance, asset: dg.AssetKey, archive: str | None = ARCHIVE) -> None:
    time.sleep(0.002)  # after what was evaluated before, by the clock
    instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=archive))


def found(instance: dg.DagsterInstance) -> list[tuple[str, str, bool]]:
    return [(check.asset.path[-1], check.archive, check.damaged) for check in failed_checks(instance, JDB)]


def test_a_check_counts_until_it_passes(instance: dg.DagsterInstance) -> None:
    evaluate(instance, RAW, "tar_intact", False)
    evaluate(instance, MDS, "counts_balance", False, "train/001")
    assert found(instance) == [("raw", ARCHIVE, True), ("mds", "train/001", False)]
    evaluate(instance, RAW, "tar_intact", True)
    assert found(instance) == [("mds", "train/001", False)]


def test_a_run_that_has_only_planned_a_check_changes_nothing(instance: dg.DagsterInstance) -> None:
    evaluate(instance, RAW, "tar_intact", False)
    evaluate(instance, MDS, AUDITED, False, **at_fault("mds"))
    for asset in (RAW, MDS):
        job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={asset})
        tags = {"dagster/asset_partition_range_start": ARCHIVE, "dagster/asset_partition_range_end": ARCHIVE}
        instance.create_run_for_job(job, tags=tags, asset_selection=frozenset({asset}))
    history = instance.event_log_storage.get_asset_check_execution_history
    assert history(dg.AssetCheckKey(MDS, AUDITED), limit=1)[0].status.value == "PLANNED"
    assert found(instance) == [("raw", ARCHIVE, True), ("mds", ARCHIVE, True)]


def test_an_audit_counts_until_the_archive_is_made_again(instance: dg.DagsterInstance) -> None:
    materialize(instance, MDS)
    evaluate(instance, MDS, AUDITED, False, **at_fault("mds"))
    materialize(instance, MDS, "train/001")
    assert found(instance) == [("mds", ARCHIVE, True)]
    materialize(instance, MDS)
    assert found(instance) == []


def test_a_fault_of_a_stage_before_is_mended_there_and_then_audited_again(instance: dg.DagsterInstance) -> None:
    evaluate(instance, LATENTS, AUDITED, False, **at_fault("raw"))
    assert found(instance) == [("raw", ARCHIVE, True)]
    materialize(instance, RAW)
    assert found(instance) == [("latents", ARCHIVE, False)]  # whose data are not to blame
    materialize(instance, LATENTS)
    assert found(instance) == []


def test_an_archive_whose_upstream_was_pruned_begins_there(instance: dg.DagsterInstance) -> None:
    evaluate(instance, LATENTS, AUDITED, False, **at_fault("latents", begin="raw"))
    (check,) = failed_checks(instance, JDB)
    assert (check.asset, check.begin, check.directory) == (LATENTS, RAW, "latents")
    materialize(instance, RAW)  # which alone mends nothing
    assert found(instance) == [("latents", ARCHIVE, True)]


def test_an_audit_that_found_nothing_to_read_does_not_condemn_what_is_there(instance: dg.DagsterInstance) -> None:
    evaluate(instance, MDS, AUDITED, False)
    assert found(instance) == [("mds", ARCHIVE, False)]


def test_merged_indexes_have_no_archive(instance: dg.DagsterInstance) -> None:
    evaluate(instance, INDEX, AUDITED, False, archive=None, **at_fault("latents_index"))
    assert found(instance) == [("latents_index", "", True)]
    materialize(instance, INDEX, None)
    assert found(instance) == []


def test_a_run_asks_for_its_own_asset_and_archives(instance: dg.DagsterInstance) -> None:
    evaluate(instance, RAW, "tar_intact", False)
    evaluate(instance, RAW, "tar_intact", False, "train/001")
    evaluate(instance, RAW, "counts_balance", False)
    evaluate(instance, MDS, "shards_intact", False)
    evaluate(instance, MDS, AUDITED, False, **at_fault("mds"))
    evaluate(instance, LATENTS, AUDITED, False, **at_fault("raw"))

    def damaged(asset: dg.AssetKey, *archives: str) -> list[tuple[str, str]]:
        checks = damaged_archives(instance, JDB, asset, archives)
        assert all(check.asset == asset for check in checks)
        return [(check.archive, check.check) for check in checks]

    assert damaged(RAW, ARCHIVE) == [(ARCHIVE, AUDITED), (ARCHIVE, "tar_intact")]
    assert damaged(MDS, ARCHIVE) == [(ARCHIVE, AUDITED), (ARCHIVE, "shards_intact")]
    assert damaged(RAW, "train/001", "train/002") == [("train/001", "tar_intact")]
    assert damaged(LATENTS, ARCHIVE) == damaged(RAW) == []


def test_the_assets_of_a_dataset_are_those_of_the_code_location() -> None:
    graph = defs.resolve_asset_graph()
    for spec in (JDB, CC12M):
        assert set(archive_keys(spec)) == set(archive_assets(graph, spec))
        order = {key: number for number, key in enumerate(archive_keys(spec))}
        for key, number in order.items():
            assert all(order.get(parent, -1) < number for parent in graph.get(key).parent_keys)
