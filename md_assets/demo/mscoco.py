"""A miniature MS-COCO 2014: a zip of images and a zip of annotations on a plain web server.

Here: the files. Not here: serving them, see `demo.loopback_web`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from md_assets.core.ledger import Reason
from md_assets.core.names import sample_key
from md_assets.datasets.coco2014 import ARCHIVE, SPEC
from md_assets.demo.containers import write_md5_beside, write_zip
from md_assets.demo.drawings import Drawing
from md_assets.demo.miniatures import FAULTY, NO_CAPTION_AT, Content, Miniature, pictures, written_once

ARCHIVES = (ARCHIVE,)

WEB_FOLDER = "coco"
"""The base address is this folder of the web server."""

BLANK_CAPTION_AT = 7
"""Position of a picture whose first caption is white space; that the second is not does not help it."""

FURTHER_CAPTIONS = 2
"""Of every picture that has captions, besides its first."""

REJECTED_BY_RAW: Mapping[str, int] = {**FAULTY, Reason.DUPLICATE_KEY: 1, Reason.UNSAFE_MEMBER: 1}
REJECTED_BY_MDS: Mapping[str, int] = {Reason.NO_CAPTION: 2}
"""Samples that must be rejected, by stage and reason."""


def _content(archive: str, samples: int, size_px: int) -> Content:
    """The archive with `samples` ≥ 10 images, among them every kind that must be rejected, and their captions."""
    members: list[tuple[str, bytes | None]] = []
    first: list[dict[str, Any]] = []
    further: list[dict[str, Any]] = []
    kept: dict[str, str] = {}
    for picture in pictures(archive, samples - 2, size_px):
        number = 42 + 31 * picture.position
        name = f"COCO_{archive}_{number:012}.jpg"
        members.append((f"{archive}/{name}", picture.file(Drawing.jpeg)))
        if picture.position == NO_CAPTION_AT:
            continue
        caption = f"{picture.drawing.caption.capitalize()}."
        blank = picture.position == BLANK_CAPTION_AT
        first.append({"image_id": number, "caption": "\n" if blank else caption})
        further += [{"image_id": number, "caption": f"Caption {n + 2} of it."} for n in range(FURTHER_CAPTIONS)]
        if picture.usable and not blank:
            kept[sample_key(archive, f"{archive}/{name}")] = caption
    members.append((members[0][0].replace(".jpg", ".png"), members[0][1]))
    members.append(("../evil.jpg", members[0][1]))
    absent = [{"image_id": 7, "caption": "A caption whose image is absent."}]
    return Content(members, [*first, *absent, *reversed(further)], kept)


def _annotations(content: Content) -> bytes:
    """COCO's captions file: images and annotations in lists of their own."""
    numbers = dict.fromkeys(annotation["image_id"] for annotation in content.annotations)
    body = {
        "info": {"description": "COCO 2014 Dataset"},
        "images": [{"id": number, "file_name": f"COCO_{ARCHIVE}_{number:012}.jpg"} for number in numbers],
        "licenses": [],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(content.annotations)],
    }
    return json.dumps(body).encode()


def _write(hub_root: Path, web_root: Path, samples: int, size_px: int) -> None:
    content = _content(ARCHIVE, samples, size_px)

    def write(folder: Path) -> None:
        images, annotations = folder / "zips/val2014.zip", folder / "annotations/annotations_trainval2014.zip"
        write_zip(images, [(f"{ARCHIVE}/", b""), *content.members])
        files = {"captions_train2014": b"{}", "captions_val2014": _annotations(content), "instances_val2014": b"{}"}
        write_zip(annotations, [(f"annotations/{name}.json", data) for name, data in files.items()])
        for path in (images, annotations):
            write_md5_beside(path)

    written_once(web_root / WEB_FOLDER, write)


MINIATURE = Miniature(SPEC.slug, ARCHIVES, REJECTED_BY_RAW, REJECTED_BY_MDS, _content, _write)
