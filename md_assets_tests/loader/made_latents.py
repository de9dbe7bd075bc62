"""Tiny directories of latents, as the encoding stage leaves them. Here: making. Not here: any test."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from md_assets.core.ledger import Ledger
from md_assets.core.schema import latents_column, latents_columns
from md_assets.storage.mds import ShardWriter

CAPTION = (1, 3, 4)
IMAGES = {256: (2, 4, 4), 512: (2, 8, 8)}  # small on purpose: shapes must come from metadata


def array_of(key: str, column: str, shape: tuple[int, ...], dtype: str = "float16") -> np.ndarray:
    seed = zlib.crc32(f"{key} {column}".encode())
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def metadata(
    caption: tuple[int, ...] = CAPTION,
    images: Mapping[int, tuple[int, ...]] = IMAGES,
    dtype: str = "float16",
    latent_mode: str = "sample",
    caption_length: int | None = None,
    text_storage: str = "full",
) -> dict[str, Any]:
    """What a merged index says; the length of captions is no part of it."""
    return {
        **({} if text_storage == "full" else {"text_storage": text_storage}),
        "caption_latents": list(caption),
        "image_latents": {str(px): list(shape) for px, shape in images.items()},
        "dtype": dtype,
        "latent_mode": latent_mode,
    }


def write_archive(
    directory: Path,
    count: int,
    *,
    caption: tuple[int, ...] = CAPTION,
    images: Mapping[int, tuple[int, ...]] = IMAGES,
    dtype: str = "float16",
    latent_mode: str = "sample",
    caption_length: int | None = None,
    text_storage: str = "full",
) -> list[str]:
    """Write one archive's shards; returns its keys. `caption_length` is that of every caption, None for no column.
    Trimmed captions are the beginning of full ones.

    Moments are written like any array, but for their second half, which is positive.
    """
    keys = [f"{directory.parent.parent.name}/{directory.name}/{n}" for n in range(count)]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(directory, latents_columns(tuple(images), False, caption_length is not None)) as writer:
        for key in keys:
            row: dict[str, Any] = {"key": key, "caption": f"a caption of {key}", "width": 300, "height": 256}
            stored = caption_length if text_storage == "trimmed" else None
            row["caption_latents"] = array_of(key, "caption_latents", caption, dtype)[:, :stored].tobytes()
            for px, shape in images.items():
                array = array_of(key, latents_column(px), shape, dtype)
                if latent_mode == "moments":
                    array[shape[0] // 2 :] = abs(array[shape[0] // 2 :])
                row[latents_column(px)] = array.tobytes()
            if caption_length is not None:
                row["caption_length"] = caption_length
            writer.write(row)
    return keys


def write_merged_index(directory: Path, said: Mapping[str, Any] | None) -> None:
    """Merge the indexes of the archives inside; `said` becomes the object `md_assets`, None as foreign ones are."""
    shards = []
    for path in sorted(directory.glob("*/index.json")):
        for shard in json.loads(path.read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{path.parent.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    index: dict[str, Any] = {"version": 2, "shards": shards}
    if said is not None:
        samples = sum(shard["samples"] for shard in shards)
        index["md_assets"] = {**said, "fingerprint": "0123456789abcdef", "samples": samples}
    (directory / "index.json").write_text(json.dumps(index))


def make_latents(root: Path, name: str, counts: tuple[int, ...], *, foreign: bool = False, **layout: Any) -> Path:
    """`root/name/latents` with one archive per count and a merged index."""
    directory = root / name / "latents"
    for n, count in enumerate(counts):
        write_archive(directory / f"{n:03}", count, **layout)
    write_merged_index(directory, None if foreign else metadata(**layout))
    return directory


def write_ledger(directory: Path, details: dict[str, Any]) -> None:
    """The ledger beside one archive's directory."""
    ledger = Ledger(
        dataset="jdb", archive=directory.name, stage="latents", read=1, kept=1, rejected={}, bytes_in=1, bytes_out=1,
        seconds=1.0, source={}, inputs={}, settings={}, versions={}, files=(), details=details,
    )  # fmt: skip
    directory.with_name(f"{directory.name}.json").write_text(ledger.to_json())
