"""Which archives failed, why, and how often, from the records of real runs."""

import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from md_assets.core.paths import DataRoot
from md_assets.datasets.jdb import SPEC
from md_assets.definitions import defs
from md_assets.orchestration.failures import (
    ATTEMPT_TAG,
    RUN_DIED,
    WITHOUT_A_WORD,
    FailedArchive,
    all_failed,
    by_directory,
    causes,
    failed_in_runs,
)
from md_assets_tests.orchestration.conftest import Platform

RAW, MDS, INDEX = (dg.AssetKey(["jdb", name]) for name in ("raw", "mds", "mds_index"))


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def break_at_source(platform: Platform, archive: str) -> None:
    """Cut an archive in half."""
    file = SPEC.locate(archive)
    path = platform.sandbox.hub_root / "datasets" / file.repo / file.path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def range_tags(*archives: str) -> dict[str, str]:
    return {"dagster/asset_partition_range_start": archives[0], "dagster/asset_partition_range_end": archives[-1]}


def run_like_a_backfill(platform: Platform, asset: dg.AssetKey, *archives: str) -> None:
    """A failing run of one asset with the selection and tags that the daemon gives it."""
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        asset_selection=[asset],
        tags=range_tags(*archives) if archives[0] else {},
        instance=platform.instance,
        raise_on_error=False,
        run_config={"resources": {"images": {"config": {"num_workers": 0}}}},
    )
    assert not result.success


def started_run(
    instance: dg.DagsterInstance, asset: dg.AssetKey, *archives: str, tags: dict[str, str] | None = None
) -> dg.DagsterRun:
    """A run of a range that has not come to anything yet."""
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={asset})
    return instance.create_run_for_job(
        job, tags={**range_tags(*archives), **(tags or {})}, asset_selection=frozenset({asset})
    )


def runs(instance: dg.DagsterInstance) -> list[dg.RunRecord]:
    return list(reversed(instance.get_run_records()))


def failed(instance: dg.DagsterInstance) -> list[tuple[dg.AssetKey, str]]:
    return [(one.asset, one.archive) for one in all_failed(instance, SPEC)]


def test_an_archive_counts_as_failed_until_an_attempt_succeeds(platform: Platform) -> None:
    break_at_source(platform, "train/001")
    began_s = time.time()
    assert not platform.run("jdb/raw", "train/000", "train/001").success

    (one,) = all_failed(platform.instance, SPEC)
    assert (one.asset, one.archive, one.begin) == (RAW, "train/001", RAW)
    assert (one.reason, one.transient, one.attempt) == ("truncated", False, 1)
    assert one.why.startswith("jdb train/001: ") and "cut off" in one.why
    assert began_s < one.at_s < time.time()

    platform.instance.report_runless_asset_event(dg.AssetMaterialization(RAW, partition="train/001"))
    assert failed(platform.instance) == []


def test_an_archive_with_a_failed_check_counts_as_failed_and_is_made_again(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000", "train/001").success
    assert failed(platform.instance) == []
    before = {archive: platform.dir("raw").ledger(archive).stat().st_ino for archive in ("train/000", "train/001")}

    platform.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=RAW, check_name="tar_intact", passed=False, metadata={}, partition="train/000", description="cut"
        )
    )
    (one,) = all_failed(platform.instance, SPEC)
    assert (one.asset, one.archive, one.reason, one.transient) == (RAW, "train/000", "tar_intact", True)
    assert one.why == "jdb train/000: tar_intact: cut"

    assert platform.run("jdb/raw", "train/000", "train/001").success
    assert failed(platform.instance) == []
    after = {archive: platform.dir("raw").ledger(archive).stat().st_ino for archive in before}
    assert [archive for archive in before if before[archive] != after[archive]] == ["train/000"]


def test_archives_of_a_run_that_died_may_pass_and_know_their_attempt(instance: dg.DagsterInstance) -> None:
    run = started_run(instance, RAW, "train/000", "train/001", tags={ATTEMPT_TAG: "3"})
    assert failed(instance) == []  # the run is queued
    instance.report_run_failed(run, "its process died")

    found = all_failed(instance, SPEC)

    assert [(one.archive, one.reason, one.transient, one.attempt) for one in found] == [
        ("train/000", RUN_DIED, True, 3),
        ("train/001", RUN_DIED, True, 3),
    ]
    assert found[1].why == f"jdb train/001: run {run.run_id[:8]} ended before it: its process died"

    started_run(instance, RAW, "train/001")
    assert failed(instance) == [(RAW, "train/000")]  # the other one is being tried again


