"""Which archives failed, and why, from the records of real runs."""

import dagster as dg

from md_assets.datasets.jdb import SPEC
from md_assets.definitions import defs
from md_assets.orchestration.failures import FailedArchive, failed_archives, failed_in_runs
from md_assets_tests.orchestration.conftest import Platform

RAW, MDS, INDEX = (dg.AssetKey(["jdb", name]) for name in ("raw", "mds", "mds_index"))


def break_at_source(platform: Platform, archive: str) -> None:
    """Cut an archive in half."""
    file = SPEC.locate(archive)
    path = platform.sandbox.hub_root / "datasets" / file.repo / file.path
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def run_like_a_backfill(platform: Platform, asset: dg.AssetKey, *archives: str) -> None:
    """A failing run of one asset with the selection and tags that the daemon gives it."""
    tags = {"dagster/asset_partition_range_start": archives[0], "dagster/asset_partition_range_end": archives[-1]}
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        asset_selection=[asset],
        tags=tags if archives[0] else {},
        instance=platform.instance,
        raise_on_error=False,
        run_config={"resources": {"images": {"config": {"num_workers": 0}}}},
    )
    assert not result.success


def runs(platform: Platform) -> list[dg.DagsterRun]:
    return list(reversed(platform.instance.get_runs()))


def failed(platform: Platform, asset: dg.AssetKey) -> set[str]:
    return failed_archives(platform.instance, defs.resolve_asset_graph(), SPEC, asset)


def test_an_archive_counts_as_failed_until_an_attempt_succeeds(platform: Platform) -> None:
    break_at_source(platform, "train/001")
    assert not platform.run("jdb/raw", "train/000", "train/001").success
    assert (failed(platform, RAW), failed(platform, MDS)) == ({"train/001"}, set())

    platform.instance.report_runless_asset_event(dg.AssetMaterialization(RAW, partition="train/001"))
    assert failed(platform, RAW) == set()


def test_an_archive_with_a_failed_check_counts_as_failed(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000", "train/001").success
    assert failed(platform, RAW) == set()

    platform.instance.report_runless_asset_event(
        dg.AssetCheckEvaluation(
            asset_key=RAW, check_name="tar_intact", passed=False, metadata={}, partition="train/000"
        )
    )
    assert failed(platform, RAW) == {"train/000"}

    assert platform.run("jdb/raw", "train/000").success
    assert failed(platform, RAW) == set()


def test_a_failed_archive_has_the_sentence_that_its_run_recorded(platform: Platform) -> None:
    break_at_source(platform, "train/001")
    run_like_a_backfill(platform, RAW, "train/000", "train/001")
    run_like_a_backfill(platform, MDS, "train/001")

    (found,) = failed_in_runs(platform.instance, SPEC, RAW, ["train/001"], runs(platform))

    assert (found.asset, found.archive) == (RAW, "train/001")
    assert found.why.startswith("jdb train/001: ") and "cut off" in found.why


def test_a_run_that_failed_as_a_whole_speaks_for_its_archives(platform: Platform) -> None:
    run_like_a_backfill(platform, INDEX, "")
    (index,) = failed_in_runs(platform.instance, SPEC, INDEX, [""], runs(platform))
    assert "no archive is published with these settings" in index.why

    # As a killed run leaves it: no step says anything.
    run = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={RAW})
    tags = {"dagster/asset_partition_range_start": "train/000", "dagster/asset_partition_range_end": "train/002"}
    killed = platform.instance.create_run_for_job(run, tags=tags, asset_selection=frozenset({RAW}))
    platform.instance.report_run_failed(killed, "its process died")

    (found,) = failed_in_runs(platform.instance, SPEC, RAW, ["train/002"], runs(platform))
    assert found.why == f"jdb train/002: run {killed.run_id[:8]} ended before it: its process died"


def test_an_archive_of_no_run_is_named_all_the_same() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        (found,) = failed_in_runs(instance, SPEC, RAW, ["train/000"], [])
    assert found == FailedArchive(RAW, "train/000", found.why) and "no run says why" in found.why
