"""Ranged runs: each archive stands or falls alone, and what people see of it."""

import re
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from md_assets.core.progress import EVERY_S
from md_assets.datasets.jdb import SPEC
from md_assets.definitions import defs
from md_assets.demo.journeydb import REJECTED_BY_RAW, miniature_archive, write_tgz
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration.archive_run import DATA_VERSION_TAG
from md_assets_tests.orchestration.conftest import QUICK, SAMPLES, SIZE_PX, Platform


def archive_file(platform: Platform, archive: str) -> Path:
    """An archive at its source."""
    file = SPEC.locate(archive)
    return platform.sandbox.hub_root / "datasets" / file.repo / file.path


def events(platform: Platform, result: dg.ExecuteInProcessResult, kind: dg.DagsterEventType) -> list[dg.DagsterEvent]:
    logs = platform.instance.all_logs(result.run_id, of_type=kind)
    return [entry.dagster_event for entry in logs if entry.dagster_event]


def test_a_range_is_recorded_archive_by_archive(platform: Platform) -> None:
    result = platform.run("jdb/raw", "train/000", "train/001")

    assert result.success, failure_of(result)
    assert platform.materialized("jdb/raw") == {"train/000", "train/001"}
    recorded = events(platform, result, dg.DagsterEventType.ASSET_MATERIALIZATION)
    assert [event.partition for event in recorded] == ["train/000", "train/001"]
    rejected = sum(REJECTED_BY_RAW.values())
    for event in recorded:
        metadata = event.step_materialization_data.materialization.metadata
        assert metadata["read"].value == SAMPLES
        assert metadata["kept"].value == SAMPLES - rejected
        assert metadata["rejected"].value == rejected
        assert "| too_small | 2 |" in metadata["rejected_by_reason"].value
        assert metadata["images_per_s"].value > 0
        assert "data:image/jpeg;base64," in metadata["contact_sheet"].value
        assert len(metadata["contact_sheet"].value) < 16_000
        said = f"jdb/raw {event.partition}: {SAMPLES} read, {SAMPLES - rejected} kept, {rejected} rejected in "
        assert event.message.startswith(said)  # its line in the run's log


def test_checks_are_stored_by_partition(platform: Platform) -> None:
    platform.up_to("latents", "train/000")

    for asset, checks in {
        "jdb/raw": {"counts_balance", "tar_intact"},
        "jdb/mds": {"counts_balance", "shards_intact"},
        "jdb/latents": {"counts_balance", "shards_intact", "latents_valid"},
    }.items():
        evaluations = [
            entry.dagster_event.asset_check_evaluation_data
            for run in platform.instance.get_runs()
            for entry in platform.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        ]
        of_asset = [e for e in evaluations if e.asset_key.to_user_string() == asset]
        assert {e.check_name for e in of_asset} == checks
        assert {e.partition for e in of_asset} == {"train/000"}
        assert all(e.passed for e in of_asset)


def test_a_truncated_archive_fails_alone_and_is_all_that_is_done_again(platform: Platform) -> None:
    broken = archive_file(platform, "train/000")
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])

    result = platform.run("jdb/raw", "train/000", "train/001")

    assert not result.success
    message = failure_of(result)
    assert "1 of 2 archives failed" in message and "jdb train/000" in message and "cut off" in message
    assert "train/001" not in message
    (failure,) = events(platform, result, dg.DagsterEventType.STEP_FAILURE)
    *_, row = failure.step_failure_data.user_failure_data.metadata["failed_archives"].value.splitlines()
    assert row.startswith("| train/000 | truncated | ") and "cut off" in row and "jdb" not in row
    assert platform.materialized("jdb/raw") == {"train/001"}
    assert platform.ledger("raw", "train/000") is None
    assert sorted(p.name for p in (platform.dir("raw").path / "train").iterdir()) == ["001.json", "001.tar"]

    untouched = platform.dir("raw").data("train/001").stat().st_mtime_ns
    broken.write_bytes(whole)
    mended = platform.run("jdb/raw", "train/000", "train/001")

    assert mended.success, failure_of(mended)
    assert platform.materialized("jdb/raw") == {"train/000", "train/001"}
    recorded = events(platform, mended, dg.DagsterEventType.ASSET_MATERIALIZATION)
    passed_over = {
        e.partition: e.step_materialization_data.materialization.metadata["passed_over"].value for e in recorded
    }
    assert passed_over == {"train/000": False, "train/001": True}
    assert recorded[1].message == "jdb/raw train/001: already published, passed over"
    pictures = ["contact_sheet" in e.step_materialization_data.materialization.metadata for e in recorded]
    assert pictures == [True, False]  # that of train/001 is with the event of when it was made
    assert platform.dir("raw").data("train/001").stat().st_mtime_ns == untouched


