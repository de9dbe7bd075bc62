"""Pruning, killed at any moment: what readers see then, and that a repeated run finishes."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.paths import DataRoot
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages import prune
from md_assets.stages.once import published
from md_assets.stages.prune import PruneReport, prune_dataset
from md_assets.stages.status import stages_of
from md_assets.stages.verify import verify_archive, verify_dataset
from md_assets_tests.stages.made_chain import JDB_ARCHIVES, TAG, ledger_of, publish_jdb


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    """Three archives of jdb in all stages, with merged indexes of mds."""
    publish_jdb(DataRoot(tmp_path / "data"))
    return DataRoot(tmp_path / "data")


def run(root: DataRoot) -> PruneReport:
    return prune_dataset(JDB, root, TAG, dry_run=False)


def killed(root: DataRoot, step: str, call: int, after: bool) -> None:
    """Prune in a process that is killed right before or after the `call`th time that it takes a step."""
    child = os.fork()
    if child == 0:
        try:
            taken = 0
            real = getattr(prune._Pruning, step)

            def lethal(self: Any, *arguments: Any) -> None:
                nonlocal taken
                taken += 1
                if taken == call and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                real(self, *arguments)
                if taken == call:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(prune._Pruning, step, lethal)
            run(root)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize(
    ("step", "call", "after"),
    [
        ("_mark", 1, False),
        ("_mark", 1, True),
        ("_mark", 3, True),
        ("_drop_from_indexes", 1, True),
        ("_remove", 1, True),
        ("_remove", 2, True),
    ],
)
def test_killed_at_any_moment_readers_see_no_half_and_a_repeated_run_finishes(
    root: DataRoot, step: str, call: int, after: bool
) -> None:
    killed(root, step, call, after)
    assert_readers_are_right(root)
    run(root)
    assert not [p for d in ("raw", "mds") for p in (root.path / "jdb" / d).rglob("*") if p.suffix in (".tar", ".mds")]
    assert not [p for p in (root.path / "jdb").rglob("*") if p.is_file() and "/." in str(p.relative_to(root.path))]
    assert all(ledger_of(d, a).pruned for d in (root.raw("jdb"), root.mds("jdb")) for a in JDB_ARCHIVES)
    assert all(verdict.passed for _, _, verdict in verify_dataset(JDB, root))


def test_killed_while_a_folder_is_being_removed(root: DataRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part of the shards is gone: the mark came before, so nobody takes the rest for an archive."""

    def half(path: Path) -> None:
        (path / "shard.00000.mds").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("md_assets.stages.prune.shutil.rmtree", half)
        run(root)
    assert root.mds("jdb").data("train/000").exists() and published(root.mds("jdb"), "train/000") is None
    verdicts = list(verify_archive(root.mds("jdb"), root.raw("jdb"), "train/000"))
    assert not verdicts[1].passed and "is still there. Run md-assets prune again" in verdicts[1].what
    assert run(root).archives["mds"] == 3
    assert all(verdict.passed for _, _, verdict in verify_dataset(JDB, root))


def assert_readers_are_right(root: DataRoot) -> None:
    """What is published is whole, and what merged indexes list is there."""
    for stage_dir, upstream in stages_of(root, JDB):
        for archive in JDB_ARCHIVES:
            assert stage_dir.ledger(archive).exists()
            if published(stage_dir, archive):
                assert all(verdict.passed for verdict in verify_archive(stage_dir, upstream, archive))
    for split in JDB.splits:
        index = root.mds("jdb").index(split)
        shards = json.loads(index.read_bytes())["shards"] if index.exists() else []
        assert all((index.parent / shard["raw_data"]["basename"]).is_file() for shard in shards)
