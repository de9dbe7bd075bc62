"""Automation with the real daemon: it makes mds and latents of what is fetched while a backfill fetches the rest."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from md_assets.datasets.jdb import SPEC, locate
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.sandbox import Sandbox
from md_assets.orchestration.assets import PER_RUN_VARIABLE
from md_assets.orchestration.backfills import a_daemon_runs
from md_assets_tests.end_to_end.conftest import SandboxCommands, read_output, sandbox_of, wait_for
from md_assets_tests.end_to_end.test_backfill import DAEMON

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ARCHIVES, SAMPLES, SIZE_PX = SPEC.archives[:48], 8, 256
PER_RUN = "raw=4,mds=5,latents=6"
SECONDS_OF_A_DOWNLOAD = 5.0
MODULE = ("-m", "md_assets.definitions")


@pytest.fixture
def commands(prepared_sandbox: Sandbox, tmp_path: Path) -> Iterator[SandboxCommands]:
    """A Hub that takes its time for each archive."""
    sandbox = sandbox_of(prepared_sandbox, tmp_path, ARCHIVES, SAMPLES, SIZE_PX)
    with LoopbackHub(sandbox.hub_root) as hub:
        for archive in ARCHIVES:
            hub.faults.stall(f"*/{locate(archive).path}", stall_s=SECONDS_OF_A_DOWNLOAD, after_bytes=1000)
        environment = {**sandbox.environment(hub.endpoint), PER_RUN_VARIABLE: PER_RUN, "DAEMON_INTERVAL_S": "5"}
        commands = SandboxCommands(sandbox.path, environment, sandbox=sandbox, hub=hub)
        yield commands
        commands.end()


def test_archives_are_encoded_while_others_are_fetched(
    commands: SandboxCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(commands.sandbox.dagster_home))
    with dg.DagsterInstance.get() as instance:

        def made(stage: str) -> Counter[str | None]:
            records = instance.fetch_materializations(dg.AssetKey(["jdb", stage]), limit=1000).records
            return Counter(record.partition_key for record in records)

        daemon = commands.start(sys.executable, "-c", DAEMON, *MODULE)
        assert wait_for(lambda: a_daemon_runs(instance) or daemon.poll() is not None, 120, pause_s=0.2)
        commands.finish(commands.start(sys.executable, "-m", "dagster", "sensor", "start", "automation", *MODULE))
        backfill = [sys.executable, "-m", "md_assets.cli", "backfill", "jdb", "--stages", "raw"]
        commands.finish(commands.start(*backfill, "--archives", f"{ARCHIVES[0]}...{ARCHIVES[-1]}"))

        assert wait_for(lambda: made("latents") or len(made("raw")) == len(ARCHIVES), 400, pause_s=1), read_output(
            daemon
        )
        latents, mds, raw = (made(stage) for stage in ("latents", "mds", "raw"))  # in this order, for work goes on

        assert latents and len(raw) < len(ARCHIVES), (
            f"{len(raw)} of {len(ARCHIVES)} are fetched, {len(latents)} encoded"
        )
        assert set(latents) <= set(mds) <= set(raw)
        assert {*latents.values(), *mds.values(), *raw.values()} == {1}, "an archive was made twice"
        by_automation = instance.get_runs(dg.RunsFilter(tags={"dagster/from_automation_condition": "true"}))
        assert {key.path[-1] for run in by_automation for key in run.asset_selection or ()} >= {"mds", "latents"}
