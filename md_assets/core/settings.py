"""The settings of the stages, as plain values, and their fingerprint.

Here: settings that change what is stored, with their defaults and ranges.
Not here: how a run gets them (see `orchestration.resources`), and settings that only change how fast
or from where something is done (processes, batch size, endpoint, retries).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from md_assets.core.errors import SettingsError
from md_assets.core.schema import LATENT_MODES, TEXT_STORAGES
from md_assets.core.spec import DatasetSpec, Subset

FORMAT_VERSION = 2
"""Raised when the code writes other bytes for the same settings, so that older archives become stale."""

DEFAULT_VAE = "stabilityai/stable-diffusion-xl-base-1.0"
DEFAULT_TEXT_ENCODER = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"


@dataclass(frozen=True)
class ImageSettings:
    """Which images are kept and how they are stored.

    Attributes:
        min_image_size: px, ≥ 1; an image is kept when both edges are at least this long.
        max_image_size: px, ≥ min_image_size; a longer smaller edge is resized to it.
        jpeg_quality: 1–100, as libjpeg counts; of images that must be encoded.
        safety_threshold: ≥ 0; in datasets with safety scores, a sample with a higher one is rejected. Scores are
            0 to 1, and 2 for images that the source has blurred already. The default is the reference's.
        max_image_pixels: pixels; an image with more is rejected before anything of it is decoded.
            The default is the size at which Pillow reports a decompression bomb as an error (2 × its
            `Image.MAX_IMAGE_PIXELS`).
        max_member_bytes: bytes; an archive member with more is rejected before it is read. 256 MiB holds
            every image of at most `max_image_pixels` that any source stores compressed.
    """

    min_image_size: int = 256
    max_image_size: int = 512
    jpeg_quality: int = 95
    safety_threshold: float = 0.2
    max_image_pixels: int = 178_956_970
    max_member_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.min_image_size < 1 or self.max_image_size < self.min_image_size:
            raise SettingsError(
                f"min_image_size {self.min_image_size} and max_image_size {self.max_image_size} do not fit",
                "Choose 1 <= min_image_size <= max_image_size.",
            )
        if not 1 <= self.jpeg_quality <= 100:
            raise SettingsError(f"jpeg_quality {self.jpeg_quality} is out of range", "Choose 1 to 100.")
        if not self.safety_threshold >= 0:
            raise SettingsError(f"safety_threshold {self.safety_threshold} is not at least 0", "Choose 0 to 2.")
        if self.max_image_pixels < 1 or self.max_member_bytes < 1:
            raise SettingsError(
                f"max_image_pixels {self.max_image_pixels} or max_member_bytes {self.max_member_bytes} is not positive",
                "Choose at least 1; the defaults fit every known source.",
            )


@dataclass(frozen=True)
class EncoderSettings:
    """Which encoders make the latents, and what is stored of them.

    Attributes:
        vae: a Hub repository or a local folder, of a pipeline (with a subfolder `vae`) or of a VAE alone.
        text_encoder: `openclip:hf-hub:REPO` or `openclip:local-dir:PATH`; or a CLIP or T5 encoder of transformers by
            repository or folder, of a pipeline (with `text_encoder` and `tokenizer`) or of the model alone.
        vae_revision, text_encoder_revision: commit or content digest of each model's files
            (see `storage.models`), so that other weights under the same name are other settings.
        image_resolutions: px, multiples of 8; each gives a column `latents_<px>`.
        model_dtype: of weights and activations: `auto` (bfloat16 on a GPU, float32 on a CPU), `float32`, `bfloat16`
            or, where the VAE bears it, `float16`.
        save_dtype: of the stored arrays: `float16` or `float32`.
        latent_mode: what is stored of the VAE's posterior, see `core.schema.LATENT_MODES`.
        text_storage: what is stored of a caption's states, see `core.schema.TEXT_STORAGES`.
        seed: of the posterior noise; the noise of a sample depends on the seed and its key only. Decides nothing in the
            other modes than `sample`.
        save_images: whether the JPEG goes into the latents' shards too.

    Where a model runs (device, batch size, processes) is not in here: it moves values by rounding only, and a run that
    continues on another machine must not make stale what is done. For the same reason `auto` is one setting.
    """

    vae: str
    text_encoder: str
    vae_revision: str
    text_encoder_revision: str
    image_resolutions: tuple[int, ...] = (256, 512)
    model_dtype: str = "auto"
    save_dtype: str = "float16"
    latent_mode: str = "sample"
    text_storage: str = "full"
    seed: int = 0
    save_images: bool = False

    def __post_init__(self) -> None:
        if not self.image_resolutions or any(r < 8 or r % 8 for r in self.image_resolutions):
            raise SettingsError(
                f"image_resolutions {list(self.image_resolutions)} are not positive multiples of 8",
                "Use for example [256, 512].",
            )
        if list(self.image_resolutions) != sorted(set(self.image_resolutions)):
            raise SettingsError(
                f"image_resolutions {list(self.image_resolutions)} are not in rising order without repeats",
                "Use for example [256, 512].",
            )
        if self.model_dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise SettingsError(
                f"model_dtype {self.model_dtype!r} is unknown", "Use auto, float32, bfloat16 or float16."
            )
        if self.save_dtype not in ("float16", "float32"):
            raise SettingsError(f"save_dtype {self.save_dtype!r} is unknown", "Use float16 or float32.")
        if self.latent_mode not in LATENT_MODES:
            raise SettingsError(
                f"latent_mode {self.latent_mode!r} is unknown", f"Use one of {', '.join(LATENT_MODES)}."
            )
        if self.text_storage not in TEXT_STORAGES:
            raise SettingsError(
                f"text_storage {self.text_storage!r} is unknown", f"Use one of {', '.join(TEXT_STORAGES)}."
            )

    def as_fingerprinted(self) -> dict[str, Any]:
        """The settings that decide stored values: where the weights lie is left out, what they are stays.

        `text_storage` full is left out too, so that what was made before the setting existed stays current.
        """
        settings = asdict(self)
        del settings["vae"], settings["text_encoder"]
        if self.text_storage == "full":
            del settings["text_storage"]
        settings["image_resolutions"] = list(self.image_resolutions)
        return settings


def raw_settings(images: ImageSettings) -> dict[str, Any]:
    """Everything that decides the bytes of a raw archive, given its source."""
    about_pixels = asdict(images)
    del about_pixels["safety_threshold"]
    return {"format_version": FORMAT_VERSION, "images": about_pixels}


def mds_settings(spec: DatasetSpec, images: ImageSettings) -> dict[str, Any]:
    """Everything that decides the bytes of an archive's MDS shards, given its source."""
    settings = raw_settings(images)
    if spec.scored:
        settings["safety_threshold"] = images.safety_threshold
    if spec.caption_cleaning:
        settings["caption_cleaning"] = spec.caption_cleaning
    return settings


def latents_settings(mds: Mapping[str, Any], encoders: EncoderSettings) -> dict[str, Any]:
    """Everything that decides the rows of an archive's latents, given `mds_settings` and its source."""
    return {**mds, "encoders": encoders.as_fingerprinted()}


def subset_settings(whole: Mapping[str, Any], subset: Subset) -> dict[str, Any]:
    """Everything that decides the rows of a subset's archive, given that of the whole (mds or latents).

    Raises:
        SettingsError: stored images are made smaller than the subset asks for, so that their size no longer tells which
            images belong to it.
    """
    max_image_size = whole["images"]["max_image_size"]
    if max_image_size < subset.min_edge_px:
        raise SettingsError(
            f"max_image_size {max_image_size} makes every stored image smaller than the {subset.min_edge_px} px that "
            f"images of the subset {subset.name} have",
            f"Choose max_image_size >= {subset.min_edge_px}, or leave the subset out.",
        )
    return {**whole, "subset": {"name": subset.name, "min_edge_px": subset.min_edge_px}}


def fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that change when a setting does, whatever the order of the keys."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
