"""How far a long piece of work is, as a value that stages report and others show.

Here: the value. Not here: how often or where it is shown, see `orchestration.progress`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