def test_a_failed_upstream_archive_does_not_stop_the_others_downstream(platform: Platform) -> None:
    platform.up_to("raw", "train/000")

    result = platform.run("jdb/mds", "train/000", "train/001")

    assert not result.success
    assert "jdb train/001: raw is not published. Materialize jdb/raw of it" in failure_of(result)
    assert platform.materialized("jdb/mds") == {"train/000"}


def test_latents_of_a_range_name_the_archive_without_mds(platform: Platform) -> None:
    platform.up_to("mds", "train/000")

    result = platform.run("jdb/latents", "train/000", "train/001")

    assert not result.success
    assert "1 of 2 archives failed. jdb train/001: mds is not published" in failure_of(result)
    assert platform.materialized("jdb/latents") == {"train/000"}
    assert platform.ledger("latents", "train/000") is not None
    assert platform.ledger("latents", "train/001") is None


def test_other_settings_make_an_archive_stale_and_do_it_again(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/001").success
    first = platform.ledger("raw", "train/001")

    assert platform.run("jdb/raw", "train/001", images={"max_image_size": 280, "num_workers": 0}).success

    second = platform.ledger("raw", "train/001")
    assert first is not None and second is not None
    assert first.fingerprint != second.fingerprint
    refused = platform.run("jdb/mds", "train/001")
    assert not refused.success and "annotations" not in failure_of(refused)
    assert "raw was made with other settings" in failure_of(refused)


def test_a_changed_archive_at_the_source_is_fetched_again(platform: Platform) -> None:
    assert platform.run("jdb/raw", "valid/000").success
    before = platform.ledger("raw", "valid/000")

    write_tgz(archive_file(platform, "valid/000"), miniature_archive("valid/000", SAMPLES, SIZE_PX).members[:5])
    assert platform.run("jdb/raw", "valid/000").success

    after = platform.ledger("raw", "valid/000")
    assert before is not None and after is not None
    assert (before.read, after.read) == (SAMPLES, 5)
    assert before.source["content_id"] != after.source["content_id"]


@pytest.mark.slow
def test_long_work_tells_how_far_it_is_every_few_seconds(platform: Platform) -> None:
    noise = np.random.default_rng(0).bytes(12 * 2**20)  # no images, but long to fetch
    write_tgz(archive_file(platform, "train/000"), [("./000/noise.jpg", noise)])
    size_bytes = archive_file(platform, "train/000").stat().st_size
    platform.hub.faults.throttle("*/train/imgs/000.tgz", bytes_per_s=size_bytes / (2.5 * EVERY_S))

    result = platform.run("jdb/raw", "train/000")

    assert result.success, failure_of(result)
    lines = [entry.user_message for entry in platform.instance.all_logs(result.run_id)]
    fetched = [line for line in lines if re.match(r"jdb train/000 fetches: .* MB, [\d.]+ MB/s, ETA \d+:\d\d$", line)]
    assert len(fetched) == 2


def test_one_partition_goes_through_several_stages_in_one_run(platform: Platform) -> None:
    """Dagster would pass over mds, and call it a success, if raw returned no result."""
    assert platform.run("jdb/annotations").success
    job = defs.resolve_implicit_global_asset_job_def()
    keys = {dg.AssetKey(["jdb", name]) for name in ("raw", "mds", "mds_index")}

    result = job.get_subset(asset_selection=keys).execute_in_process(
        instance=platform.instance,
        partition_key="train/000",
        run_config={"resources": {"images": {"config": dict(QUICK["images"])}}},
    )

    recorded = events(platform, result, dg.DagsterEventType.ASSET_MATERIALIZATION)
    assert [(event.asset_key.path[-1], event.partition) for event in recorded if event.asset_key] == [
        ("raw", "train/000"),
        ("mds", "train/000"),
        ("mds_index", None),
    ]
    raw = platform.ledger("raw", "train/000")
    assert raw is not None and recorded[0].step_materialization_data.materialization.metadata["kept"].value == raw.kept
    version = recorded[0].step_materialization_data.materialization.tags or {}
    assert version[DATA_VERSION_TAG] == raw.content_id[:32]
    assert platform.dir("mds").index("train").exists()
