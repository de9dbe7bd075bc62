"""The VAE: images to latents, and back.

Latents are normalised as diffusion models take them: `(z - shift_factor) × scaling_factor`, both from the model's
config. The noise with which a sample of the posterior is drawn is a function of seed, key and resolution alone, so
that neither the machine nor the batch nor the number of processes moves it.

Shapes: B batch, C channels (3 of an image, 4 or 16 of a latent), H and W in px of the image, h and w in cells
of the latent (H / 8, W / 8).

Here: one VAE. Not here: resizing and cropping, see `encoders.batches`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from md_assets.core.errors import SettingsError
from md_assets.core.schema import LATENT_DOWNSCALE
from md_assets.storage.models import VAE_SUBFOLDER, subfolder_of


class VaeEncoder:
    """A diffusers `AutoencoderKL`, ready to run.

    Args:
        model: the `AutoencoderKL`, in the dtype in which it is to run.
        name: what to call it in errors.
        device: where it runs.

    Raises:
        SettingsError: the VAE overflows in its dtype, or its latents are not 1/8 of the image's edge.
    """

    def __init__(self, model: Any, name: str, device: torch.device) -> None:
        if model.dtype == torch.float16 and model.config.force_upcast:
            raise SettingsError(
                f"the VAE {name} overflows in float16 (its config says force_upcast)",
                "Set model_dtype to bfloat16, float32 or auto.",
            )
        downscale = 2 ** (len(model.config.block_out_channels) - 1)
        if downscale != LATENT_DOWNSCALE:
            raise SettingsError(
                f"the VAE {name} makes latents of 1/{downscale} of the image's edge instead of 1/{LATENT_DOWNSCALE}",
                "Choose a VAE of the Stable Diffusion family.",
            )
        self.latent_channels = int(model.config.latent_channels)
        self._shift = float(model.config.shift_factor or 0.0)
        self._scale = float(model.config.scaling_factor)
        self._device, self._dtype = device, model.dtype
        self._model = model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        if device.type == "cpu":  # image by image: within 2 % as fast, and activations take a quarter of the memory
            self._model.enable_slicing()

    @classmethod
    def load(cls, vae: str, revision: str, device: torch.device, dtype: torch.dtype) -> VaeEncoder:
        """Load a VAE from a local folder or, at one commit, from the Hub.

        Args:
            vae: the `vae` setting: a Hub repository or a local folder, of a pipeline (with a subfolder `vae`) or of a
                VAE alone.
            revision: the commit, for a repository; not looked at for a folder.
            device: see the class.
            dtype: of weights and activations.

        Raises:
            SettingsError: it cannot be loaded or used; see also the class.
        """
        remedy = "Correct `vae` or MD_ASSETS_VAE, or its files."
        try:
            inside = subfolder_of(vae, VAE_SUBFOLDER, revision)
            pinned = {} if Path(vae).is_dir() else {"revision": revision}
            model, info = AutoencoderKL.from_pretrained(
                vae, subfolder=inside or None, torch_dtype=dtype, output_loading_info=True, **pinned
            )
        except Exception as error:  # diffusers, huggingface_hub and safetensors each raise their own
            raise SettingsError(f"the VAE {vae} cannot be loaded: {error}", remedy) from error
        if missing := info["missing_keys"]:  # diffusers only logs these, and leaves them random
            raise SettingsError(f"the VAE {vae} lacks weights, e.g. {missing[0]}", remedy)
        return cls(model, vae, device)

    @torch.inference_mode()
    def encode(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images to the normalised posterior: its mean `(mean - shift_factor) × scaling_factor` and its standard
        deviation `std × scaling_factor`, so that `mean + std × noise` is a normalised sample.

        Args:
            images_BCHW: uint8 RGB, 0–255; H and W multiples of 8; on any device.

        Returns: mean_BChw and std_BChw, float32, on the VAE's device.
        """
        images_BCHW = images_BCHW.to(self._device, non_blocking=True).float().div_(127.5).sub_(1.0)
        images_BCHW = images_BCHW.to(self._dtype).to(memory_format=torch.channels_last)
        posterior = self._model.encode(images_BCHW).latent_dist
        # mean and log variance leave the model in its dtype; everything after it is float32
        mean_BChw = (posterior.mean.float() - self._shift) * self._scale
        return mean_BChw, torch.exp(0.5 * posterior.logvar.float()) * self._scale

    @torch.inference_mode()
    def decode(self, latents_BChw: torch.Tensor) -> torch.Tensor:
        """Normalised latents (any float dtype, on any device) back to images_BCHW: uint8 RGB, on the VAE's device."""
        latents_BChw = latents_BChw.to(self._device).float() / self._scale + self._shift
        latents_BChw = latents_BChw.to(self._dtype).to(memory_format=torch.channels_last)
        images_BCHW = self._model.decode(latents_BChw).sample.float()
        return images_BCHW.add_(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def posterior_noise(seed: int, key: str, resolution_px: int, channels: int) -> torch.Tensor:
    """Standard normal noise of one sample, C×h×w, float32, on the CPU.

    Args:
        seed: the `seed` setting.
        key: the sample's key.
        resolution_px: edge of the image.
        channels: of the latent.
    """
    digest = hashlib.sha256(f"{seed}\0{resolution_px}\0{key}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # manual_seed takes int64
    cells = resolution_px // LATENT_DOWNSCALE
    return torch.randn(channels, cells, cells, generator=generator, dtype=torch.float32)
