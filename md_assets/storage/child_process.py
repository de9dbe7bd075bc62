"""Child processes that do not outlive their parent, however it ends.

Here: the one system call for it. Not here: what the processes do.
"""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""

_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends; to be called in the child."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
