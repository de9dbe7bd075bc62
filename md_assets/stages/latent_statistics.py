"""Statistics of an archive's latents: what is compared between archives to see whether one of them drifts.

They are taken from the arrays as they are stored, after scaling and rounding to `save_dtype`, while these are on their
way into the shards, and kept in the ledger's details as `statistics`. Numbers are added in float64, where sums of
float16 numbers and of their squares hardly round; a standard deviation is that of the population.

Shapes: B batch, C channels of the stored image latents (means and then standard deviations in `latent_mode` moments),
h and w cells, L positions of the caption, D width of its states.

Here: what is measured. Not here: which archives differ (`stages.drift`), and gathering it (`stages.report`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from md_assets.core.schema import CAPTION_LENGTH_COLUMN
from md_assets.storage.latent_arrays import restored
from md_assets.storage.mds import spread_rows

STATISTICS = "statistics"
ENCODED_AT = "encoded_at"
"""Names in the details of a latents ledger: of what `LatentStatistics` found, and of when the archive was finished (ISO
8601 in UTC, to the second)."""

CAPTION_LATENTS = "caption_latents"
CAPTION_NORM = "caption_norm"

FloatArray = npt.NDArray[np.floating[Any]]


class _Sums(NamedTuple):
    """Of each channel: how many numbers, their sum, the sum of their squares."""

    numbers: int
    values_C: npt.NDArray[np.float64]
    squares_C: npt.NDArray[np.float64]


class LatentStatistics:
    """Adds up the rows of one archive.

    Attributes:
        rows: that were added.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums: dict[str, _Sums] = {}

    def add(self, arrays: Mapping[str, FloatArray], caption_lengths_B: Sequence[int]) -> None:
        """Add rows.

        Args:
            arrays: column -> stored values, of any float type: `caption_latents` B×…×L×D, others B×C×h×w.
            caption_lengths_B: leading positions of each caption that belong to it; L where padding is stored and not
                masked.
        """
        self.rows += len(caption_lengths_B)
        for column, array in arrays.items():
            if column == CAPTION_LATENTS:
                self._add(CAPTION_NORM, _caption_norms(array, caption_lengths_B)[:, None, None])
            else:
                self._add(column, array.astype(np.float64).reshape(*array.shape[:2], -1))

    def _add(self, name: str, values_BCN: npt.NDArray[np.float64]) -> None:
        added = _Sums(
            values_BCN.size // values_BCN.shape[1],
            values_BCN.sum((0, 2)),
            np.einsum("bcn,bcn->bc", values_BCN, values_BCN).sum(0),
        )
        self._sums[name] = _Sums(*map(operator.add, self._sums[name], added)) if name in self._sums else added

    def as_details(self) -> dict[str, Any]:
        """For the ledger.

        Returns: `rows`, and where there are some:
            `latents_<px>`: `mean` and `std` of each channel over all rows and cells, each a list of C numbers.
            `caption_norm`: `mean` and `std` over rows of the caption's norm: the Euclidean norm of its D-wide states,
            averaged over the caption's own positions.
        """
        details: dict[str, Any] = {"rows": self.rows}
        for name, sums in self._sums.items():
            means_C = sums.values_C / sums.numbers
            stds_C = np.sqrt(np.maximum(sums.squares_C / sums.numbers - means_C**2, 0))
            found = {"mean": means_C.tolist(), "std": stds_C.tolist()}
            details[name] = {kind: of[0] for kind, of in found.items()} if name == CAPTION_NORM else found
        return details


def _caption_norms(states: FloatArray, lengths_B: Sequence[int]) -> npt.NDArray[np.float64]:
    """Of each of B captions, the mean norm of the states at its own positions."""
    norms_BL = np.empty((len(states), states.shape[-2]))
    for norms_L, states_LD in zip(norms_BL, states.reshape(len(states), *states.shape[-2:]), strict=True):
        exact = states_LD.astype(np.float64)  # one caption at a time stays in the cache
        np.sqrt(np.einsum("ld,ld->l", exact, exact), out=norms_L)
    lengths = np.maximum(np.asarray(lengths_B), 1)
    own_BL = np.arange(norms_BL.shape[1]) < lengths[:, None]
    means: npt.NDArray[np.float64] = (norms_BL * own_BL).sum(1) / lengths
    return means


def sampled_statistics(directory: Path, details: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The statistics of some rows of published latents, for archives whose ledger has none.

    Args:
        directory: their shards.
        details: of their ledger.
        count: at most so many rows, spread evenly.

    Raises:
        ShardError, KeyError, OSError, TypeError, ValueError: the shards or what the ledger says of them are damaged.
    """
    shapes: dict[str, Sequence[int]] = {CAPTION_LATENTS: details[CAPTION_LATENTS]}
    shapes |= {f"latents_{px}": shape for px, shape in details["image_latents"].items()}
    statistics = LatentStatistics()
    for row in spread_rows(directory, count):
        arrays = {column: restored(row[column], shape, details["dtype"])[None] for column, shape in shapes.items()}
        statistics.add(arrays, [row.get(CAPTION_LENGTH_COLUMN, shapes[CAPTION_LATENTS][-2])])
    return statistics.as_details()


def named_values(statistics: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of `LatentStatistics.as_details`, e.g. `latents_512 mean of channel 0` or `caption_norm mean`.

    Numbers that are not finite, as of a ledger that was edited, are left out.
    """
    values: dict[str, float] = {}
    for column, of_column in statistics.items():
        for kind, found in of_column.items() if isinstance(of_column, Mapping) else ():
            if isinstance(found, list):
                values |= {f"{column} {kind} of channel {channel}": value for channel, value in enumerate(found)}
            else:
                values[f"{column} {kind}"] = found
    return {name: value for name, value in values.items() if math.isfinite(value)}
