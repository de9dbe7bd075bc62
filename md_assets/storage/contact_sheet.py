"""Contact sheets: sixteen thumbnails as one small picture, for the pages where people look at an archive.

Here: making the picture and its data URI. Not here: choosing images (`storage.raw_tar`, `storage.mds`), nor where it
is shown (`orchestration.metadata`).
"""

from __future__ import annotations

import base64
import bisect
import functools
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

COLUMNS = ROWS = 4
THUMBNAIL_PX = 96
"""Edge of a thumbnail: four of them fit the UI's dialog (560 px), sixteen leave half a bit for each pixel."""

MAX_URI_BYTES = 14_000
"""The picture lies in the event log, once for each archive and stage, so it stays well under 16 KB."""

_QUALITIES = (80, 70, 60, 50, 40, 30, 20, 10, 5, 1)


def image_sheet(jpegs: Sequence[bytes]) -> str | None:
    """A data URI of the first sixteen images, centre-cropped; None where there is none."""
    return _sheet([_thumbnail(jpeg) for jpeg in jpegs[: COLUMNS * ROWS]])


def latents_sheet(latents_CHW: Sequence[npt.NDArray[np.floating[Any]]]) -> str | None:
    """A data URI of the first sixteen latents, their first three channels as red, green and blue.

    Args:
        latents_CHW: arrays of at least one channel, any size.

    No decoder is involved: it shows whether structure and colours differ from row to row, not the pictures.
    """
    return _sheet([_latent_thumbnail(latent) for latent in latents_CHW[: COLUMNS * ROWS]])


def pictures_sheet(pictures_HWC: Sequence[npt.NDArray[np.uint8]]) -> str | None:
    """A data URI of the first sixteen square pictures (uint8 RGB), four in a row."""
    return _sheet(
        [
            Image.fromarray(picture).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC)
            for picture in pictures_HWC[: COLUMNS * ROWS]
        ]
    )


def _thumbnail(jpeg: bytes) -> Image.Image:
    with Image.open(io.BytesIO(jpeg)) as image:
        image.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
        picture = image.convert("RGB")
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    box = (left, top, left + edge, top + edge)
    thumbnail: Image.Image = picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC, box=box)
    return thumbnail


def _latent_thumbnail(latent_CHW: npt.NDArray[np.floating[Any]]) -> Image.Image:
    channels = latent_CHW[[0, 1 % len(latent_CHW), 2 % len(latent_CHW)]].astype(np.float32)
    low, high = channels.min(), channels.max()
    levels = ((channels - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    picture: Image.Image = Image.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
    return picture.resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR)


def _sheet(thumbnails: Sequence[Image.Image]) -> str | None:
    if not thumbnails:
        return None
    rows = -(-len(thumbnails) // COLUMNS)
    columns = min(len(thumbnails), COLUMNS)
    sheet = Image.new("RGB", (columns * THUMBNAIL_PX, rows * THUMBNAIL_PX), "white")
    for number, thumbnail in enumerate(thumbnails):
        sheet.paste(thumbnail, (number % COLUMNS * THUMBNAIL_PX, number // COLUMNS * THUMBNAIL_PX))

    @functools.cache
    def uri(quality: int) -> str:
        encoded = io.BytesIO()
        sheet.save(encoded, "JPEG", quality=quality, optimize=True)
        return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"

    # Sizes fall with the quality, so that the first one that fits is found by halving.
    first = bisect.bisect_left(_QUALITIES, True, key=lambda quality: len(uri(quality)) <= MAX_URI_BYTES)
    return uri(_QUALITIES[min(first, len(_QUALITIES) - 1)])
