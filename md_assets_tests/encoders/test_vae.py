"""The VAE: diffusers' own numbers, and noise that nothing but seed, key and resolution moves."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from md_assets.core.errors import SettingsError
from md_assets.demo.tiny_encoders import write_tiny_vae
from md_assets.encoders.vae import VaeEncoder, posterior_noise

CPU = torch.device("cpu")


def images(count: int, px: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, px, px), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def noise(count: int, px: int = 64) -> torch.Tensor:
    return torch.stack([posterior_noise(0, str(i), px, 4) for i in range(count)])


def plainly_encoded(folder: Path, images_BCHW: torch.Tensor, noise_BChw: torch.Tensor) -> torch.Tensor:
    """mean + std × noise, as diffusers gives mean and std, without shift and scale."""
    model = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    with torch.no_grad():
        posterior = model.encode((images_BCHW / 255 - 0.5) / 0.5).latent_dist
    return posterior.mean + posterior.std * noise_BChw


def sampled(vae: VaeEncoder, images_BCHW: torch.Tensor, noise_BChw: torch.Tensor) -> torch.Tensor:
    mean_BChw, std_BChw = vae.encode(images_BCHW)
    return mean_BChw + std_BChw * noise_BChw


def rewritten(tiny_encoders, folder: Path, **config) -> Path:
    """A copy of the tiny VAE with another config."""
    model = AutoencoderKL.from_pretrained(tiny_encoders.vae, subfolder="vae")
    model.register_to_config(**config)
    model.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def vae(tiny_encoders) -> VaeEncoder:
    return VaeEncoder.load(str(tiny_encoders.vae), "", CPU, torch.float32)


def test_latents_are_diffusers_own(vae: VaeEncoder, tiny_encoders) -> None:
    latents_BChw = sampled(vae, images(3), noise(3))
    assert latents_BChw.shape == (3, 4, 8, 8)
    assert latents_BChw.dtype == torch.float32
    plain_BChw = plainly_encoded(tiny_encoders.vae, images(3), noise(3))
    torch.testing.assert_close(latents_BChw, plain_BChw * 0.13025, rtol=1e-4, atol=1e-4)


def test_the_shift_comes_before_the_scale(tiny_encoders, tmp_path: Path) -> None:
    folder = rewritten(tiny_encoders, tmp_path, shift_factor=0.5, scaling_factor=2.0)
    latents_BChw = sampled(VaeEncoder.load(str(folder), "", CPU, torch.float32), images(2), noise(2))
    plain_BChw = plainly_encoded(folder, images(2), noise(2))
    torch.testing.assert_close(latents_BChw, (plain_BChw - 0.5) * 2.0, rtol=1e-4, atol=1e-4)


def test_sixteen_channels_without_quantisation_layers(tmp_path: Path) -> None:
    """As the VAEs of SD 3 and FLUX are."""
    config = {"latent_channels": 16, "shift_factor": 0.0609, "scaling_factor": 1.5305}
    folder = write_tiny_vae(tmp_path, **config, use_quant_conv=False, use_post_quant_conv=False)
    vae = VaeEncoder.load(str(folder), "", CPU, torch.float32)
    assert vae.latent_channels == 16
    noise_BChw = torch.stack([posterior_noise(0, str(i), 64, 16) for i in range(2)])
    latents_BChw = sampled(vae, images(2), noise_BChw)
    assert latents_BChw.shape == (2, 16, 8, 8)
    plain_BChw = plainly_encoded(folder, images(2), noise_BChw)
    torch.testing.assert_close(latents_BChw, (plain_BChw - 0.0609) * 1.5305, rtol=1e-4, atol=1e-4)


def test_decoding_undoes_shift_and_scale(tiny_encoders, tmp_path: Path) -> None:
    folder = rewritten(tiny_encoders, tmp_path, shift_factor=0.5, scaling_factor=2.0)
    vae = VaeEncoder.load(str(folder), "", CPU, torch.float32)
    mean_BChw, _ = vae.encode(images(2))
    model = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    with torch.no_grad():
        plain_BCHW = model(images(2) / 127.5 - 1, sample_posterior=False).sample
    difference = vae.decode(mean_BChw).float() - ((plain_BCHW + 1) * 127.5).clamp(0, 255)
    assert difference.abs().max() <= 0.51


@pytest.mark.slow
def test_a_realistically_sized_model_gives_diffusers_own_latents(tmp_path: Path) -> None:
    """SDXL's architecture, with attention and random weights."""
    wide = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
    folder = write_tiny_vae(tmp_path, **wide, mid_block_add_attention=True)
    latents_BChw = sampled(VaeEncoder.load(str(folder), "", CPU, torch.float32), images(2), noise(2))
    plain_BChw = plainly_encoded(folder, images(2), noise(2))
    torch.testing.assert_close(latents_BChw, plain_BChw * 0.13025, rtol=1e-4, atol=1e-4)


