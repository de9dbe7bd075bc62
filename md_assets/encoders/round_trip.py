"""The round trip: stored latents decoded again, stored caption states computed again, for a few rows of an archive.

It is made where the models are loaded anyway, from the bytes as they lie on disk, and it is what tells latents of the
right image from finite numbers of the right shape. The thread of the models recomputes; comparing may be another's.

Here: recomputing, the numbers and the picture. Not here: which rows, and what is made of the numbers (`stages.latents`,
`stages.verify`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from md_assets.core.schema import CAPTION_COLUMN, CAPTION_LENGTH_COLUMN, latents_column
from md_assets.encoders.batches import crops_of
from md_assets.encoders.bundle import Arriving, Encoders, is_out_of_memory
from md_assets.storage.contact_sheet import pictures_sheet
from md_assets.storage.latent_arrays import restored

MAX_PSNR_DB = 99.0
"""Said of equal pictures, whose PSNR is infinite; JSON has no word for that."""


@dataclass(frozen=True)
class Recomputed:
    """What the models make of stored rows, on its way from the device.

    Attributes:
        stored: the rows.
        arriving: column -> what is computed of it again: decoded pictures (images_BCHW, uint8), the captions' states
            (hidden_BLD, float32). None where there was no room for that beside the batches that are on their way.
    """

    stored: Sequence[Mapping[str, Any]]
    arriving: Arriving | None


@dataclass(frozen=True)
class RoundTrip:
    """What came back.

    Attributes:
        facts: for the ledger's details: `keys` of the rows; `psnr_db`, resolution in px -> of each decoded picture
            against its centre crop; `caption_error`, of each caption's states h stored and h' computed again:
            ‖h - h'‖ / ‖h'‖. Or `skipped`, why there is none.
        picture: data URI of crops and, to the right of each, what was decoded; at the highest resolution.
    """

    facts: dict[str, Any]
    picture: str | None


def recompute(encoders: Encoders, stored: Sequence[Mapping[str, Any]]) -> Recomputed:
    """Decode a few rows and encode their captions again; on a GPU this returns before the numbers are there.

    Args:
        encoders: that made them; see there which thread may call this.
        stored: rows of the latents.
    """
    computed: dict[str, torch.Tensor] = {}
    try:
        if stored:
            shapes, channels = encoders.layout()["image_latents"], encoders.vae.latent_channels
            for px in encoders.settings.image_resolutions:
                column = latents_column(px)
                latents_BChw = _array(encoders, stored, column).reshape(len(stored), *shapes[str(px)])
                computed[column] = encoders.vae.decode(latents_BChw[:, :channels])
            tokens = encoders.text.tokenize([row["caption"] for row in stored])
            computed[CAPTION_COLUMN] = encoders.text.encode(tokens).float()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Recomputed(stored, None)
    return Recomputed(stored, Arriving(computed, encoders.device))


def round_trip(encoders: Encoders, recomputed: Recomputed, jpegs: Sequence[bytes]) -> RoundTrip:
    """Compare what was recomputed with what is stored, and with the images.

    Args:
        encoders: that made both.
        recomputed: of stored rows.
        jpegs: the image of each.
    """
    stored = recomputed.stored
    if not stored:
        return RoundTrip({}, None)
    if recomputed.arriving is None:
        return RoundTrip({"skipped": "out of memory"}, None)
    resolutions_px = encoders.settings.image_resolutions
    keys = [row["key"] for row in stored]
    crops = [crops_of(key, jpeg, resolutions_px) for key, jpeg in zip(keys, jpegs, strict=True)]
    psnr_db: dict[str, list[float]] = {}
    pictures: list[np.ndarray] = []
    computed = recomputed.arriving.get()
    for px in resolutions_px:
        decoded = computed[latents_column(px)].permute(0, 2, 3, 1).numpy()
        pairs = [(crop[px].permute(1, 2, 0).numpy(), back) for crop, back in zip(crops, decoded, strict=True)]
        psnr_db[str(px)] = [_psnr_db(*pair) for pair in pairs]
        pictures = [picture for pair in pairs for picture in pair]
    again_BLD = computed[CAPTION_COLUMN]
    stored_BLD = torch.stack([_caption(encoders, row) for row in stored]).float()
    if encoders.settings.text_storage == "trimmed":
        own_B = torch.tensor([row[CAPTION_LENGTH_COLUMN] for row in stored])
        own_BL1 = (torch.arange(encoders.text.length) < own_B[:, None])[..., None]
        again_BLD = torch.where(own_BL1, again_BLD, 0.0)  # as padding is restored
    error_B = (stored_BLD - again_BLD).flatten(1).norm(dim=1) / again_BLD.flatten(1).norm(dim=1)
    caption_error = [round(error, 6) for error in error_B.tolist()]
    return RoundTrip({"keys": keys, "psnr_db": psnr_db, "caption_error": caption_error}, pictures_sheet(pictures))


def _caption(encoders: Encoders, row: Mapping[str, Any]) -> torch.Tensor:
    """Its states, L×D, with zeros where padding is not stored."""
    shape = (encoders.text.length, encoders.text.width)
    return torch.from_numpy(restored(row[CAPTION_COLUMN], shape, encoders.settings.save_dtype))


def _array(encoders: Encoders, stored: Sequence[Mapping[str, Any]], column: str) -> torch.Tensor:
    """One row for each; any shape beside that."""
    data = bytearray(b"".join(row[column] for row in stored))
    return torch.from_numpy(np.frombuffer(data, encoders.settings.save_dtype)).reshape(len(stored), -1)


def _psnr_db(one_HWC: np.ndarray, other_HWC: np.ndarray) -> float:
    squared = float(((one_HWC.astype(np.float32) - other_HWC.astype(np.float32)) ** 2).mean())
    return round(min(10 * math.log10(255**2 / squared), MAX_PSNR_DB), 2) if squared else MAX_PSNR_DB
