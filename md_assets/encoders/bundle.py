"""Both encoders together: batches in, rows of latents out.

Shapes: B batch, L tokens, D text width, C latent channels, h and w cells.

Here: devices, dtypes and the arrays of a row. Not here: the two models, nor what happens to the rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from md_assets.core.errors import SettingsError
from md_assets.core.schema import LATENT_DOWNSCALE, latents_column
from md_assets.core.settings import EncoderSettings
from md_assets.encoders.batches import Batch, Preparation
from md_assets.encoders.text import TextEncoder
from md_assets.encoders.vae import VaeEncoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Encoded:
    """A batch and its arrays, still on the device.

    Attributes:
        batch: what was encoded.
        arrays: column -> one array per row (B×…), in the dtype that is stored.
        finite_B: whether every number of a row's arrays is finite.
        with_images: whether rows carry the JPEG.
    """

    batch: Batch
    arrays: dict[str, torch.Tensor]
    finite_B: torch.Tensor
    with_images: bool

    def not_finite(self) -> list[str]:
        """Keys of the rows with a NaN or an infinity; waits for the device."""
        return [key for key, finite in zip(self.batch.key, self.finite_B.tolist(), strict=True) if not finite]

    def rows(self) -> list[dict[str, Any]]:
        """The rows as they are stored, see `core.schema.latents_columns`; waits for the device."""
        arrays = {column: array.cpu().numpy() for column, array in self.arrays.items()}
        batch = self.batch
        return [
            {
                "key": batch.key[i],
                "caption": batch.caption[i],
                **{column: array[i].tobytes() for column, array in arrays.items()},
                "width": batch.width[i],
                "height": batch.height[i],
                **({"jpg": batch.jpg[i]} if self.with_images else {}),
            }
            for i in range(len(batch))
        ]


class Encoders:
    """The VAE and the text encoder of one process.

    Args:
        settings: what is computed and stored.
        vae, text: the models, on one device.
        device, dtype: where and in what they run.
    """

    def __init__(
        self, settings: EncoderSettings, vae: VaeEncoder, text: TextEncoder, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device = device
        self.model_dtype = str(dtype).removeprefix("torch.")
        self.preparation = Preparation(text.tokenize, settings.image_resolutions, settings.seed, vae.latent_channels)
        self._settings, self._vae, self._text = settings, vae, text

    @classmethod
    def load(cls, settings: EncoderSettings, device: str) -> Encoders:
        """Load both models.

        Args:
            settings: which ones, and in which dtype they run.
            device: `auto`, or as torch spells it.

        Raises:
            SettingsError: one of them cannot be loaded or cannot run so.
        """
        on = pick_device(device)
        if on.type == "cuda":
            torch.cuda.set_device(on)  # else pinning memory takes half a gigabyte of the first GPU for each process
        automatic = "bfloat16" if on.type == "cuda" else "float32"
        dtype = DTYPES[automatic if settings.model_dtype == "auto" else settings.model_dtype]
        vae = VaeEncoder.load(settings.vae, settings.vae_revision, on, dtype)
        text = TextEncoder.load(settings.text_encoder, settings.text_encoder_revision, on, dtype)
        return cls(settings, vae, text, on, dtype)

    def encode(self, batch: Batch) -> Encoded:
        """Start encoding a batch; on a GPU this returns before the numbers are there.

        Raises:
            SettingsError: the batch does not fit into the device's memory.
        """
        stored = DTYPES[self._settings.save_dtype]
        try:
            with torch.inference_mode():
                arrays = {"caption_latents": self._text.encode(batch.tokens_BL).to(stored)}
                for px, images_BCHW in batch.images_BCHW.items():
                    latents_BChw = self._vae.encode(images_BCHW, batch.noise_BChw[px])
                    arrays[latents_column(px)] = latents_BChw.to(stored)
                # after the cast: float16 turns what is above 65504 into infinity
                finite_B = torch.stack([a.flatten(1).isfinite().all(1) for a in arrays.values()]).all(0)
        except torch.cuda.OutOfMemoryError as error:
            raise SettingsError(
                f"a batch of {len(batch)} does not fit into the memory of {self.device}", "Lower encoders.batch_size."
            ) from error
        return Encoded(batch, arrays, finite_B, self._settings.save_images)

    def layout(self) -> dict[str, Any]:
        """What a reader must know of the stored arrays, and what made them; for the ledger's details."""
        channels = self.preparation.latent_channels
        return {
            "caption_latents": [1, self._text.length, self._text.width],
            "image_latents": {
                str(px): [channels, px // LATENT_DOWNSCALE, px // LATENT_DOWNSCALE]
                for px in self._settings.image_resolutions
            },
            "dtype": self._settings.save_dtype,
            "vae": self._settings.vae,
            "text_encoder": self._settings.text_encoder,
            "device": _device_name(self.device),
            "model_dtype": self.model_dtype,
        }


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """The device of one of several processes on this machine.

    Args:
        device: `auto` for a GPU where there is one, else the CPU; or as torch spells it.
        local_rank: number of the process on this machine, which is that of its GPU unless the device names
            one; processes share GPUs when there are fewer.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    picked = torch.device(device)
    if picked.type == "cuda" and picked.index is None:
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
    return picked


def share_cpu(processes: int) -> None:
    """Let torch use this process's part of the CPU; launchers set it to one thread, whatever there is."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
