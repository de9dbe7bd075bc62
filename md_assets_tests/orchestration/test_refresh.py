"""Weekly refreshes against a loopback Hub where archives changed, appeared and vanished."""

import json
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from md_assets.cli import DONE, main
from md_assets.datasets import all_specs
from md_assets.datasets.jdb import SPEC
from md_assets.definitions import defs
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration.refresh import Changes, known_versions, refresh_schedules
from md_assets_tests.orchestration.conftest import Platform

ARCHIVE = dg.AssetKey(["jdb", "archive"])
FIRST = {"train/000", "train/001", "valid/000", "valid/001"}


def refresh(platform: Platform) -> dg.ExecuteInProcessResult:
    """The job, as its schedule starts it."""
    result = defs.resolve_job_def("jdb_refresh").execute_in_process(instance=platform.instance, raise_on_error=False)
    assert result.success, failure_of(result)
    return result


def upstream(platform: Platform, archive: str) -> Path:
    file = SPEC.locate(archive)
    return platform.sandbox.hub_root / "datasets" / file.repo / file.path


def observed(platform: Platform, result: dg.ExecuteInProcessResult) -> tuple[set[str], dict[str, Any]]:
    """Archives that the run stored a version of, and the metadata of its summary."""
    records = platform.instance.fetch_observations(ARCHIVE, limit=100).records
    events = [record.asset_observation for record in records if record.run_id == result.run_id]
    (summary,) = [event for event in events if not event.partition]
    facts = {name: value.value for name, value in summary.metadata.items()}
    return {event.partition for event in events if event.partition}, facts


