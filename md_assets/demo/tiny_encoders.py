"""Encoders of a few thousand weights in the real file formats, so that the demo and tests need no download.

Their latents mean nothing, but have the shapes, dtypes and scaling of the default pair's (the text width is 64
instead of 1024). The same code writes the same bytes.

Here: writing them. Not here: loading and running, which is done by `encoders/` as with any other model.
"""

from __future__ import annotations

import io
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


def write_tiny_vae(folder: Path, **config: Any) -> Path:
    """Write an SDXL-shaped VAE (3 px channels to 4 latent channels, 1/8 of the edge) to `folder`/vae.

    Args:
        folder: for the `vae` setting.
        config: what is to be otherwise, e.g. `latent_channels` 16 and a `shift_factor`, as SD 3's VAE has them.

    Returns: `folder`.
    """
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae = AutoencoderKL(
            **{
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
                "block_out_channels": (4, 4, 8, 8),
                "layers_per_block": 1,
                "norm_num_groups": 2,
                "mid_block_add_attention": False,  # half the time on a CPU
                "latent_channels": 4,
                "scaling_factor": SDXL_SCALING_FACTOR,
                "force_upcast": True,
                **config,
            }
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


def write_tiny_clip(folder: Path) -> Path:
    """Write a CLIP text encoder of 2 layers, 77 tokens and width 32, as pipelines of Stable Diffusion keep theirs:
    `folder`/text_encoder, and CLIP's own vocabulary in `folder`/tokenizer.

    Returns: `folder`, for the `text_encoder` setting.
    """
    import torch
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    clips = SimpleTokenizer()  # open_clip carries the vocabulary
    files = folder / "tokenizer"
    files.mkdir(parents=True, exist_ok=True)
    vocabulary = {_transformers_name(token): number for token, number in clips.encoder.items()}
    (files / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = ["#version: 0.2", *(" ".join(pair) for pair in sorted(clips.bpe_ranks, key=clips.bpe_ranks.__getitem__))]
    (files / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=77).save_pretrained(files)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


def _transformers_name(token: str) -> str:
    """CLIP's two special tokens are spelled otherwise by open_clip."""
    return {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(token, token)


def write_tiny_t5(folder: Path) -> Path:
    """Write a T5 v1.1 encoder of 2 layers and width 32 with a SentencePiece vocabulary to `folder`, without subfolders.

    Returns: `folder`, for the `text_encoder` setting.
    """
    import sentencepiece
    import torch
    from transformers import T5Config, T5EncoderModel

    folder.mkdir(parents=True, exist_ok=True)
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=pieces,
        model_type="unigram",
        vocab_size=120,
        hard_vocab_limit=False,
        pad_id=0,  # T5's numbers of the special tokens
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(pieces.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512, "legacy": True})
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        config = T5Config(
            vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
        T5EncoderModel(config).save_pretrained(folder)
    return folder


_SENTENCES = (
    "a photo of a cat on a red chair, in the evening sun",
    "two dogs play with a ball under an old bridge",
    "an oil painting of mountains and a quiet lake at night",
    "the quick brown fox jumps over the lazy dog",
    "portrait of a woman with 12 birds, watercolor, highly detailed",
)
"""What the T5 vocabulary is made of; characters that do not occur here are unknown to it."""
