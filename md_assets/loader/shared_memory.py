"""Leftovers of dead trainings in shared memory, cleared without harm to living ones.

A `StreamingDataset` keeps its state in segments `/dev/shm/NNNNNN_locals`, `…_barrier`, and so on, which its
ranks and workers share. They outlive a training that was killed as a whole group: they fill memory (an epoch's
order takes 8 bytes per sample), and their record of local directories can make streaming refuse a new
training ("Reused local directory"). streaming's own `clean_stale_shared_memory()` removes every segment that
it may, also those of other trainings alive on the machine, whose workers then fail or read each other's order.

So a segment is removed only when the kernel says that nobody has it open: a write lease (`fcntl(2)`) is granted
on a file which no other descriptor or mapping refers to, in whichever container or process namespace. Where
leases are not known (not Linux, some sandboxes), everything stays: training from local directories does not
need it gone, as streaming then takes the next free number.

A second guard is for `remote` streams: two trainings that fetch into one directory cut off each other's
files. streaming means to refuse that, but 0.13 looks only at numbers without a lock file in the temporary
directory, and each number has one from its first epoch on. So the record is read here.

Here: clearing, waiting, one start at a time. Not here: the data loader (`loader.latents`).
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.distributed import barrier, maybe_init_dist
from streaming.base.world import World

from md_assets.core.errors import SettingsError

SHARED_MEMORY_DIR = Path("/dev/shm")
SEGMENT_NAME = re.compile(rf"\d{{6,}}_({'|'.join(SHM_TO_CLEAN)})")

ORPHANS_END_S = 15.0
"""Workers of a killed training look for their parent every 5 s (`torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL`)."""


@contextmanager
def clear_start(cache_directories: Collection[Path]) -> Iterator[None]:
    """Around the construction of a `StreamingDataset`: leftovers are gone, and no other start interferes.

    Entered by every rank, as the construction itself is; the first rank of each node clears, and the others
    wait for it. Starts of several trainings on one machine go one after the other, so they cannot choose the
    same number. That is left out over several nodes, where two trainings could each wait for the other's node.

    Args:
        cache_directories: absolute local directories of the `remote` streams; this training must be the only
            one alive that uses them. If a killed one's workers are still about, they are waited for.

    Raises:
        SettingsError: another living training uses one of them. Only the clearing rank raises; as with any
            other error of one rank, the launcher ends the others.
    """
    world = World.detect()
    leads = world.is_local_leader and SHARED_MEMORY_DIR.is_dir()
    with _lock(leads and not world.is_multinode):
        if leads:
            _clear(cache_directories)
        # As streaming does: it starts torch.distributed for the time of the construction where nobody has.
        started = maybe_init_dist()
        try:
            barrier()
            yield
        finally:
            if started:
                import torch.distributed

                torch.distributed.destroy_process_group()


@contextmanager
def _lock(wanted: bool) -> Iterator[None]:
    """Hold the directory of the segments itself: no file stays behind, and containers that share it meet here."""
    if not wanted:
        yield
        return
    descriptor = os.open(SHARED_MEMORY_DIR, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Not by closing alone: a worker that another thread forks meanwhile has a copy of the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _clear(cache_directories: Collection[Path]) -> None:
    deadline = time.monotonic() + ORPHANS_END_S
    while True:
        remove_unheld()
        users = users_of(cache_directories)
        if not users:
            return
        directory, processes = next(iter(users.items()))
        if processes == {os.getpid()}:
            raise SettingsError(
                f"{directory} is the cache of another loader in this process",
                "Delete that loader first, or give this one another local directory.",
            )
        if time.monotonic() > deadline:
            who = f"process {', '.join(map(str, sorted(processes)))}" if processes else "a process of another container"
            raise SettingsError(
                f"{directory} is the cache of a training that runs ({who})",
                "Wait for it, or give this one another local directory; without remote, a directory can be shared.",
            )
        time.sleep(0.2)


def remove_unheld() -> None:
    """Remove the segments that no process has open or mapped. May be called at any time by anybody."""
    for path in _segments():
        _remove_if_unheld(path)


def _segments() -> list[Path]:
    return sorted(path for path in SHARED_MEMORY_DIR.iterdir() if SEGMENT_NAME.fullmatch(path.name))


def _remove_if_unheld(path: Path) -> None:
    if not hasattr(fcntl, "F_SETLEASE"):
        return
    try:
        # Not blocking: while another process holds a lease, open would wait for it.
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return  # gone meanwhile, or another user's
    try:
        # Whoever opens the file during the lease makes the kernel signal us: by SIGIO, which ends a process,
        # unless told otherwise. SIGURG is ignored by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        path.unlink()
    except OSError:
        return  # somebody has it open, or this kernel knows no leases here
    finally:
        os.close(descriptor)


def users_of(directories: Collection[Path]) -> dict[Path, set[int]]:
    """Those of the directories that a segment says are in use -> IDs of the processes that map this segment.

    A process that this one may not look at (another user's, another namespace's) is not among the IDs.
    """
    users: dict[Path, set[int]] = {}
    for segment in _segments() if directories else ():
        if not segment.name.endswith(f"_{LOCALS}"):
            continue
        for directory in set(directories) & _recorded_directories(segment):
            users.setdefault(directory, set()).update(_processes_mapping(segment))
    return users


def _recorded_directories(segment: Path) -> set[Path]:
    """The absolute directories in a `locals` segment: int32 size of all, then texts between NUL bytes, last a number.

    The size is 0 once the dataset was deleted.
    """
    try:
        data = segment.read_bytes()
    except OSError:
        return set()
    size = int.from_bytes(data[:4], "little")
    return {Path(name) for name in data[4:size].decode(errors="replace").split("\0")[:-1]}


def _processes_mapping(segment: Path) -> set[int]:
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f" {segment}\n" in maps.read_text(errors="replace"):
                found.add(int(maps.parent.name))
        except OSError:
            continue  # ended meanwhile, or another user's
    return found
