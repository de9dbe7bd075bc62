"""What the latents benchmark encodes, and with what: archives of synthesized images, models with random weights.

Here: making them. Not here: measuring (`bench.latents`).
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot
from md_assets.core.schema import MDS_COLUMNS
from md_assets.storage.mds import ShardWriter, ledgered_files
from md_assets.storage.publish import publish, scratch, with_files, workspace


@dataclass(frozen=True)
class Architecture:
    """The sizes of a pair of encoders.

    Attributes:
        vae_channels: of the VAE's four blocks.
        text_width, text_layers, text_heads: of the text tower.
    """

    vae_channels: tuple[int, int, int, int]
    text_width: int
    text_layers: int
    text_heads: int


ARCHITECTURES = {
    "default": Architecture((128, 256, 512, 512), 1024, 24, 16),
    "mid": Architecture((32, 64, 128, 128), 512, 6, 8),
    "tiny": Architecture((8, 8, 16, 16), 64, 2, 2),
}
"""`default`: vae/config.json of stabilityai/stable-diffusion-xl-base-1.0 and the text tower of
apple/DFN5B-CLIP-ViT-H-14-378. `mid`: a sixteenth of it or less, for CPUs."""


def write_vae(folder: Path, architecture: Architecture) -> Path:
    """Write a VAE to `folder`/vae; returns `folder`, for the `vae` setting."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=architecture.vae_channels,
        layers_per_block=2,
        norm_num_groups=min(32, architecture.vae_channels[0]),
        latent_channels=4,
        scaling_factor=0.13025,
    )
    vae.save_pretrained(folder / "vae")
    return folder


def write_text(folder: Path, architecture: Architecture) -> Path:
    """Write a CLIP in open_clip's format to `folder`; returns it, for the `text_encoder` setting."""
    import torch
    from huggingface_hub import save_torch_state_dict
    from open_clip import CLIP

    text = {"width": architecture.text_width, "layers": architecture.text_layers, "heads": architecture.text_heads}
    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **text},
    }
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_torch_state_dict(CLIP(**config).state_dict(), folder, filename_pattern="open_clip_model{suffix}.safetensors")
    return folder


def publish_mds(root: DataRoot, dataset: str, archive: str, images: int, settings: dict[str, Any]) -> None:
    """An archive of images as mds stores them: 512 px and wider, JPEGs of quality 95."""
    stage_dir = root.mds(dataset)
    with workspace(stage_dir.ledger(archive)) as own:
        with ShardWriter(scratch(own, "shards"), MDS_COLUMNS) as writer:
            for number in range(images):
                width, height = ((683, 512), (512, 768), (512, 512))[number % 3]
                caption = f"picture {number} of {archive}, " + "a few more words " * (number % 8)
                row = {"key": f"{archive}/{number:06}", "caption": caption, "width": width, "height": height}
                writer.write({**row, "jpg": _jpeg(number, width, height)})
        files = ledgered_files(writer.directory, archive)
        counts = {"read": images, "kept": images, "rejected": {}, "bytes_in": 0, "bytes_out": 0, "seconds": 0.0}
        ledger = Ledger(
            dataset=dataset,
            archive=archive,
            stage="mds",
            **counts,  # type: ignore[arg-type]
            source={},
            inputs={},
            settings=settings,
            versions={},
            files=(),
        )
        publish(stage_dir, writer.directory, with_files(ledger, files))


def _jpeg(seed: int, width: int, height: int) -> bytes:
    """Structure at all scales, as a photograph has it; about 1.5 bits a pixel."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells, levels in ((4, 90), (16, 45), (64, 22), (256, 11)):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels += (fine / 255 - 0.5) * levels
    file = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()
