"""How far a long piece of work is: the value that stages report, and the line that people read.

Here: the value, its rate and its remaining time. Not here: where the line goes; that is a function given by
the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

EVERY_S = 5.0
"""Seconds between two lines about the same work: often enough to see life, rare enough for an event log."""


@dataclass(frozen=True)
class Progress:
    """A moment in the work on one archive.

    Attributes:
        archive: its ID.
        doing: the verb and its object, e.g. `fetches` or `prepares images`.
        done, total: of `unit`; `total` is None where it is not known beforehand.
        unit: `bytes`, `images` or `rows`.
        images: images done so far, where `unit` counts something else; None where images are not the point.
    """

    archive: str
    doing: str
    done: int
    total: int | None
    unit: str
    images: int | None = None


ReportProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Reports to nobody."""


class ProgressLines:
    """Turns progress into a line of text every few seconds.

    Args:
        dataset: slug, with which each line begins.
        write: takes a line.
        every_s: seconds between lines.
        clock: seconds, monotonic.

    An instance is a `ReportProgress`.
    """

    def __init__(
        self,
        dataset: str,
        write: Callable[[str], None],
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dataset = dataset
        self._write = write
        self._every_s = every_s
        self._clock = clock
        self._work: tuple[str, str] | None = None
        self._started_s = self._written_s = 0.0
        self._start = 0

    def __call__(self, progress: Progress) -> None:
        now_s = self._clock()
        if self._work != (progress.archive, progress.doing):
            self._work = (progress.archive, progress.doing)
            self._started_s = self._written_s = now_s
            self._start = progress.done  # a resumed download did not just fetch what was there
        elif now_s - self._written_s >= self._every_s:
            self._written_s = now_s
            self._write(f"{self._dataset} {describe(progress, self._start, now_s - self._started_s)}")


def describe(progress: Progress, start: int, elapsed_s: float) -> str:
    """One line such as `train/000 prepares images: 3,100 images, 52 %, 310 images/s, ETA 0:09`.

    Args:
        progress: the moment.
        start: what `progress.done` was when the work began.
        elapsed_s: seconds since then, > 0.
    """
    worked = progress.done - start
    parts = []
    counted = progress.images if progress.images is not None else progress.done
    unit = "images" if progress.images is not None else progress.unit
    if unit == "bytes":
        of = f"/{progress.total / 1e6:,.0f}" if progress.total else ""
        parts += [f"{counted / 1e6:,.0f}{of} MB", f"{worked / elapsed_s / 1e6:,.1f} MB/s"]
    elif progress.images is not None and progress.unit != "images":
        parts.append(f"{counted:,} images")
        if progress.total:
            parts.append(f"{progress.done / progress.total:.0%}")
        parts.append(f"{counted / elapsed_s:,.0f} images/s")
    else:
        of = f"/{progress.total:,}" if progress.total else ""
        parts += [f"{counted:,}{of} {unit}", f"{worked / elapsed_s:,.0f} {unit}/s"]
    if progress.total and worked > 0:
        remaining_s = round((progress.total - progress.done) * elapsed_s / worked)
        parts.append(f"ETA {remaining_s // 60}:{remaining_s % 60:02}")
    return f"{progress.archive} {progress.doing}: {', '.join(parts)}"
