"""What the miniature sources have in common: pictures with planted faults, and what must become of each archive.

Here: values. Not here: a source's own layout (`demo.journeydb` and the other modules called like datasets), containers
(`demo.containers`), the list of all (`demo.sandbox`).
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md_assets.core.ledger import Reason
from md_assets.demo.drawings import Drawing, draw

SAMPLES, SIZE_PX = 16, 480
"""Of an archive of any miniature but JourneyDB's: samples, and the smaller edge of most pictures."""

TOO_SMALL_AT = (3, 4)
CUT_AT = 5
"""Positions in every archive: pictures below the minimum size, and one whose file is cut off in the middle."""

NO_CAPTION_AT = 6
"""Position of the picture that every source gives no caption."""

FAULTY: Mapping[str, int] = {Reason.TOO_SMALL: len(TOO_SMALL_AT), Reason.UNDECODABLE: 1}
"""Samples that raw must reject in every archive because of those positions."""


@dataclass(frozen=True)
class Picture:
    """One picture of an archive.

    Attributes:
        position: in the archive, from 0.
        identity: follows from archive and position.
        drawing: the picture itself.
        usable: whether raw must keep it.
    """

    position: int
    identity: uuid.UUID
    drawing: Drawing
    usable: bool

    def file(self, encode: Callable[[Drawing], bytes]) -> bytes:
        """The encoded file, of which the planted fault may have cut off half."""
        data = encode(self.drawing)
        return data[: len(data) // 2] if self.position == CUT_AT else data


def pictures(
    archive: str, count: int, size_px: int, sizes_px: Mapping[int, tuple[int, int]] | None = None
) -> Iterator[Picture]:
    """The pictures of an archive; the same arguments give the same ones.

    Args:
        archive: its ID.
        count: ≥ 8, so that every planted fault is among them.
        size_px: edge of the square pictures; every fifth is half as wide again.
        sizes_px: width and height of those, by position, that have others.
    """
    for position in range(count):
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"md_assets/{archive}/{position}")
        width, height = (size_px * 3 // 2, size_px) if position % 5 == 4 else (size_px, size_px)
        if position in TOO_SMALL_AT:
            width, height = 300, 200
        width, height = (sizes_px or {}).get(position, (width, height))
        usable = position not in (*TOO_SMALL_AT, CUT_AT)
        yield Picture(position, identity, draw(identity.int % 2**32, width, height), usable)


@dataclass(frozen=True)
class Content:
    """What one archive of a miniature holds, and what must become of it.

    Attributes:
        members: of the archive, in order; (name, bytes) of a tar or zip, bytes None for a symbolic link. Rows of a
            parquet file.
        annotations: what the file of captions has for it; empty where captions lie in the archive.
        kept: key -> caption of what mds must hold, in order.
    """

    members: Sequence[Any]
    annotations: Sequence[Any]
    kept: Mapping[str, str]


@dataclass(frozen=True)
class Miniature:
    """One source in small.

    Attributes:
        slug: of the dataset.
        archives: IDs of the archives that it has, neighbours in upstream's order.
        rejected_by_raw, rejected_by_mds: samples of each archive that must be rejected, by reason.
        content: (archive, samples, size_px) -> what an archive holds.
        write: (root of the Hub, root of the web server, samples, size_px) writes its files, unless they are there.
        samples, size_px: what the demo takes.
    """

    slug: str
    archives: tuple[str, ...]
    rejected_by_raw: Mapping[str, int]
    rejected_by_mds: Mapping[str, int]
    content: Callable[[str, int, int], Content]
    write: Callable[[Path, Path, int, int], None]
    samples: int = SAMPLES
    size_px: int = SIZE_PX

    @property
    def lost(self) -> int:
        """Samples of each archive that raw and mds reject."""
        return sum(self.rejected_by_raw.values()) + sum(self.rejected_by_mds.values())


def written_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`, made by `write` unless it is there; an interrupted call leaves nothing of that name."""
    if not folder.exists():
        unfinished = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)  # of an interrupted call, perhaps with other arguments
        unfinished.mkdir(parents=True)
        write(unfinished)
        unfinished.rename(folder)
    return folder
