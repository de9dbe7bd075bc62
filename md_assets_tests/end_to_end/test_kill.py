"""kill -9 of a whole run in the middle of each stage, then the same command again."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, StageDir
from md_assets.stages.once import published
from md_assets.storage.mds import iter_rows
from md_assets_tests.end_to_end.conftest import ARCHIVE, SandboxCommands, kill_group, read_output, wait_for

pytestmark = pytest.mark.slow

ATTEMPTS = 5
"""How often a kill that came too late is tried again."""


def digests(directory: Path) -> dict[str, str]:
    """Hash of every data file below a directory; ledgers are left out, they tell the time that the work took."""
    files = [p for p in directory.rglob("*") if p.is_file() and (p.suffix != ".json" or p.name == "index.json")]
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def temporaries(directory: Path) -> list[Path]:
    return [p for p in directory.rglob("*") if p.name.startswith(".") or p.suffix in (".new", ".part", ".tmp")]


def kill_in_the_middle(
    commands: SandboxCommands, asset: str, stage_dir: StageDir, begun: Callable[[Path], bool]
) -> None:
    """Start the asset and kill everything once `begun` says so of the archive's workspace."""
    workspace = stage_dir.ledger(ARCHIVE).parent / ".000.tmp"
    for _ in range(ATTEMPTS):
        process = commands.materialize(asset, ARCHIVE)
        ended = process.poll
        came = wait_for(lambda: begun(workspace) or ended() is not None, 200, pause_s=0.0002)  # noqa: B023
        kill_group(process)
        assert came, read_output(process)
        if published(stage_dir, ARCHIVE) is None:
            assert workspace.exists(), read_output(process)
            return
        stage_dir.ledger(ARCHIVE).unlink()  # it was done before the signal came
    raise AssertionError(f"{asset} could not be killed in the middle")


def again(commands: SandboxCommands, asset: str, stage_dir: StageDir) -> Ledger:
    commands.finish(commands.materialize(asset, ARCHIVE))
    ledger = published(stage_dir, ARCHIVE)
    assert ledger is not None and ledger.balances
    assert temporaries(stage_dir.path) == []
    return ledger


def copy_stages(undisturbed: DataRoot, commands: SandboxCommands, *stages: str) -> None:
    """Give the sandbox the finished upstream of the stage under test."""
    for stage in stages:
        shutil.copytree(undisturbed.path / "jdb" / stage, commands.sandbox.data.path / "jdb" / stage)


def test_raw_killed_while_it_fetches_and_while_it_writes(commands: SandboxCommands, undisturbed: DataRoot) -> None:
    raw = commands.sandbox.data.raw("jdb")
    commands.hub.faults.throttle("*/train/imgs/000.tgz", bytes_per_s=50_000)
    kill_in_the_middle(commands, "jdb/raw", raw, lambda w: any(p.stat().st_size > 1000 for p in w.glob("*.part")))
    commands.hub.faults.clear()
    kill_in_the_middle(commands, "jdb/raw", raw, lambda w: (w / "out" / "000.tar").exists())

    ledger = again(commands, "jdb/raw", raw)

    assert ledger.read == 12
    assert digests(raw.path) == digests(undisturbed.raw("jdb").path)


def test_mds_killed_while_it_writes(commands: SandboxCommands, undisturbed: DataRoot) -> None:
    copy_stages(undisturbed, commands, "annotations", "raw")
    mds = commands.sandbox.data.mds("jdb")
    kill_in_the_middle(commands, "jdb/mds", mds, lambda w: any((w / "shards").glob("*.mds")))

    ledger = again(commands, "jdb/mds", mds)

    keys = [row["key"] for row in iter_rows(mds.data(ARCHIVE))]
    assert len(keys) == len(set(keys)) == ledger.kept
    assert digests(mds.path) == digests(undisturbed.mds("jdb").path)


def test_latents_killed_while_they_are_encoded(commands: SandboxCommands, undisturbed: DataRoot) -> None:
    copy_stages(undisturbed, commands, "mds")
    latents = commands.sandbox.data.latents("jdb", "sdxl1_dfnclipH14")
    kill_in_the_middle(commands, "jdb/latents", latents, lambda w: (w / "shards").exists())

    ledger = again(commands, "jdb/latents", latents)

    rows = list(iter_rows(latents.data(ARCHIVE)))
    assert [row["key"] for row in rows] == [row["key"] for row in iter_rows(undisturbed.mds("jdb").data(ARCHIVE))]
    assert len(rows) == ledger.kept
    assert all(np.isfinite(np.frombuffer(row["latents_256"], np.float16)).all() for row in rows)
