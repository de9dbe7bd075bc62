"""A miniature TextCaps: parquet files of both splits, images and captions in their rows.

Here: the repository's files. Not here: serving them, see `demo.loopback_hub`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from md_assets.core.ledger import Reason
from md_assets.core.names import sample_key
from md_assets.datasets.textcaps import REPO, SPEC, locate
from md_assets.demo.containers import write_parquet
from md_assets.demo.drawings import Drawing
from md_assets.demo.miniatures import FAULTY, NO_CAPTION_AT, Content, Miniature, pictures, written_once

ARCHIVES = ("train/00012", "val/00000")
"""The last of train and the first of validation: neighbours."""

BLANK_CAPTION_AT = 7
"""Position of a picture whose first caption is white space; that the second is not does not help it."""

REJECTED_BY_RAW: Mapping[str, int] = {**FAULTY, Reason.DUPLICATE_KEY: 1}
REJECTED_BY_MDS: Mapping[str, int] = {Reason.NO_CAPTION: 2}
"""Samples of each archive that must be rejected, by stage and reason."""


def _content(archive: str, samples: int, size_px: int) -> Content:
    """A file with `samples` ≥ 10 rows, among them every kind that must be rejected."""
    rows: list[dict[str, Any]] = []
    kept: dict[str, str] = {}
    for picture in pictures(archive, samples - 1, size_px):
        name = picture.identity.hex[:16]
        caption = f"A sign reads: {picture.drawing.caption}"
        captions = [caption, "Another caption.", "A third caption."]
        if picture.position == NO_CAPTION_AT:
            captions = []
        elif picture.position == BLANK_CAPTION_AT:
            captions[0] = " "
        elif picture.usable:
            kept[sample_key(archive, name)] = caption
        width, height = picture.drawing.image.size
        data = picture.file(Drawing.png if picture.position == 1 else Drawing.jpeg)
        rows.append(
            {
                "image_id": name,
                "image": {"bytes": data, "path": f"{name}.jpg"},
                "image_width": width,
                "image_height": height,
                "caption_str": captions[:1],
                "reference_strs": captions,
            }
        )
    rows.append(rows[0])
    return Content(rows, (), kept)


def _write(hub_root: Path, web_root: Path, samples: int, size_px: int) -> None:
    def write(repository: Path) -> None:
        import pyarrow as pa

        image, texts = pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.list_(pa.string())
        schema = pa.schema(
            {"image_id": pa.string(), "image": image, "image_width": pa.int64(), "image_height": pa.int64()}
            | {"caption_str": texts, "reference_strs": texts}
        )
        for archive in ARCHIVES:
            path = repository / locate(archive).path.replace("*", "")
            write_parquet(path, _content(archive, samples, size_px).members, schema)

    written_once(hub_root / "datasets" / REPO, write)


MINIATURE = Miniature(SPEC.slug, ARCHIVES, REJECTED_BY_RAW, REJECTED_BY_MDS, _content, _write)