def test_a_run_that_was_found_dead_is_told_in_words_of_ours(instance: dg.DagsterInstance) -> None:
    run = started_run(instance, RAW, "train/000")
    instance.report_run_failed(run)

    (found,) = all_failed(instance, SPEC)

    assert (found.reason, found.transient) == (RUN_DIED, True)
    assert found.why == f"jdb train/000: run {run.run_id[:8]} ended before it: {WITHOUT_A_WORD}"


def test_what_a_person_has_canceled_is_not_tried_again_by_itself(instance: dg.DagsterInstance) -> None:
    instance.report_run_failed(started_run(instance, RAW, "train/000"), "its process died")
    assert failed(instance) == [(RAW, "train/000")]
    instance.report_run_canceled(started_run(instance, RAW, "train/000"))
    (one,) = all_failed(instance, SPEC)
    assert (one.reason, one.transient) == ("canceled", False)


def test_a_failure_of_the_whole_run_tells_its_reason(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD_ASSETS_VAE", "org/absent")
    assert not platform.run("jdb/latents", "train/000").success
    (one,) = all_failed(platform.instance, SPEC)
    assert (one.asset.path[-1], one.reason, one.transient) == ("latents", "not_found", False)
    assert one.why.startswith("jdb train/000: run ")


def test_a_failed_archive_has_the_sentence_that_its_run_recorded(platform: Platform) -> None:
    break_at_source(platform, "train/001")
    run_like_a_backfill(platform, RAW, "train/000", "train/001")
    run_like_a_backfill(platform, MDS, "train/001")

    (found,) = failed_in_runs(platform.instance, SPEC, RAW, ["train/001"], runs(platform.instance))

    assert (found.asset, found.archive) == (RAW, "train/001")
    assert found.why.startswith("jdb train/001: ") and "cut off" in found.why
    assert [(one.asset, one.reason) for one in all_failed(platform.instance, SPEC)] == [
        (RAW, "truncated"),
        (MDS, "upstream_missing"),
    ]


def test_a_run_that_failed_as_a_whole_speaks_for_its_archives(platform: Platform) -> None:
    run_like_a_backfill(platform, INDEX, "")
    (index,) = failed_in_runs(platform.instance, SPEC, INDEX, [""], runs(platform.instance))
    assert index.why.startswith("jdb/mds: no archive is published with these settings")

    # As a killed run leaves it: no step says anything.
    killed = started_run(platform.instance, RAW, "train/000", "train/002")
    platform.instance.report_run_failed(killed, "its process died")

    (found,) = failed_in_runs(platform.instance, SPEC, RAW, ["train/002"], runs(platform.instance))
    assert found.why == f"jdb train/002: run {killed.run_id[:8]} ended before it: its process died"


def test_an_archive_of_no_run_is_named_all_the_same(instance: dg.DagsterInstance) -> None:
    (found,) = failed_in_runs(instance, SPEC, RAW, ["train/000"], [])
    assert (found.asset, found.archive, found.transient) == (RAW, "train/000", False)
    assert found.why.startswith("jdb train/000: no run says why")


def one(asset: dg.AssetKey, archive: str, reason: str, transient: bool) -> FailedArchive:
    return FailedArchive(f"jdb {archive}: {reason}", reason, transient, asset, archive, 1, 0.0, asset)


def test_causes_are_counted_by_whether_they_may_pass() -> None:
    found = [one(RAW, "a", "timeout", True), one(RAW, "b", "timeout", True), one(MDS, "c", RUN_DIED, True)]
    assert (
        list(causes([*found, one(RAW, "d", "not_found", False)]))
        == [
            "1 permanent unless somebody mends it: not_found 1",
            "3 may pass: run_died 1, timeout 2",
        ][::-1]
    )
    assert list(causes(found[:1])) == ["1 may pass: timeout 1"]


def test_failed_archives_belong_to_the_directory_of_their_stage() -> None:
    latents = dg.AssetKey(["cc12m", "latents_minres512"])
    found = [one(RAW, "a", "timeout", True), one(latents, "b", "timeout", True), one(INDEX, "", "audited", True)]
    assert by_directory(found, DataRoot(Path("/data")), "tiny") == {"raw": {"a"}, "mds_minres512_latents_tiny": {"b"}}
