"""Child processes that do not outlive their parent, however it ends.

Here: the two ways to it. Not here: what the processes do.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""

_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends; to be called in the child."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent() -> None:
    """Make this worker of a process pool end when the parent does; for workers that a fork server starts, which is the
    parent that the kernel knows.

    A worker waits for work on a queue of which it holds both ends, so it would outlive a killed parent for ever. Nor
    does the fork server end: it lives as long as anyone whom it could serve, and its workers are among them.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)
