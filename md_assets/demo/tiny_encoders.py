"""Encoders of a few thousand weights in the real file formats, so that the demo and tests need no download.

Their latents mean nothing, but have the shapes, dtypes and scaling of the default pair's (the text width is 64
instead of 1024). The same code writes the same bytes.

Here: writing them. Not here: loading and running, which is done by `encoders/` as with any other model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SEED = 0
"""Of the random weights."""

SDXL_SCALING_FACTOR = 0.13025
"""`scaling_factor` of the VAE of stabilityai/stable-diffusion-xl-base-1.0."""

OPEN_CLIP_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
"""An `open_clip_config.json`; 77 and 49408 are those of CLIP's own tokenizer."""


def write_tiny_vae(folder: Path) -> Path:
    """Write an SDXL-shaped VAE (3 px channels to 4 latent channels, 1/8 of the edge) to `folder`/vae.

    Returns: `folder`, for the `vae` setting.
    """
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            mid_block_add_attention=False,  # half the time on a CPU
            latent_channels=4,
            scaling_factor=SDXL_SCALING_FACTOR,
            force_upcast=True,
        )
    vae.save_pretrained(folder / "vae")
    return folder


def write_tiny_open_clip(folder: Path) -> Path:
    """Write a CLIP with a text tower of 2 layers, 77 tokens and width 64 to `folder`, as open_clip stores them.

    Returns: `folder`, for the `text_encoder` setting behind `openclip:local-dir:`.
    """
    import torch
    from huggingface_hub import save_torch_state_dict
    from open_clip import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = CLIP(**OPEN_CLIP_CONFIG["model_cfg"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG, indent=1))
    save_torch_state_dict(model.state_dict(), folder, filename_pattern="open_clip_model{suffix}.safetensors")
    return folder
