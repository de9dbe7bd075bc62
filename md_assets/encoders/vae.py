"""The VAE: images to latents.

Latents are one sample of the VAE's posterior, normalised as diffusion models take them. The noise of that
sample is a function of seed, key and resolution alone, so that neither the machine nor the batch nor the
number of processes moves it.

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

SUBFOLDER = "vae"
"""Where a pipeline's repository keeps its VAE, as `DiffusionPipeline.save_pretrained` writes it."""


class VaeEncoder:
    """The encoder half of a diffusers `AutoencoderKL`, ready to run.

    Args:
        model: the `AutoencoderKL`, in the dtype in which it is to run; its decoder is dropped.
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
        del model.decoder, model.post_quant_conv
        self.latent_channels = int(model.config.latent_channels)
        self._shift = float(model.config.shift_factor or 0.0)
        self._scale = float(model.config.scaling_factor)
        self._device, self._dtype = device, model.dtype
        self._model = model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)

    @classmethod
    def load(cls, vae: str, revision: str, device: torch.device, dtype: torch.dtype) -> VaeEncoder:
        """Load a VAE from a local folder or, at one commit, from the Hub.

        Args:
            vae: the `vae` setting: a Hub repository with a subfolder `vae`, or a local folder with one, or a
                bare VAE folder.
            revision: the commit, for a repository; not looked at for a folder.
            device: see the class.
            dtype: of weights and activations.

        Raises:
            SettingsError: it cannot be loaded or used; see also the class.
        """
        folder = Path(vae)
        pinned = {} if folder.is_dir() else {"revision": revision}
        bare = folder.is_dir() and not (folder / SUBFOLDER).is_dir()
        try:
            model, info = AutoencoderKL.from_pretrained(
                vae, subfolder=None if bare else SUBFOLDER, torch_dtype=dtype, output_loading_info=True, **pinned
            )
        except Exception as error:  # diffusers, huggingface_hub and safetensors each raise their own
            raise SettingsError(
                f"the VAE {vae} cannot be loaded: {error}", "Correct `vae` or MD_ASSETS_VAE, or its files."
            ) from error
        # diffusers only logs missing weights, and leaves them random
        if missing := [name for name in info["missing_keys"] if not name.startswith(("decoder.", "post_quant_conv."))]:
            raise SettingsError(f"the VAE {vae} lacks weights, e.g. {missing[0]}", "Fetch its files again.")
        return cls(model, vae, device)

    @torch.inference_mode()
    def encode(self, images_BCHW: torch.Tensor, noise_BChw: torch.Tensor) -> torch.Tensor:
        """Images to latents: `(mean + std × noise - shift_factor) × scaling_factor`.

        Args:
            images_BCHW: uint8 RGB, 0–255; H and W multiples of 8; on any device.
            noise_BChw: float32, see `posterior_noise`; on any device.

        Returns: B×C×h×w, float32, on the VAE's device.
        """
        images_BCHW = images_BCHW.to(self._device, non_blocking=True).float().div_(127.5).sub_(1.0)
        images_BCHW = images_BCHW.to(self._dtype).to(memory_format=torch.channels_last)
        posterior = self._model.encode(images_BCHW).latent_dist
        # mean and log variance leave the model in its dtype; everything after it is float32
        std_BChw = torch.exp(0.5 * posterior.logvar.float())
        noise_BChw = noise_BChw.to(self._device, non_blocking=True)
        return (posterior.mean.float() + std_BChw * noise_BChw - self._shift) * self._scale


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
