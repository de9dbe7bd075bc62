"""Both encoders together: batches in, rows of latents out.

Shapes: B batch, L tokens, D text width, C latent channels, h and w cells.

Here: devices, dtypes, memory and the arrays of a row. Not here: the two models, nor what happens to the rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from md_assets.core.errors import SettingsError, one_line
from md_assets.core.schema import (
    CAPTION_COLUMN,
    CAPTION_LENGTH_COLUMN,
    LATENT_DOWNSCALE,
    latents_column,
    latents_columns,
)
from md_assets.core.settings import EncoderSettings
from md_assets.encoders.batches import Batch, Preparation
from md_assets.encoders.open_clip_text import OpenClipText
from md_assets.encoders.text import TextEncoder, Tokens
from md_assets.encoders.transformers_text import TransformersText
from md_assets.encoders.vae import VaeEncoder
from md_assets.storage.models import OPENCLIP_PREFIX

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What torch says of memory in errors without a type of their own."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Arriving:
    """Tensors on their way from the device to memory, on a GPU to pinned memory.

    They are copied at once: asked for later, the copies would queue up behind the next batch.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._tensors = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record(torch.cuda.current_stream(device))

    def get(self) -> dict[str, torch.Tensor]:
        """The tensors; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


@dataclass(frozen=True)
class Encoded:
    """A batch and its arrays, on their way from the device.

    Attributes:
        batch: what was encoded.
        arriving: column -> one array per row (B×…), in the dtype that is stored.
        finite: `finite_B`, whether every number of a row's arrays is finite.
        columns: of a row.
        trimmed: whether only a caption's own states are stored.
        rows_at_once: how many rows went through the models together, where the memory did not take all.
    """

    batch: Batch
    arriving: Arriving
    finite: Arriving
    columns: tuple[str, ...]
    trimmed: bool
    rows_at_once: int | None

    def undecodable(self) -> list[str]:
        """Keys of the rows whose images cannot be decoded; they are not stored."""
        return [key for key, fault in zip(self.batch.key, self.batch.faults, strict=True) if fault]

    def not_finite(self) -> list[str]:
        """Keys of the rows with a NaN or an infinity; waits for the device."""
        finite_B = self.finite.get()["finite_B"].tolist()
        return [key for key, finite in zip(self.batch.key, finite_B, strict=True) if not finite]

    def rows(self) -> list[dict[str, Any]]:
        """The rows as they are stored, see `core.schema.latents_columns`; waits for the device."""
        kept, batch, arrays = self._kept(), self.batch, self.arriving.get()
        values: dict[str, Any] = {column: getattr(batch, column, None) for column in self.columns}
        values |= {column: array.numpy() for column, array in arrays.items()}
        values[CAPTION_LENGTH_COLUMN] = lengths = batch.tokens.own_B.tolist()
        if self.trimmed:
            values[CAPTION_COLUMN] = [row[:own] for row, own in zip(values[CAPTION_COLUMN], lengths, strict=True)]
        return [{c: values[c][i].tobytes() if c in arrays else values[c][i] for c in self.columns} for i in kept]

    def values(self) -> dict[str, npt.NDArray[np.float32]]:
        """The numbers of the rows that are stored, which float32 holds exactly: column -> B×…, captions with their
        padding; waits for the device."""
        kept = self._kept()  # and torch converts, in a tenth of the time that numpy takes
        whole = len(kept) == len(self.batch)
        arrays = self.arriving.get()
        return {c: (array if whole else array[kept]).float().numpy() for c, array in arrays.items()}

    def caption_lengths(self) -> list[int]:
        """Of the rows that are stored, the leading positions that a reader takes for the caption's."""
        lengths, length = self.batch.tokens.own_B.tolist(), self.arriving.get()[CAPTION_COLUMN].shape[1]
        return [lengths[i] if CAPTION_LENGTH_COLUMN in self.columns else length for i in self._kept()]

    def _kept(self) -> list[int]:
        return [i for i, fault in enumerate(self.batch.faults) if not fault]


