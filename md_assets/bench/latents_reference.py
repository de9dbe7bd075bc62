"""How the reference makes latents, step by step, to be measured against.

One DataLoader with PIL transforms, `vae.encode` under autocast, `.cpu()` and writing, batch by batch, in our own words.

Here: the reference's loop. Not here: ours (`stages.latents`), the measurement (`bench.latents`).
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from md_assets.core.schema import latents_columns
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.storage.mds import Shard, ShardReader, ShardWriter, read_index


class Speed(NamedTuple):
    """How fast something was: images by the clock, and seconds of processor time for each."""

    images_per_s: float
    cpu_s: float


class Stopwatch:
    """Runs from when it is made; processor time is that of this process and of the children that have ended."""

    def __init__(self) -> None:
        self._started_s, self._cpu_s = time.perf_counter(), _cpu_s()

    def speed(self, images: int) -> Speed:
        return Speed(images / (time.perf_counter() - self._started_s), (_cpu_s() - self._cpu_s) / images)


def _cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


_loops: dict[str, ReferenceLoop] = {}


def reference_speed(plan: LatentsPlan, device: str, images: int) -> Speed:
    """The speed of the reference's loop in this process, which keeps its models for the next call.

    Args:
        plan: what to encode, into a folder that is removed.
        device: as torch spells it.
        images: how many the plan's archives have.
    """
    import torch

    if device not in _loops:
        _loops[device] = ReferenceLoop(plan, torch.device(device))
    speed = _loops[device].speed(plan, images)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return speed


class ReferenceLoop:
    """The reference's way on the models of a plan: everything of a batch one after the other."""

    def __init__(self, plan: LatentsPlan, device: Any) -> None:
        import open_clip
        from diffusers import AutoencoderKL

        self._device = device
        self._vae = AutoencoderKL.from_pretrained(plan.encoders.vae, subfolder="vae").to(device).eval()
        name = plan.encoders.text_encoder.removeprefix("openclip:")
        self._text = open_clip.create_model(name).to(device).eval()
        self._tokenize = open_clip.get_tokenizer(name)

    def speed(self, plan: LatentsPlan, images: int) -> Speed:
        import torch
        from torch.utils.data import DataLoader

        settings = plan.encoders
        dtype = getattr(torch, settings.model_dtype)
        autocast = torch.autocast(self._device.type, dtype=dtype, enabled=dtype != torch.float32)
        shards = [shard for archive in plan.archives for shard in read_index(plan.mds_dir.data(archive))]
        rows: Any = _Rows(shards, settings.image_resolutions, self._tokenize)
        columns = latents_columns(settings.image_resolutions, save_images=False)
        with tempfile.TemporaryDirectory() as out, ShardWriter(Path(out, "shards"), columns) as writer:
            clock = Stopwatch()
            for batch in DataLoader(rows, batch_size=plan.batch_size, num_workers=plan.num_workers):
                with torch.no_grad(), autocast:
                    arrays = {"caption_latents": self._states(batch["tokens"].to(self._device)).half().cpu().numpy()}
                    for px in settings.image_resolutions:
                        latents = self._vae.encode(batch[f"image_{px}"].to(self._device)).latent_dist.sample()
                        latents = latents * self._vae.config.scaling_factor
                        arrays[f"latents_{px}"] = latents.half().cpu().numpy()
                for i, key in enumerate(batch["key"]):
                    stored = {column: array[i].tobytes() for column, array in arrays.items()}
                    sizes = {column: int(batch[column][i]) for column in ("width", "height")}
                    writer.write({"key": key, "caption": batch["caption"][i], **sizes, **stored})
        return clock.speed(images)

    def _states(self, tokens_BL: Any) -> Any:
        text = self._text
        x_BLD = text.token_embedding(tokens_BL) + text.positional_embedding
        return text.ln_final(text.transformer(x_BLD, attn_mask=text.attn_mask))


class _Rows:
    """Rows with their images as torchvision's transforms make them of PIL images."""

    def __init__(self, shards: Sequence[Shard], resolutions_px: Sequence[int], tokenize: Any) -> None:
        from torchvision import transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        self._transforms = {
            px: transforms.Compose(
                [
                    transforms.Resize(px, interpolation=bicubic),
                    transforms.CenterCrop(px),
                    transforms.ToTensor(),
                    transforms.Normalize([0.5], [0.5]),
                ]
            )
            for px in resolutions_px
        }
        self._addresses = [(shard, row) for shard in shards for row in range(shard.rows)]
        self._tokenize = tokenize

    def __len__(self) -> int:
        return len(self._addresses)

    def __getitem__(self, number: int) -> dict[str, Any]:
        from PIL import Image

        shard, row = self._addresses[number]
        values = ShardReader(shard)[row]
        image = Image.open(io.BytesIO(values.pop("jpg"))).convert("RGB")
        values |= {f"image_{px}": transform(image) for px, transform in self._transforms.items()}
        return {**values, "tokens": self._tokenize([values["caption"]])[0]}