def test_a_bare_folder_is_the_same_model(vae: VaeEncoder, tiny_encoders) -> None:
    bare = VaeEncoder.load(str(tiny_encoders.vae / "vae"), "", CPU, torch.float32)
    assert torch.equal(bare.encode(images(1))[0], vae.encode(images(1))[0])


def test_on_a_cpu_the_batch_does_not_move_a_bit_of_a_sample(vae: VaeEncoder) -> None:
    together = sampled(vae, images(5), noise(5))
    alone = torch.cat([sampled(vae, images(5)[i : i + 1], noise(5)[i : i + 1]) for i in range(5)])
    assert torch.equal(together, alone)


def test_bfloat16_is_near_float32(vae: VaeEncoder, tiny_encoders) -> None:
    half = VaeEncoder.load(str(tiny_encoders.vae), "", CPU, torch.bfloat16)
    full = sampled(vae, images(2), noise(2))
    assert 0 < (sampled(half, images(2), noise(2)) - full).norm() / full.norm() < 0.02


def test_float16_is_refused_where_it_overflows(tiny_encoders, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"overflows in float16.*model_dtype"):
        VaeEncoder.load(str(tiny_encoders.vae), "", CPU, torch.float16)
    fixed = rewritten(tiny_encoders, tmp_path, force_upcast=False)
    assert VaeEncoder.load(str(fixed), "", CPU, torch.float16).latent_channels == 4


def test_another_downscale_is_refused(tmp_path: Path) -> None:
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
    ).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="1/4 of the image's edge instead of 1/8"):
        VaeEncoder.load(str(tmp_path), "", CPU, torch.float32)


def test_missing_weights_are_no_random_weights(tiny_encoders, tmp_path: Path) -> None:
    folder = rewritten(tiny_encoders, tmp_path)
    weights_file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(weights_file)
    del weights["encoder.conv_in.weight"]
    save_file(weights, weights_file)
    with pytest.raises(SettingsError, match=r"lacks weights.*encoder\.conv_in\.weight"):
        VaeEncoder.load(str(folder), "", CPU, torch.float32)


def test_a_folder_without_a_vae_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"the VAE {tmp_path} cannot be loaded.*MD_ASSETS_VAE"):
        VaeEncoder.load(str(tmp_path), "", CPU, torch.float32)


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "VAE alone"])
def test_a_repository_is_read_at_its_commit(
    vae: VaeEncoder, tiny_encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: bool
) -> None:
    """Offline, from a Hub cache with two commits, of which `main` is the wrong one."""
    commit = "1" * 40
    repo = tmp_path / "models--org--name"
    right = repo / "snapshots" / commit
    right.parent.mkdir(parents=True)
    if pipeline:
        right.mkdir()
        right = right / "vae"
    right.symlink_to(tiny_encoders.vae / "vae")
    rewritten(tiny_encoders, repo / "snapshots" / ("2" * 40), scaling_factor=9.0)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("2" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pinned = VaeEncoder.load("org/name", commit, CPU, torch.float32)
    assert torch.equal(pinned.encode(images(1))[0], vae.encode(images(1))[0])


def test_noise_follows_from_seed_key_and_resolution_alone() -> None:
    first = posterior_noise(0, "a", 64, 4)
    torch.manual_seed(5)
    posterior_noise(0, "b", 64, 4)
    assert torch.equal(posterior_noise(0, "a", 64, 4), first)
    others = [
        posterior_noise(1, "a", 64, 4),
        posterior_noise(0, "b", 64, 4),
        posterior_noise(0, "a", 128, 4)[:, :8, :8],
    ]
    assert all((other - first).abs().max() > 0.1 for other in others)


def test_noise_is_standard_normal() -> None:
    values = torch.stack([posterior_noise(0, str(i), 256, 4) for i in range(50)])
    assert values.shape == (50, 4, 32, 32)
    assert values.dtype == torch.float32
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert (values[1:] * values[:-1]).mean().abs() < 0.01  # samples do not go together
