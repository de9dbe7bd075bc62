"""A miniature DiffusionDB: zips of lossless WebP and the metadata table with its scores.

Here: the repository's files. Not here: serving them, see `demo.loopback_hub`.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from md_assets.core.ledger import Reason
from md_assets.core.names import sample_key
from md_assets.datasets.diffdb import REPO, SPEC, locate
from md_assets.demo.containers import write_parquet, write_zip
from md_assets.demo.drawings import Drawing
from md_assets.demo.miniatures import FAULTY, NO_CAPTION_AT, Content, Miniature, Picture, pictures, written_once

ARCHIVES = ("part-000001", "part-000002")

SCORES_AT: Mapping[int, tuple[float | None, float | None]] = {
    2: (0.2, 0.2),
    7: (0.9, 0.0),
    8: (0.0, 0.21),
    9: (2.0, 0.0),
    10: (math.nan, 0.0),
    11: (0.0, None),
}
"""Image and prompt score of the pictures at these positions; any other has 0.05 and 0.1. Exactly 0.2 is kept."""

REJECTED_BY_RAW: Mapping[str, int] = {**FAULTY, Reason.DUPLICATE_KEY: 1, Reason.UNSAFE_MEMBER: 1}
REJECTED_BY_MDS: Mapping[str, int] = {Reason.NSFW: 5, Reason.NO_CAPTION: 1}
"""Samples of each archive that must be rejected, by stage and reason."""

SAMPLES = 20
"""Of each archive, so that some are left."""


def _content(archive: str, samples: int, size_px: int) -> Content:
    """An archive with `samples` ≥ 14 images, among them every kind that must be rejected, and its metadata rows."""
    members: list[tuple[str, bytes | None]] = []
    rows: list[dict[str, Any]] = []
    kept: dict[str, str] = {}
    for picture in pictures(archive, samples - 2, size_px):
        name = f"{picture.identity}.webp"
        members.append((name, picture.file(Drawing.webp)))
        row = _row(archive, name, picture)
        rows.append(row)
        unsafe = picture.position in SCORES_AT and picture.position != 2
        if picture.usable and row["prompt"] and not unsafe:
            kept[sample_key(archive, name)] = row["prompt"]
    first = members[0][0]
    members.append((first.replace(".webp", ".png"), members[0][1]))
    members.append(("../evil.webp", members[0][1]))
    listed = {row["image_name"]: {"p": row["prompt"], "se": row["seed"], "c": row["cfg"]} for row in rows}
    members.append((f"{archive}.json", json.dumps(listed).encode()))
    rows.append({**rows[0], "image_name": f"{uuid.UUID(int=0)}.webp", "prompt": "a prompt whose image is absent"})
    return Content(members, rows, kept)


def _row(archive: str, name: str, picture: Picture) -> dict[str, Any]:
    """A row of the metadata table, all 13 columns of it."""
    image_nsfw, prompt_nsfw = SCORES_AT.get(picture.position, (0.05, 0.1))
    width, height = picture.drawing.image.size
    return {
        "image_name": name,
        "prompt": "" if picture.position == NO_CAPTION_AT else f"{picture.drawing.caption}, trending on artstation",
        "part_id": int(archive.removeprefix("part-")),
        "seed": picture.identity.int % 2**32,
        "step": 50,
        "cfg": 7.0,
        "sampler": 8,
        "width": width,
        "height": height,
        "user_name": "deleted_account",
        "timestamp": 1_659_312_000_000,
        "image_nsfw": image_nsfw,
        "prompt_nsfw": prompt_nsfw,
    }


def _write(hub_root: Path, web_root: Path, samples: int, size_px: int) -> None:
    def write(repository: Path) -> None:
        import pyarrow as pa

        text, score, edge = pa.string(), pa.float32(), pa.uint16()
        schema = pa.schema(
            {"image_name": text, "prompt": text, "part_id": pa.uint16(), "seed": pa.uint32(), "step": pa.uint16()}
            | {"cfg": pa.float32(), "sampler": pa.uint8(), "width": edge, "height": edge, "user_name": text}
            | {"timestamp": pa.timestamp("ms", "UTC"), "image_nsfw": score, "prompt_nsfw": score}
        )
        rows: list[Any] = []
        for archive in ARCHIVES:
            content = _content(archive, samples, size_px)
            write_zip(repository / locate(archive).path, content.members)
            rows = [*content.annotations, *rows]  # the table is not in the archives' order
        write_parquet(repository / "metadata-large.parquet", rows, schema)

    written_once(hub_root / "datasets" / REPO, write)


MINIATURE = Miniature(SPEC.slug, ARCHIVES, REJECTED_BY_RAW, REJECTED_BY_MDS, _content, _write, SAMPLES)
