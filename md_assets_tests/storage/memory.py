"""How much memory a process has needed. `ru_maxrss` will not do: a child inherits its parent's."""

from pathlib import Path


def peak_mib() -> int:
    """The most memory that this process has had since its program began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) // 1024
