"""Sixty archives through three stages with the real daemon and queue while much goes wrong, and `--failed` afterwards.

Three archives are broken at their source, the shard of a fourth is damaged on disk before it is encoded, and one run is
killed. What is done and what failed is told by Dagster's records, by the disk, by `md-assets status` and by the UI.
"""

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster._core.storage.partition_status_cache import AssetPartitionStatus
from playwright.sync_api import Page, expect

from md_assets.bench.dagster_services import answers, code_server, free_port, started, webserver
from md_assets.core.paths import StageDir
from md_assets.datasets.jdb import SPEC, locate
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.sandbox import Sandbox
from md_assets.orchestration.assets import PER_RUN_VARIABLE
from md_assets.orchestration.backfills import a_daemon_runs, ui_path
from md_assets.orchestration.partitions import archive_partitions
from md_assets.stages.once import published
from md_assets_tests.end_to_end.conftest import (
    REPOSITORY,
    SandboxCommands,
    read_output,
    sandbox_of,
    screenshot,
    wait_for,
)
from md_assets_tests.end_to_end.test_backfill import DAEMON
from md_assets_tests.end_to_end.test_kill import temporaries

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(1800)]

STAGES = ("raw", "mds", "latents")
ARCHIVES = SPEC.archives[:60]
SAMPLES, SIZE_PX, KEPT = 10, 256, 4
"""Of each archive: samples, px, and the samples that neither raw nor mds rejects."""

PER_RUN = "raw=24,mds=30,latents=60"
DAEMON_INTERVAL_S = 10
"""Between looks at a backfill: each asks for what was made since the last one, and more looks make more runs."""

ABSENT, TRUNCATED, CORRUPT = "train/022", "train/023", "train/024"
"""Broken at their source. Neighbours, of different runs: each gap in a range is a run more."""

DAMAGED = "train/049"
"""Whose mds shard is damaged on disk before it is encoded."""

KILLED_AT = "train/050"
"""At which the third run of raw, from 048 on, is killed; the second may still be running beside it."""

NOT_COME_TO = frozenset(ARCHIVES[ARCHIVES.index(KILLED_AT) :])
BROKEN = frozenset({ABSENT, TRUNCATED, CORRUPT})
FETCHED = frozenset(ARCHIVES) - BROKEN - NOT_COME_TO


@dataclass(frozen=True)
class Platform:
    """A running installation."""

    commands: SandboxCommands
    instance: dg.DagsterInstance
    address: str

    def stage(self, name: str) -> StageDir:
        data = self.commands.sandbox.data
        return data.latents("jdb", "sdxl1_dfnclipH14") if name == "latents" else getattr(data, name)("jdb")  # type: ignore[no-any-return]

    def cli(self, *arguments: str) -> "Running":
        return Running(self.commands, [sys.executable, "-m", "md_assets.cli", *arguments])


class Running:
    """A command of ours that goes on while the test does something else."""

    def __init__(self, commands: SandboxCommands, command: list[str]) -> None:
        self._process = commands.start(*command)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def output(self) -> str:
        return read_output(self._process)

    def finish(self) -> tuple[int, str]:
        """Exit code and output."""
        return self._process.wait(900), self.output()


