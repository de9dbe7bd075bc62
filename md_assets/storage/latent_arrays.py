"""The arrays in a row of latents, whole or trimmed.

Shapes: L positions of a caption, D width of its states.

Here: how many numbers a column of a row has, and a trimmed caption's place among L positions. Not here: rows and shards
(`storage.mds`), what is trimmed (`core.schema.TEXT_STORAGES`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from md_assets.core.schema import CAPTION_COLUMN, CAPTION_LENGTH_COLUMN


def stored_shape(row: Mapping[str, Any], column: str, shape: Sequence[int], text_storage: str) -> tuple[int, ...]:
    """The shape of what a row has in a column.

    Args:
        row: of latents.
        column: with an array.
        shape: of the whole array, 1×L×D for captions.
        text_storage: see `core.schema.TEXT_STORAGES`.

    Returns: `shape`, but of a trimmed caption 1×caption_length×D.

    Raises:
        KeyError: a trimmed caption has no length.
        ValueError: it is longer than L, or has nothing.
    """
    if column != CAPTION_COLUMN or text_storage == "full":
        return tuple(shape)
    one, length, width = shape
    own = int(row[CAPTION_LENGTH_COLUMN])
    if not 1 <= own <= length:
        raise ValueError(f"its {CAPTION_LENGTH_COLUMN} is {own}, of {length} positions")
    return (one, own, width)


def restored(data: bytes, shape: Sequence[int], dtype: str) -> npt.NDArray[Any]:
    """An array of `shape`: what is stored and then zeros, in the stored dtype.

    Args:
        data: the numbers of its leading positions, or of all, row-major.
        shape: 1×L×D.
        dtype: `float16` or `float32`.

    Raises:
        ValueError: there are more numbers than `shape` has, or no whole number of them.
    """
    stored = np.frombuffer(data, dtype)
    if stored.size == math.prod(shape):
        return stored.reshape(shape).copy()
    array = np.zeros(shape, dtype)
    if stored.size > array.size:
        raise ValueError(f"{stored.size} numbers for the shape {tuple(shape)}")
    array.reshape(-1)[: stored.size] = stored
    return array