class Encoders:
    """The VAE and the text encoder of one process, to be run by the thread that loaded them.

    Another thread that called torch on the CPU would have threads of its own for that, and slow the models down for as
    long as it lives (decisions/019).

    Args:
        settings: what is computed and stored.
        vae, text: the models, on one device.
        device, dtype: where and in what they run.

    Raises:
        SettingsError: captions are to be trimmed, and the text encoder's tokenizer does not tell where they end.

    Attributes:
        rows_at_once: rows that go through the models together; None as long as the memory takes every batch.
        columns: of a row, with their MDS encodings.
    """

    def __init__(
        self, settings: EncoderSettings, vae: VaeEncoder, text: TextEncoder, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.settings, self.vae, self.text = settings, vae, text
        self.device = device
        self.model_dtype = str(dtype).removeprefix("torch.")
        self._trimmed = settings.text_storage == "trimmed"
        if self._trimmed and not text.tells_end:
            raise SettingsError(
                f"the tokenizer of {settings.text_encoder} does not tell where a caption ends, so captions cannot be "
                "trimmed",
                "Set text_storage to full.",
            )
        noise_channels = vae.latent_channels if settings.latent_mode == "sample" else 0
        self.preparation = Preparation(text.tokenize, settings.image_resolutions, settings.seed, noise_channels)
        self.columns = latents_columns(
            settings.image_resolutions, settings.save_images, text.masks_padding or self._trimmed
        )
        self.rows_at_once: int | None = None

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
        if dtype == torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # by default a GPU's convolutions keep 10 bits of float32's 23
        vae = VaeEncoder.load(settings.vae, settings.vae_revision, on, dtype)
        family: Any = OpenClipText if settings.text_encoder.startswith(OPENCLIP_PREFIX) else TransformersText
        text = family.load(settings.text_encoder, settings.text_encoder_revision, on, dtype)
        return cls(settings, vae, text, on, dtype)

    @torch.inference_mode()
    def encode(self, batch: Batch) -> Encoded:
        """Start encoding a batch; on a GPU this returns before the numbers are there.

        A batch that does not fit into the device's memory is halved until it does, and so are those that follow.

        Raises:
            SettingsError: not even one row fits.
        """
        arrays = self._arrays_in_parts(batch)
        # after the cast: float16 turns what is above 65504 into infinity
        finite_B = torch.stack([a.flatten(1).isfinite().all(1) for a in arrays.values()]).all(0)
        arriving, finite = Arriving(arrays, self.device), Arriving({"finite_B": finite_B}, self.device)
        return Encoded(batch, arriving, finite, tuple(self.columns), self._trimmed, self.rows_at_once)

    def _arrays_in_parts(self, batch: Batch) -> dict[str, torch.Tensor]:
        while True:
            step = min(self.rows_at_once or len(batch), len(batch))
            try:
                parts = [self._arrays(batch, slice(at, at + step)) for at in range(0, len(batch), step)]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                said = one_line(str(error))
            else:
                return {column: torch.cat([part[column] for part in parts]) for column in parts[0]}
            # Not in the handler, where the traceback still holds the tensors that took the memory.
            if step == 1:
                raise SettingsError(
                    f"not even one image fits into the memory of {self.device} ({said})",
                    "Free it of other processes, or leave out the largest of image_resolutions.",
                )
            self.rows_at_once = step // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _arrays(self, batch: Batch, part: slice) -> dict[str, torch.Tensor]:
        stored = DTYPES[self.settings.save_dtype]
        arrays = {CAPTION_COLUMN: self.text.encode(Tokens(*(of[part] for of in batch.tokens))).to(stored)}
        for px, images_BCHW in batch.images_BCHW.items():
            mean_BChw, std_BChw = self.vae.encode(images_BCHW[part])
            if self.settings.latent_mode == "moments":
                latents = torch.cat([mean_BChw, std_BChw], dim=1)
            elif self.settings.latent_mode == "mean":
                latents = mean_BChw
            else:
                noise_BChw = batch.noise_BChw[px][part].to(self.device, non_blocking=True)
                latents = mean_BChw + std_BChw * noise_BChw
            arrays[latents_column(px)] = latents.to(stored, memory_format=torch.contiguous_format)
        return arrays

    def layout(self) -> dict[str, Any]:
        """What a reader must know of the stored arrays, and what made them; for the ledger's details."""
        channels = self.vae.latent_channels * (2 if self.settings.latent_mode == "moments" else 1)
        return {
            CAPTION_COLUMN: [1, self.text.length, self.text.width],
            "image_latents": {
                str(px): [channels, px // LATENT_DOWNSCALE, px // LATENT_DOWNSCALE]
                for px in self.settings.image_resolutions
            },
            "dtype": self.settings.save_dtype,
            "latent_mode": self.settings.latent_mode,
            **({"text_storage": "trimmed"} if self._trimmed else {}),
            "vae": self.settings.vae,
            "text_encoder": self.settings.text_encoder,
            "device": _device_name(self.device),
            "model_dtype": self.model_dtype,
        }


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says that memory is not enough: a GPU's, also for a library's workspace, or a CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY)


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
