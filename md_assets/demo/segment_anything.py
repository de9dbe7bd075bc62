"""A miniature Segment-Anything-1B: tars on a web server behind signed links, captions on the Hub.

Here: the files, and which rows the link list has. Not here: signing links and the list's format, see
`demo.loopback_web`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from md_assets.core.ledger import Reason
from md_assets.core.names import sample_key
from md_assets.datasets.sa1b import CAPTIONS_REPO, SPEC
from md_assets.demo.containers import write_tar, write_tgz
from md_assets.demo.drawings import Drawing
from md_assets.demo.miniatures import FAULTY, NO_CAPTION_AT, Content, Miniature, pictures, written_once

ARCHIVES = ("sa_000000", "sa_000001")

WEB_FOLDER = "sa1b"
"""Of the tars, below the web server's root; only a signed link opens them."""

LISTED = ("sa_images_ids.txt", "sa_000001.tar", "sa_co_gold.tar", "sa_000000.tar")
"""Rows of the link list: in any order, and with some that are no archive."""

BLANK_CAPTION_AT = 7
"""Position of a picture whose text is white space."""

FIRST_NUMBER: Mapping[str, int] = {"sa_000000": 1, "sa_000001": 1001}
"""N of each archive's first image."""

ABSENT = 8
"""So much after an archive's first N comes one that has a caption and no image."""

REJECTED_BY_RAW: Mapping[str, int] = {**FAULTY, Reason.DUPLICATE_KEY: 1, Reason.UNSAFE_MEMBER: 1}
REJECTED_BY_MDS: Mapping[str, int] = {Reason.NO_CAPTION: 2}
"""Samples of each archive that must be rejected, by stage and reason."""


def _content(archive: str, samples: int, size_px: int) -> Content:
    """An archive with `samples` ≥ 10 images, among them every kind that must be rejected, and its texts."""
    members: list[tuple[str, bytes | None]] = []
    texts: list[tuple[str, bytes]] = []
    kept: dict[str, str] = {}
    for picture in pictures(archive, samples - 2, size_px):
        name = f"sa_{FIRST_NUMBER[archive] + picture.position + (picture.position >= ABSENT)}"
        members.append((f"./{name}.jpg", picture.file(Drawing.jpeg)))
        members.append(
            (f"./{name}.json", json.dumps({"image": {"file_name": f"{name}.jpg"}, "annotations": []}).encode())
        )
        caption = f"The image shows {picture.drawing.caption}."
        if picture.position == NO_CAPTION_AT:
            continue
        if picture.position == BLANK_CAPTION_AT:
            texts.append((f"{name}.txt", b" \n"))
            continue
        texts.append((f"{name}.txt", f" {caption}\n".encode()))
        if picture.usable:
            kept[sample_key(archive, name)] = caption
    texts.append((f"sa_{FIRST_NUMBER[archive] + ABSENT}.txt", b"a caption whose image is absent"))
    members.append(members[0])
    members.append(("./link.jpg", None))
    return Content(members, texts, kept)


def _write(hub_root: Path, web_root: Path, samples: int, size_px: int) -> None:
    contents = {archive: _content(archive, samples, size_px) for archive in ARCHIVES}

    def write_captions(repository: Path) -> None:
        texts = [text for content in reversed(contents.values()) for text in content.annotations]
        write_tgz(repository / "SA1B_caption.tar.gz", [("README.txt", b"no caption"), *texts])

    def write_archives(folder: Path) -> None:
        for archive, content in contents.items():
            write_tar(folder / f"{archive}.tar", content.members)

    written_once(hub_root / "datasets" / CAPTIONS_REPO, write_captions)
    written_once(web_root / WEB_FOLDER, write_archives)


MINIATURE = Miniature(SPEC.slug, ARCHIVES, REJECTED_BY_RAW, REJECTED_BY_MDS, _content, _write)