def test_what_changed_appeared_and_vanished_is_told(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000", "train/001").success
    stored, facts = observed(platform, refresh(platform))
    assert stored == FIRST
    assert facts["summary"] == "- 4 archives, observed for the first time"
    before = known_versions(platform.instance, SPEC)
    revision = facts["revision of JourneyDB/JourneyDB"]
    assert len(revision) == 40

    shutil.copyfile(upstream(platform, "valid/000"), upstream(platform, "train/001"))
    shutil.copyfile(upstream(platform, "train/000"), upstream(platform, "train/002"))
    upstream(platform, "valid/001").unlink()
    asked = platform.hub.requests["listing"]
    stored, facts = observed(platform, refresh(platform))

    assert platform.hub.requests["listing"] == asked + 1
    assert stored == {"train/001", "train/002"}
    numbers = {name: facts[name] for name in ("archives", "changed", "new", "vanished", "raw_of_another_content")}
    assert numbers == {"archives": 4, "changed": 1, "new": 1, "vanished": 1, "raw_of_another_content": 1}
    assert facts["summary"].splitlines() == [
        "- 4 archives: 1 changed and 1 new since the observation before, 1 vanished",
        "- changed: train/001",
        "- new: train/002",
        "- vanished (what was made of them stays): valid/001",
        "- raw is of another content: train/001",
    ]
    assert facts["revision of JourneyDB/JourneyDB"] not in ("", revision)
    after = known_versions(platform.instance, SPEC)
    assert {archive for archive in after if before.get(archive) != after[archive]} == {"train/001", "train/002"}
    # Nothing was touched: what is published stays, and the vanished archive keeps its version.
    assert platform.ledger("raw", "train/001") is not None and after["valid/001"] == before["valid/001"]

    stored, facts = observed(platform, refresh(platform))
    assert stored == set() and (facts["changed"], facts["new"], facts["vanished"]) == (0, 0, 1)
    assert facts["raw_of_another_content"] == 1


def test_a_changed_archive_is_no_longer_told_once_it_was_fetched_again(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000").success
    refresh(platform)
    shutil.copyfile(upstream(platform, "train/001"), upstream(platform, "train/000"))
    assert observed(platform, refresh(platform))[1]["raw_of_another_content"] == 1
    assert platform.run("jdb/raw", "train/000").success
    assert observed(platform, refresh(platform))[1]["raw_of_another_content"] == 0


def test_a_failing_source_fails_the_run_and_changes_nothing(platform: Platform) -> None:
    refresh(platform)
    before = known_versions(platform.instance, SPEC)
    shutil.rmtree(platform.sandbox.hub_root / "datasets" / SPEC.locate("train/000").repo)
    result = defs.resolve_job_def("jdb_refresh").execute_in_process(instance=platform.instance, raise_on_error=False)
    assert not result.success and "JourneyDB/JourneyDB" in failure_of(result)
    assert known_versions(platform.instance, SPEC) == before


def requested(platform: Platform, cursor: Any = None) -> tuple[dict[str, set[str]], Any]:
    """What automation asks for in a tick, by asset, and its cursor."""
    jdb = dg.AssetSelection.groups("jdb")
    tick = dg.evaluate_automation_conditions(defs, platform.instance, jdb, cursor=cursor)
    asked = {one.key.path[-1]: tick.get_requested_partitions(one.key) for one in tick.results}
    return {asset: {partition or "" for partition in of} for asset, of in asked.items() if of}, tick.cursor


def stale(capsys: pytest.CaptureFixture[str], stage: str) -> tuple[int, int, list[Any]]:
    """Archives of a stage that are done and stale, and why, as `md-assets status` says."""
    capsys.readouterr()
    assert main(["status", "jdb", "--json"]) == DONE
    (dataset,) = json.loads(capsys.readouterr().out)["datasets"]
    (numbers,) = [of for of in dataset["stages"] if of["stage"] == stage]
    return numbers["done"], numbers["stale"], numbers["stale_because"]


def test_what_changed_is_stale_and_asked_for_again_by_automation(
    platform: Platform, capsys: pytest.CaptureFixture[str]
) -> None:
    platform.up_to("mds", "train/000", "train/001")
    assert platform.run("jdb/raw", "valid/001").success
    assert platform.run("jdb/mds", "valid/001").success
    assert platform.run("jdb/mds_index").success
    refresh(platform)
    asked, cursor = requested(platform)
    assert asked == {"latents": {"train/000", "train/001", "valid/001"}}
    assert stale(capsys, "raw") == (3, 0, [])

    shutil.copyfile(upstream(platform, "valid/000"), upstream(platform, "train/001"))
    shutil.copyfile(upstream(platform, "train/000"), upstream(platform, "train/002"))
    upstream(platform, "valid/001").unlink()
    refresh(platform)

    assert stale(capsys, "raw") == (2, 1, [{"input": "archive", "archives": ["train/001"]}])
    asked, cursor = requested(platform, cursor)
    assert asked == {"raw": {"train/001", "train/002"}}
    assert platform.run("jdb/raw", "train/001", "train/002").success
    assert stale(capsys, "raw") == (4, 0, [])
    assert stale(capsys, "mds") == (2, 1, [{"input": "raw", "archives": ["train/001"]}])
    asked, cursor = requested(platform, cursor)
    assert asked == {"mds": {"train/001", "train/002"}}
    # What vanished at the source stays as it was made.
    assert platform.materialized("jdb/mds") == {"train/000", "train/001", "valid/001"}
    assert platform.dir("raw").data("valid/001").exists() and platform.dir("mds").data("valid/001").exists()


def test_many_archives_are_counted_and_some_named() -> None:
    archives = tuple(f"part-{number:06}" for number in range(14_000))
    changes = Changes(14_000, False, archives, (), (), (), {})
    first, new = changes.lines()
    assert first == "14,000 archives: 0 changed and 14,000 new since the observation before, 0 vanished"
    assert new.startswith("new: part-000000, ") and new.endswith("part-000019 and 13,980 more")


def test_every_dataset_has_its_own_time_in_the_week() -> None:
    schedules = refresh_schedules(all_specs())
    assert [schedule.name for schedule in schedules] == [f"{spec.slug}_weekly_refresh" for spec in all_specs()]
    assert len({schedule.cron_schedule for schedule in schedules}) == len(schedules)
    assert all(schedule.default_status is dg.DefaultScheduleStatus.STOPPED for schedule in schedules)


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.slug)
def test_a_schedule_starts_its_job_over_all_archives(spec: Any) -> None:
    schedule = defs.resolve_schedule_def(f"{spec.slug}_weekly_refresh")
    (request,) = schedule.evaluate_tick(dg.build_schedule_context()).run_requests or ()
    assert (schedule.job_name, request.partition_key) == (f"{spec.slug}_refresh", None)
