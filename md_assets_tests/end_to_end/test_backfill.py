"""`md-assets backfill` with the real daemon: one archive broken at its source, then mended and finished."""

import sys
from collections import Counter
from collections.abc import Iterator

import dagster as dg
import pytest

from md_assets.core.paths import ARCHIVE_STAGES, Stage
from md_assets.orchestration.backfills import a_daemon_runs
from md_assets_tests.end_to_end.conftest import SandboxCommands, read_output, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WHOLE, BROKEN = "train/000", "train/001"

DAEMON = """
import os
import dagster._daemon.controller as controller
controller.DEFAULT_DAEMON_INTERVAL_SECONDS = int(os.environ.get("DAEMON_INTERVAL_S", 1))  # instead of 30
from dagster._daemon.cli import run_command
run_command()
"""
"""A daemon that looks at backfills more often, for which Dagster has no setting."""


@pytest.fixture
def instance(commands: SandboxCommands, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """The sandbox's instance, with the daemon that `dagster dev` starts; ended as a person ends it."""
    monkeypatch.setenv("DAGSTER_HOME", str(commands.sandbox.dagster_home))
    with dg.DagsterInstance.get() as instance:  # its databases are made before a second process may try the same
        process = commands.start(sys.executable, "-c", DAEMON, "-m", "md_assets.definitions")
        assert wait_for(lambda: a_daemon_runs(instance) or process.poll() is not None, 120, pause_s=0.2)
        yield instance
        process.send_signal(2)
        assert process.wait(60) == 0, read_output(process)


def backfill(commands: SandboxCommands, *arguments: str) -> tuple[int, str]:
    """Exit code and output of `md-assets backfill jdb … --wait`."""
    process = commands.start(sys.executable, "-m", "md_assets.cli", "backfill", "jdb", *arguments, "--wait")
    return process.wait(400), read_output(process)


def materializations(instance: dg.DagsterInstance) -> Counter[tuple[str, str | None]]:
    return Counter(
        (name, record.partition_key)
        for name in ("annotations", *ARCHIVE_STAGES, "mds_index", "latents_index")
        for record in instance.fetch_materializations(dg.AssetKey(["jdb", name]), limit=100).records
    )


def fail_then_mend(commands: SandboxCommands, instance: dg.DagsterInstance, *stages: Stage) -> None:
    """A backfill of two archives through stages from raw on, one of them broken at its source; then it is mended."""
    last, to_stages = stages[-1], ("--stages", ",".join(stages))
    indexes = [(f"{stage}_index", None) for stage in stages if stage != "raw"]
    commands.hub.faults.status("*/train/imgs/001.tgz", 404, times=None)

    code, output = backfill(commands, "--archives", f"{WHOLE}...{BROKEN}", *to_stages)

    assert code == 1, output
    failures = [line for line in output.splitlines() if line.startswith("FAILED")]
    assert len(failures) == 1 and failures[0].startswith(f"FAILED jdb/raw: jdb {BROKEN}: "), output
    assert "  jdb/raw: 1 done, 1 failed, 0 in progress, of 2\n" in output
    assert f"  jdb/{last}: 1 done, 0 failed, 0 in progress, 1 behind a failure, of 2\n" in output
    # Newest first: what is finished is merged all the same, by a backfill of its own.
    assert [b.status.value for b in instance.get_backfills()] == ["COMPLETED_SUCCESS", "COMPLETED_FAILED"]
    done = Counter([("annotations", None), *((stage, WHOLE) for stage in stages), *indexes])
    assert materializations(instance) == done

    commands.hub.faults.clear()
    code, output = backfill(commands, "--failed", *to_stages)

    assert code == 0 and "FAILED" not in output, output
    assert instance.get_backfills()[0].status.value == "COMPLETED_SUCCESS"
    done += Counter([*((stage, BROKEN) for stage in stages), *indexes])
    assert materializations(instance) == done


def test_what_failed_is_named_and_finished_once_it_is_mended(
    commands: SandboxCommands, instance: dg.DagsterInstance
) -> None:
    fail_then_mend(commands, instance, "raw", "mds")
