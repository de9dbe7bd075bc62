"""What a backfill is about: archives and assets chosen, runs counted, nothing launched that would be lost."""

import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus
from dagster._daemon.types import DaemonHeartbeat

from md_assets.core.errors import SettingsError
from md_assets.datasets import spec_of
from md_assets.datasets.jdb import SPEC
from md_assets.definitions import defs
from md_assets.orchestration.backfills import (
    DATASET_TAG,
    HEARTBEAT_S,
    a_daemon_runs,
    archive_assets,
    choose_archives,
    choose_stages,
    persistent_instance,
    plan_backfill,
    plan_failed,
    plan_merge,
    ui_path,
)
from md_assets.orchestration.failures import ATTEMPT_TAG, FailedArchive

GRAPH = defs.resolve_asset_graph()
RAW, MDS, LATENTS = (dg.AssetKey(["jdb", stage]) for stage in ("raw", "mds", "latents"))
ANNOTATIONS, MDS_INDEX, LATENTS_INDEX = (
    dg.AssetKey(["jdb", name]) for name in ("annotations", "mds_index", "latents_index")
)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def record(instance: dg.DagsterInstance, asset: dg.AssetKey, *archives: str) -> None:
    """Archives as materialized; without any, an asset without partitions."""
    for archive in archives or (None,):
        instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=archive))