@pytest.fixture
def platform(prepared_sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    """Sixty archives at their source, and the committed instance with code server, daemon and webserver."""
    sandbox = sandbox_of(prepared_sandbox, tmp_path, ARCHIVES, SAMPLES, SIZE_PX)
    settings = yaml.safe_load((REPOSITORY / "deploy" / "dagster.yaml").read_text())
    settings["run_coordinator"]["config"]["dequeue_interval_seconds"] = 1  # instead of 5
    (sandbox.dagster_home / "dagster.yaml").write_text(yaml.safe_dump(settings))
    with LoopbackHub(sandbox.hub_root) as hub, ExitStack() as stack:
        environment = {**sandbox.environment(hub.endpoint), PER_RUN_VARIABLE: PER_RUN, "PYTHONPATH": str(REPOSITORY)}
        environment["DAEMON_INTERVAL_S"] = str(DAEMON_INTERVAL_S)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        instance = stack.enter_context(dg.DagsterInstance.get())
        code_port, port = free_port(), free_port()
        of_code = ["--grpc-port", str(code_port), "--grpc-host", "localhost"]
        for name, command, ready in (
            ("code server", code_server("md_assets.definitions", code_port), lambda: answers(code_port)),
            ("daemon", ["-c", DAEMON, *of_code], lambda: a_daemon_runs(instance)),
            ("webserver", webserver(code_port, port), lambda: answers(port)),
        ):
            stack.enter_context(started(name, command, tmp_path, environment)).wait_until(ready)
        commands = SandboxCommands(sandbox.path, environment, sandbox=sandbox, hub=hub)
        stack.callback(commands.end)
        yield Platform(commands, instance, f"http://localhost:{port}")


def break_sources(platform: Platform) -> None:
    faults = platform.commands.hub.faults
    faults.status(f"*/{locate(ABSENT).path}", 404, times=None)
    faults.corrupt(f"*/{locate(CORRUPT).path}", times=None)
    faults.stall(f"*/{locate(KILLED_AT).path}", stall_s=60, after_bytes=1000)
    file = source(platform, TRUNCATED)
    file.rename(file.with_suffix(".whole"))
    file.write_bytes(file.with_suffix(".whole").read_bytes()[:-3000])


def mend_sources(platform: Platform) -> None:
    platform.commands.hub.faults.clear()
    file = source(platform, TRUNCATED)
    file.with_suffix(".whole").replace(file)


def source(platform: Platform, archive: str) -> Path:
    """An archive's file at its source."""
    remote = locate(archive)
    return platform.commands.sandbox.hub_root / "datasets" / remote.repo / remote.path


def found_intact(platform: Platform, archive: str) -> bool:
    """Whether an archive's shards of mds are published and were checked by their own run."""
    check = dg.AssetCheckKey(dg.AssetKey(["jdb", "mds"]), "shards_intact")
    found = platform.instance.event_log_storage.get_asset_check_partition_info([check], partition_keys=[archive])
    return any(info.latest_execution_status is AssetCheckExecutionRecordStatus.SUCCEEDED for info in found)


def damage(platform: Platform, archive: str) -> None:
    """What a failing disk does to an archive's shard of mds: a picture begins with zeros."""
    (shard,) = platform.stage("mds").data(archive).glob("*.mds")
    data = shard.read_bytes()
    start = data.index(b"\xff\xd8\xff")
    shard.write_bytes(data[:start] + bytes(64) + data[start + 64 :])


def raw_runs(platform: Platform) -> list[dg.DagsterRun]:
    return [run for run in platform.instance.get_runs() if dg.AssetKey(["jdb", "raw"]) in (run.asset_selection or ())]


def archives_of(run: dg.DagsterRun) -> tuple[str, ...]:
    first, last = (run.tags[f"dagster/asset_partition_range_{end}"] for end in ("start", "end"))
    return SPEC.archives[SPEC.archives.index(first) : SPEC.archives.index(last) + 1]


def kill_run_at(platform: Platform, archive: str) -> None:
    """kill -9 of the process of the run that fetches an archive."""
    (run,) = (run for run in raw_runs(platform) if archive in archives_of(run))
    assert run.status is dg.DagsterRunStatus.STARTED
    assert archive in archives_of(run)[1:-1]
    (pid,) = {
        int(str(event.engine_event_data.metadata["pid"].value))
        for entry in platform.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        if (event := entry.dagster_event) and "pid" in event.engine_event_data.metadata
    }
    os.kill(pid, signal.SIGKILL)


def states(platform: Platform) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """By stage: archives that are done and archives that failed, as Dagster has them; the disk agrees."""
    found = {}
    for stage in STAGES:
        statuses = platform.instance.get_status_by_partition(
            dg.AssetKey(["jdb", stage]), SPEC.archives, archive_partitions(SPEC)
        )
        assert statuses is not None
        done, failed = (
            frozenset(archive for archive, status in statuses.items() if status is wanted)
            for wanted in (AssetPartitionStatus.MATERIALIZED, AssetPartitionStatus.FAILED)
        )
        assert {status for a, status in statuses.items() if a not in done | failed} <= {None}
        on_disk = {archive for archive in SPEC.archives if published(platform.stage(stage), archive)}
        assert on_disk == done, stage
        found[stage] = (done, failed)
    return found


def materializations(platform: Platform) -> Counter[tuple[str, str | None]]:
    return Counter(
        (name, record.partition_key)
        for name in ("annotations", *STAGES, "mds_index", "latents_index")
        for record in platform.instance.fetch_materializations(dg.AssetKey(["jdb", name]), limit=1000).records
    )


def failures(platform: Platform) -> dict[tuple[str, str], tuple[str, bool]]:
    """Asset and archive -> reason, and whether it may pass; as scripts are told."""
    code, output = platform.cli("status", "jdb", "--json").finish()
    assert code == 0, output
    (dataset,) = json.loads(output)["datasets"]
    return {(f["asset"], f["archive"]): (f["reason"], f["transient"]) for f in dataset["failed_archives"]}


def expect_counts(page: Page, platform: Platform, counts: Mapping[str, tuple[int, int]]) -> None:
    """The UI says of each stage how many archives are done and how many failed."""
    for stage, (done, failed) in counts.items():
        page.goto(f"{platform.address}/assets/jdb/{stage}?view=partitions")
        expect(page.get_by_text(f"Materialized ({done})", exact=True)).to_be_visible()
        expect(page.get_by_text(f"Failed ({failed})", exact=True)).to_be_visible()
        if failed and stage == "raw":
            screenshot(page, "failed-partitions")


def expect_failures(page: Page, platform: Platform) -> None:
    """The UI says what failed, and why: on the backfill's page, in the run, and as a check of the damaged archive."""
    (backfill,) = [one for one in platform.instance.get_backfills() if one.status.value == "COMPLETED_FAILED"]
    page.goto(f"{platform.address}{ui_path(backfill.backfill_id)}")
    expect(page.get_by_text("jdb / latents", exact=True).first).to_be_visible()
    screenshot(page, "failed-backfill")

    (run,) = (run for run in raw_runs(platform) if ARCHIVES[0] in archives_of(run))
    page.goto(f"{platform.address}/runs/{run.run_id}")
    page.get_by_role("row", name="failed_archives").first.get_by_text("[Show Markdown]").click()
    for reason in ("not_found", "truncated"):
        expect(page.get_by_role("dialog").get_by_role("cell", name=reason, exact=True)).to_be_visible()
    screenshot(page.get_by_role("dialog"), "failed-run")

    page.goto(f"{platform.address}/assets/jdb/mds?view=checks&checkDetail=shards_intact")
    expect(page.get_by_text("Failed", exact=True).first).to_be_visible()
    expect(page.get_by_text(DAMAGED, exact=True).first).to_be_visible()
    screenshot(page, "failed-check")


def test_what_failed_is_told_exactly_and_finished_when_it_is_mended(platform: Platform, page: Page) -> None:
    break_sources(platform)
    backfill = platform.cli("backfill", "jdb", "--archives", f"{ARCHIVES[0]}...{ARCHIVES[-1]}", "--wait")
    workspace = platform.stage("raw").ledger(KILLED_AT).parent / ".050.tmp"
    assert wait_for(lambda: any(workspace.glob("*.part")) or backfill.ended, 300, pause_s=0.05), backfill.output()
    kill_run_at(platform, KILLED_AT)
    assert wait_for(lambda: found_intact(platform, DAMAGED) or backfill.ended, 600, pause_s=0.05), backfill.output()
    damage(platform, DAMAGED)
    code, output = backfill.finish()

    assert code == 1, output
    assert states(platform) == {
        "raw": (FETCHED, BROKEN | NOT_COME_TO),
        "mds": (FETCHED, frozenset()),
        "latents": (FETCHED - {DAMAGED}, frozenset({DAMAGED})),
    }, output
    assert failures(platform) == {
        ("jdb/raw", ABSENT): ("not_found", False),
        ("jdb/raw", TRUNCATED): ("truncated", False),
        ("jdb/raw", CORRUPT): ("checksum_mismatch", False),
        **{("jdb/raw", archive): ("run_died", True) for archive in NOT_COME_TO},
        ("jdb/mds", DAMAGED): ("shards_intact", True),
        ("jdb/latents", DAMAGED): ("upstream_damaged", False),
    }
    before = materializations(platform)
    assert before == Counter(
        [
            *((stage, archive) for stage in ("raw", "mds") for archive in FETCHED),
            *(("latents", archive) for archive in FETCHED - {DAMAGED}),
            *((name, None) for name in ("annotations", "mds_index", "latents_index")),
        ]
    )
    expect_counts(page, platform, {"raw": (47, 13), "mds": (47, 0), "latents": (46, 1)})
    expect_failures(page, platform)

    mend_sources(platform)
    code, output = platform.cli("backfill", "jdb", "--failed", "--wait").finish()

    assert code == 0, output
    everything = frozenset(ARCHIVES)
    assert states(platform) == dict.fromkeys(STAGES, (everything, frozenset()))
    assert failures(platform) == {}
    again = BROKEN | NOT_COME_TO
    assert materializations(platform) - before == Counter(
        [
            *(("raw", archive) for archive in again),
            *((stage, archive) for stage in ("mds", "latents") for archive in again | {DAMAGED}),
            *((name, None) for name in ("mds_index", "latents_index")),
        ]
    )
    expect_counts(page, platform, dict.fromkeys(STAGES, (60, 0)))
    latents = platform.stage("latents")
    index = json.loads(latents.index("train").read_text())
    assert sum(shard["samples"] for shard in index["shards"]) == KEPT * len(ARCHIVES)
    assert [temporaries(platform.stage(stage).path) for stage in STAGES] == [[], [], []]
