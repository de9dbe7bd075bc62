"""How long the code location takes to load, against an empty Dagster project on the same machine.

Here: the measurement. Not here: the rule that keeps it short (nothing heavy is imported, see `pyproject.toml`).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

OURS = "import md_assets.definitions as m; m.defs.get_repository_def()"
EMPTY = "import dagster as dg; dg.Definitions(assets=[dg.asset(name='empty')(lambda: None)]).get_repository_def()"


@dataclass(frozen=True)
class LoadTimes:
    """Wall seconds of whole processes, in the order in which they alternated."""

    ours_s: tuple[float, ...]
    empty_s: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of ours over the empty project's, pair by pair."""
        return statistics.median(ours / empty for ours, empty in zip(self.ours_s, self.empty_s, strict=True))


def measure(pairs: int) -> LoadTimes:
    """Load both `pairs` times in turn, after one warm-up of each, each time in a new process."""
    times: list[tuple[float, float]] = [(_load_s(OURS), _load_s(EMPTY)) for _ in range(pairs + 1)][1:]
    return LoadTimes(tuple(ours for ours, _ in times), tuple(empty for _, empty in times))


def _load_s(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def report(times: LoadTimes) -> str:
    """The result in one line of text."""
    return (
        f"md_assets loads in {statistics.median(times.ours_s):.2f} s, an empty Dagster project in "
        f"{statistics.median(times.empty_s):.2f} s: {times.ratio:.2f} times as long "
        f"(medians of {len(times.ours_s)} alternating pairs of processes)"
    )