@pytest.mark.parametrize(
    ("text", "archives"),
    [
        ("train/003", ("train/003",)),
        ("valid/001, train/003 ,train/003", ("train/003", "valid/001")),
        ("train/198...valid/001", ("train/198", "train/199", "valid/000", "valid/001")),
        ("train/001...train/002,train/002...train/003", ("train/001", "train/002", "train/003")),
        ("train/007...train/007", ("train/007",)),
    ],
)
def test_archives_are_chosen_by_ids_and_ranges_in_upstreams_order(text: str, archives: tuple[str, ...]) -> None:
    assert choose_archives(SPEC, text) == archives


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train/200", "jdb has no archive 'train/200'. Its IDs are train/000 to valid/199; "),
        ("train/000...train/x", "jdb has no archive 'train/x'"),
        ("train/000...", "jdb has no archive ''"),
        ("valid/000...train/000", "the range valid/000...train/000 of jdb runs backwards. Write train/000...valid/000"),
        (" , ", "no archive of jdb is named. Its first one is train/000"),
    ],
)
def test_archives_that_are_none_are_refused(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        choose_archives(SPEC, text)
    assert str(caught.value).startswith(said)


def test_stages_are_chosen_in_their_order() -> None:
    assert choose_stages("mds, raw") == ("raw", "mds")
    with pytest.raises(SettingsError, match=r"there is no stage 'webp'. Choose of raw,mds,latents"):
        choose_stages("raw,webp")


def test_a_plan_has_captions_and_merged_indexes_and_counts_its_runs(instance: dg.DagsterInstance) -> None:
    plan = plan_backfill(instance, GRAPH, SPEC, SPEC.small, what="small subset")

    assert [(p.asset, p.archives, p.left_out, p.runs) for p in plan.assets] == [
        (asset, SPEC.small, (), 2)
        for asset in (RAW, MDS, LATENTS)  # a range in each split
    ]
    assert plan.whole == (ANNOTATIONS, MDS_INDEX, LATENTS_INDEX)
    assert (plan.archives, plan.runs) == (4, 9)
    assert list(plan.lines()) == [
        "jdb: small subset of 4 archives, raw, mds, latents: 9 runs if nothing fails",
        "  jdb/raw: 4 archives in 2 runs",
        "  jdb/mds: 4 archives in 2 runs",
        "  jdb/latents: 4 archives in 2 runs",
        "  jdb/annotations",
        "  jdb/mds_index",
        "  jdb/latents_index",
    ]


def test_ranges_are_cut_by_the_policy_of_each_stage(instance: dg.DagsterInstance) -> None:
    plan = plan_backfill(instance, GRAPH, SPEC, SPEC.archives)
    assert [p.runs for p in plan.assets] == [400 // 8, 400 // 16, -(-400 // 64)]


def test_captions_are_not_indexed_again(instance: dg.DagsterInstance) -> None:
    record(instance, ANNOTATIONS)
    assert plan_backfill(instance, GRAPH, SPEC, SPEC.small).whole == (MDS_INDEX, LATENTS_INDEX)


def test_raw_alone_needs_neither_captions_nor_an_index(instance: dg.DagsterInstance) -> None:
    plan = plan_backfill(instance, GRAPH, SPEC, SPEC.small, ("raw",))
    assert ([p.asset for p in plan.assets], plan.whole) == ([RAW], ())


def test_a_stage_is_asked_for_only_where_its_upstream_is(instance: dg.DagsterInstance) -> None:
    record(instance, RAW, "train/001", "train/002")
    record(instance, MDS, "train/003")

    plan = plan_backfill(instance, GRAPH, SPEC, choose_archives(SPEC, "train/000...train/003"), ("mds", "latents"))

    assert [(p.asset, p.archives, p.left_out) for p in plan.assets] == [
        (MDS, ("train/001", "train/002"), ("train/000", "train/003")),
        (LATENTS, ("train/001", "train/002", "train/003"), ("train/000",)),
    ]
    assert "  jdb/mds: 2 archives in 1 run; 2 left out, as their upstream is missing" in list(plan.lines())


def test_nothing_with_an_upstream_is_said(instance: dg.DagsterInstance) -> None:
    with pytest.raises(SettingsError, match=r"jdb/latents of train/000 has no upstream .* Add the stage before it"):
        plan_backfill(instance, GRAPH, SPEC, ["train/000"], ("latents",))


def test_subsets_belong_to_their_stage(instance: dg.DagsterInstance) -> None:
    spec = spec_of("cc12m")

    plan = plan_backfill(instance, GRAPH, spec, spec.small, ("raw", "mds"))

    assert [(p.asset.path[1], p.runs) for p in plan.assets] == [("raw", 3), ("mds", 2), ("mds_minres512", 1)]
    assert [asset.path[1] for asset in plan.whole] == ["mds_index", "mds_minres512_index"]
    stages = [asset.path[1] for asset in archive_assets(GRAPH, spec, ("latents",))]
    assert stages == ["latents", "latents_minres512"]


def test_what_is_launched_is_what_was_planned(instance: dg.DagsterInstance) -> None:
    plan = plan_backfill(instance, GRAPH, SPEC, ["train/000", "valid/007"], ("raw", "mds"))

    backfill = instance.get_backfill(plan.launch(instance, GRAPH))

    assert backfill is not None and backfill.status is BulkActionStatus.REQUESTED
    assert backfill.title == "jdb: 2 archives from train/000 to valid/007, raw, mds"
    assert backfill.tags == {DATASET_TAG: "jdb"}
    target = backfill.get_asset_backfill_data(GRAPH).target_subset
    assert target.asset_keys == {ANNOTATIONS, RAW, MDS, MDS_INDEX}
    for asset in (RAW, MDS):
        assert set(target.get_partitions_subset(asset).get_partition_keys()) == {"train/000", "valid/007"}
    assert ui_path(backfill.backfill_id) == f"/runs/b/{backfill.backfill_id}"


def failure(asset: dg.AssetKey, archive: str, begin: dg.AssetKey | None = None) -> FailedArchive:
    return FailedArchive(f"jdb {archive}: why", "timeout", True, asset, archive, 1, 0.0, begin or asset)


def test_what_failed_is_made_again_from_there_on(instance: dg.DagsterInstance) -> None:
    record(instance, RAW, "train/001", "train/002")
    record(instance, MDS, "train/002")
    failed = [failure(RAW, "train/000"), failure(MDS, "train/001"), failure(LATENTS, "train/002")]

    plan = plan_failed(instance, GRAPH, SPEC, failed)

    assert plan is not None and [(p.asset, p.archives) for p in plan.assets] == [
        (RAW, ("train/000",)),
        (MDS, ("train/000", "train/001")),
        (LATENTS, ("train/000", "train/001", "train/002")),
    ]
    assert plan.title == "jdb: 3 failed archives, raw, mds, latents"
    assert list(plan.lines())[-1] == "  3 may pass: timeout 3"
    only = plan_failed(instance, GRAPH, SPEC, failed, ("mds",))
    assert only is not None and [(p.asset, p.archives) for p in only.assets] == [(MDS, ("train/001",))]


def test_what_lacks_its_upstream_begins_there(instance: dg.DagsterInstance) -> None:
    for asset in (RAW, MDS, LATENTS):
        record(instance, asset, "train/000")
    plan = plan_failed(instance, GRAPH, SPEC, [failure(LATENTS, "train/000", begin=RAW)])
    assert plan is not None and [p.asset for p in plan.assets] == [RAW, MDS, LATENTS]


def test_another_attempt_says_which_it_is(instance: dg.DagsterInstance) -> None:
    plan = plan_failed(instance, GRAPH, SPEC, [failure(RAW, "train/000")], attempt=3)
    assert plan is not None
    backfill = instance.get_backfill(plan.launch(instance, GRAPH))
    assert backfill is not None and backfill.tags == {DATASET_TAG: "jdb", ATTEMPT_TAG: "3"}


def test_a_merged_index_is_merged_again(instance: dg.DagsterInstance) -> None:
    plan = plan_failed(instance, GRAPH, SPEC, [failure(LATENTS_INDEX, "")])
    assert plan is not None and (plan.assets, plan.whole, plan.runs) == ((), (LATENTS_INDEX,), 1)
    plan = plan_failed(instance, GRAPH, SPEC, [failure(LATENTS_INDEX, ""), failure(RAW, "train/000")])
    assert plan is not None and plan.whole == (ANNOTATIONS, MDS_INDEX, LATENTS_INDEX)


def test_nothing_failed_is_no_plan(instance: dg.DagsterInstance) -> None:
    assert plan_failed(instance, GRAPH, SPEC, []) is None
    assert plan_failed(instance, GRAPH, SPEC, [failure(RAW, "train/000")], ("mds",)) is None


def test_indexes_are_merged_only_over_something(instance: dg.DagsterInstance) -> None:
    record(instance, MDS, "train/000")
    plan = plan_merge(instance, GRAPH, SPEC, [MDS_INDEX, LATENTS_INDEX])
    assert plan is not None and (plan.assets, plan.whole, plan.runs) == ((), (MDS_INDEX,), 1)
    assert plan_merge(instance, GRAPH, SPEC, [LATENTS_INDEX]) is None


@pytest.mark.parametrize("home", [None, "relative", "/nonexistent/home"])
def test_an_instance_that_would_be_lost_is_refused(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    if home:
        monkeypatch.setenv("DAGSTER_HOME", home)
    with pytest.raises(SettingsError, match=r"DAGSTER_HOME is .*\. Set it to the folder that `dagster dev` works with"):
        persistent_instance()


def test_the_instance_of_dagster_home_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with persistent_instance() as instance:
        assert not instance.is_ephemeral and instance.root_directory == str(tmp_path)


def test_a_daemon_runs_while_its_heartbeats_are_fresh(instance: dg.DagsterInstance) -> None:

    assert not a_daemon_runs(instance)
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time() - HEARTBEAT_S - 1, "BACKFILL", None, None))
    assert not a_daemon_runs(instance)
    instance.add_daemon_heartbeat(DaemonHeartbeat(time.time(), "SENSOR", None, None))
    assert a_daemon_runs(instance)
