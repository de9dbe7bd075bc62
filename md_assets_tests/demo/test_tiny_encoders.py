"""The tiny encoders: the same bytes each time, and the default pair's shapes."""

import json
from pathlib import Path

import torch

from md_assets.core.schema import LATENT_DOWNSCALE
from md_assets.demo.tiny_encoders import (
    SDXL_SCALING_FACTOR,
    write_tiny_clip,
    write_tiny_open_clip,
    write_tiny_t5,
    write_tiny_vae,
)

# Session-scoped fixtures wrote the ones to compare with, long before and with another random state.


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_vae_is_the_same_each_time(tiny_encoders, tmp_path: Path) -> None:
    torch.manual_seed(7)
    assert contents(write_tiny_vae(tmp_path / "again")) == contents(tiny_encoders.vae)


def test_the_text_encoder_is_the_same_each_time(tiny_encoders, tmp_path: Path) -> None:
    torch.manual_seed(7)
    assert contents(write_tiny_open_clip(tmp_path / "again")) == contents(tiny_encoders.open_clip)


def test_transformers_text_encoders_are_the_same_each_time(tiny_clip: Path, tiny_t5: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    assert contents(write_tiny_clip(tmp_path / "clip")) == contents(tiny_clip)
    assert contents(write_tiny_t5(tmp_path / "t5")) == contents(tiny_t5)


def test_writing_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    write_tiny_vae(tmp_path / "vae")
    write_tiny_open_clip(tmp_path / "open_clip")
    write_tiny_clip(tmp_path / "clip")
    write_tiny_t5(tmp_path / "t5")
    assert torch.equal(torch.get_rng_state(), before)


def test_files_lie_where_the_real_ones_do(tiny_encoders, tiny_clip: Path, tiny_t5: Path) -> None:
    assert {"text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"} < set(contents(tiny_clip))
    assert {"config.json", "model.safetensors", "spiece.model", "tokenizer_config.json"} == set(contents(tiny_t5))
    assert set(contents(tiny_encoders.vae)) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert set(contents(tiny_encoders.open_clip)) == {"open_clip_config.json", "open_clip_model.safetensors"}


def test_the_vae_has_the_shape_of_sdxls(tiny_encoders) -> None:
    config = json.loads((tiny_encoders.vae / "vae" / "config.json").read_text())
    assert config["latent_channels"] == 4
    assert 2 ** (len(config["block_out_channels"]) - 1) == LATENT_DOWNSCALE
    assert config["scaling_factor"] == SDXL_SCALING_FACTOR
    assert config["force_upcast"] is True
