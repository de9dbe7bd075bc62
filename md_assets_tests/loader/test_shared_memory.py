"""Leftovers of killed trainings. Other trainings may run on this machine, so tests look at their own segments only."""

import contextlib
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest
from streaming.base.constant import SHM_TO_CLEAN

from md_assets.core.errors import SettingsError
from md_assets.loader import LatentsStream, build_latents_dataloader, shared_memory
from md_assets_tests.loader.made_latents import make_latents

Segments = dict[Path, int]
"""Path -> inode, as a later training may use the same number again."""


@pytest.fixture
def directories(tmp_path: Path) -> tuple[Path, Path]:
    """A local directory, and one for a cache."""
    make_latents(tmp_path, "source", (4,))
    return make_latents(tmp_path, "jdb", (4,)), tmp_path / "cache"


def build(directories: tuple[Path, Path]) -> Any:
    local, cache = directories
    streams = [local, LatentsStream(cache, remote=str(local.parent.parent / "source/latents"))]
    return build_latents_dataloader(streams, batch_size=2, num_workers=1, with_keys=True)


def hold(directories: tuple[Path, Path], connection: Connection) -> None:
    """A training in its first epoch: a process group with a worker and a resource tracker of its own."""
    os.setsid()
    tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    tracker._fd = tracker._pid = None  # the parent's would otherwise survive, and clean up, for this group
    loader = build(directories)
    batches = iter(loader)
    next(batches)
    connection.send(loader.dataset._shm_prefix_int)
    time.sleep(60)


@pytest.fixture
def training(directories: tuple[Path, Path]) -> Iterator[tuple[BaseProcess, Segments]]:
    """A training that runs over the directories, and its segments."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(directories, theirs))
    process.start()
    assert ours.poll(30)
    segments = {path: path.stat().st_ino for path in Path("/dev/shm").glob(f"{ours.recv():06}_*")}
    assert len(segments) >= 5
    yield process, segments
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    shared_memory.remove_unheld()


def still_there(segments: Segments) -> list[Path]:
    return [path for path, inode in segments.items() if path.exists() and path.stat().st_ino == inode]


def test_a_living_training_is_left_alone(
    directories: tuple[Path, Path], training: tuple[BaseProcess, Segments], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, segments = training
    monkeypatch.setattr(shared_memory, "ORPHANS_END_S", 0.0)
    # Two that fetch into one directory would cut off each other's shards.
    with pytest.raises(SettingsError, match=rf"{directories[1]} is the cache of a training .*\b{process.pid}\b"):
        build(directories)
    # A local directory is only read, so it may be shared.
    assert len(list(build_latents_dataloader(directories[0], batch_size=2, num_workers=0))) == 2
    assert still_there(segments) == list(segments)
    assert process.is_alive()


@pytest.mark.parametrize("whole_group", [True, False], ids=["whole group killed", "workers orphaned"])
def test_after_a_kill_the_next_training_starts(
    directories: tuple[Path, Path], training: tuple[BaseProcess, Segments], whole_group: bool
) -> None:
    process, segments = training
    assert process.pid is not None
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.join()
    assert still_there(segments)  # otherwise there is nothing to clear, and this test shows nothing
    assert len(list(build(directories))) == 4
    assert not still_there(segments)


RANK = """
import sys
from pathlib import Path
from md_assets_tests.loader.test_shared_memory import build
loader = build(tuple(map(Path, sys.argv[1:])))
print("keys", *[key for batch in loader for key in batch["key"]])
"""


@pytest.mark.slow
def test_two_ranks_start_at_once_and_leave_nothing_behind(directories: tuple[Path, Path]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *map(str, directories)],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    keys = [key for output in outputs for key in output.partition("keys ")[2].splitlines()[0].split()]
    assert sorted(keys) == sorted(f"{name}/000/{n}" for name in ("jdb", "source") for n in range(4))
    left = [path for path in Path("/dev/shm").glob("*_locals") if str(directories[0]).encode() in path.read_bytes()]
    assert left == []


@pytest.fixture
def segment() -> Iterator[SharedMemory]:
    """A segment that this process holds, named like one of streaming's, with a number that no training gets."""
    memory = SharedMemory(f"999999_{SHM_TO_CLEAN[0]}", create=True, size=200)
    yield memory
    memory.close()
    try:
        memory.unlink()
    except FileNotFoundError:
        # `unlink` of a missing one leaves it registered; the tracker would warn at exit.
        resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]


def test_only_unheld_segments_of_streaming_are_removed(segment: SharedMemory) -> None:
    path, stranger = Path("/dev/shm", segment.name), Path("/dev/shm/999999_of_somebody")
    stranger.touch()
    try:
        shared_memory.remove_unheld()
        assert path.exists()
        segment.close()
        shared_memory.remove_unheld()
        assert not path.exists()
        assert stranger.exists()
    finally:
        stranger.unlink()


def test_without_leases_everything_stays(segment: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    segment.close()
    with monkeypatch.context() as patch:
        patch.delattr(fcntl, "F_SETLEASE")
        shared_memory.remove_unheld()
    assert Path("/dev/shm", segment.name).exists()


def test_opening_a_segment_while_it_is_removed_kills_nobody(
    segment: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment.close()
    path, opened = Path("/dev/shm", segment.name), threading.Event()
    unlink = Path.unlink

    def opener() -> None:
        with path.open("rb"):  # waits for the lease, and makes the kernel signal its holder
            opened.set()

    thread = threading.Thread(target=opener)

    def unlink_late(self: Path, missing_ok: bool = False) -> None:
        if self == path:
            thread.start()
            assert not opened.wait(0.3)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_late)
    shared_memory.remove_unheld()
    thread.join(10)
    assert opened.is_set()
    assert not path.exists()


def test_users_are_read_from_the_record(segment: SharedMemory, tmp_path: Path) -> None:
    text = f"{tmp_path}/a\0{tmp_path}/é\0007".encode()
    segment.buf[: 4 + len(text)] = (4 + len(text)).to_bytes(4, "little") + text
    assert shared_memory.users_of([tmp_path / "é", tmp_path / "b"]) == {tmp_path / "é": {os.getpid()}}
    segment.buf[:4] = bytes(4)  # as a deleted dataset leaves it
    assert shared_memory.users_of([tmp_path / "é"]) == {}


def test_a_cache_has_one_loader_in_a_process(directories: tuple[Path, Path]) -> None:
    local, cache = directories
    stream = LatentsStream(cache, remote=str(local))
    loader = build_latents_dataloader(stream, batch_size=2, num_workers=0)
    began = time.monotonic()
    with pytest.raises(SettingsError, match="is the cache of another loader in this process"):
        build_latents_dataloader(stream, batch_size=2)
    assert time.monotonic() - began < shared_memory.ORPHANS_END_S
    del loader
    assert len(list(build_latents_dataloader(stream, batch_size=2, num_workers=0))) == 2


def test_starts_go_one_after_the_other(directories: tuple[Path, Path]) -> None:
    descriptor = os.open(shared_memory.SHARED_MEMORY_DIR, os.O_RDONLY)
    done = threading.Event()

    def begin() -> None:
        build_latents_dataloader(directories[0], batch_size=2, num_workers=0)
        done.set()

    thread = threading.Thread(target=begin)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        thread.start()
        assert not done.wait(1.0)
    finally:
        os.close(descriptor)
    assert done.wait(10)
    thread.join()
