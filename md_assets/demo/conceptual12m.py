"""A miniature Conceptual Captions 12M: WebDataset tars with images, texts and JSON.

Here: the repository's files. Not here: serving them, see `demo.loopback_hub`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from md_assets.core.ledger import Reason
from md_assets.core.names import sample_key
from md_assets.datasets.cc12m import REPO, SPEC, locate
from md_assets.demo.containers import write_tar
from md_assets.demo.drawings import Drawing
from md_assets.demo.miniatures import FAULTY, NO_CAPTION_AT, Content, Miniature, pictures, written_once

ARCHIVES = ("cc12m-train-0000", "cc12m-train-0001")

NOTHING_LEFT_AT = 7
"""Position of a picture whose text is an address, of which cleaning leaves nothing."""

SIZES_PX = {8: (512, 512), 9: (640, 512), 10: (640, 511)}
"""Pictures that are and, the last, just are not in the subset `minres512`. All others are smaller."""

IN_MINRES512 = 2

REJECTED_BY_RAW: Mapping[str, int] = {**FAULTY, Reason.DUPLICATE_KEY: 1, Reason.UNSAFE_MEMBER: 1}
REJECTED_BY_MDS: Mapping[str, int] = {Reason.NO_CAPTION: 2}
"""Samples of each archive that must be rejected, by stage and reason."""


def texts(position: int, caption: str) -> tuple[bytes, str]:
    """The `.txt` of a picture, and what cleaning makes of it, as diffusers' IFPipeline did when it was asked."""
    if position == NOTHING_LEFT_AT:
        return b"https://example.com/picture.html", ""
    if position == 0:
        return f"<PERSON> with {caption}".encode(), f"person with {caption}"
    if position == 1:
        return b"Caf\xe9: " + caption.encode(), f"caf\ufffd: {caption}"
    if position == 2:
        return f"  {caption} &amp; more &#8211; see www.example.com\n".encode(), f"{caption} more - see"
    return f"{caption.title()}\n".encode(), caption


def _content(archive: str, samples: int, size_px: int) -> Content:
    """An archive with `samples` ≥ 13 images, among them every kind that must be rejected, and one orphan text."""
    members: list[tuple[str, bytes | None]] = []
    kept: dict[str, str] = {}
    for picture in pictures(archive, samples - 2, min(size_px, 500), SIZES_PX):
        name = f"{archive.rpartition('-')[2]}{picture.position:05}"
        members.append((f"{name}.jpg", picture.file(Drawing.jpeg)))
        text, cleaned = texts(picture.position, picture.drawing.caption)
        if picture.position == 0:
            members.append((f"{name}.png", picture.drawing.png()))
        if picture.position != NO_CAPTION_AT:
            members.append((f"{name}.txt", text))
            if picture.usable and cleaned:
                kept[sample_key(archive, name)] = cleaned
        width, height = picture.drawing.image.size
        members.append((f"{name}.json", json.dumps({"key": name, "width": width, "height": height}).encode()))
    members.append(("link.jpg", None))
    members.append(("orphan.txt", b"a text without image"))
    return Content(members, (), kept)


def _write(hub_root: Path, web_root: Path, samples: int, size_px: int) -> None:
    def write(repository: Path) -> None:
        for archive in ARCHIVES:
            write_tar(repository / locate(archive).path, _content(archive, samples, size_px).members)
        info = {"splits": {"train": {"num_samples": samples * len(ARCHIVES)}}}
        (repository / "_info.json").write_text(json.dumps(info))

    written_once(hub_root / "datasets" / REPO, write)


MINIATURE = Miniature(SPEC.slug, ARCHIVES, REJECTED_BY_RAW, REJECTED_BY_MDS, _content, _write)
