"""The three resources: everything a user can set, as fields that the launchpad shows.

Here: fields with defaults and descriptions, and their conversion to the plain values that stages take.
Not here: what a setting does, see `core.settings`.
"""

import os
from pathlib import Path

import dagster as dg
from pydantic import Field

from md_assets.core.encoder_tag import encoder_tag
from md_assets.core.settings import DEFAULT_TEXT_ENCODER, DEFAULT_VAE, EncoderSettings, ImageSettings
from md_assets.storage.hub import HubClient
from md_assets.storage.models import text_encoder_revision, vae_revision
from md_assets.storage.retry import TransferPolicy
from md_assets.storage.sources import Sources

VAE_VARIABLE = "MD_ASSETS_VAE"
TEXT_ENCODER_VARIABLE = "MD_ASSETS_TEXT_ENCODER"

_POLICY = TransferPolicy()
_IMAGES = ImageSettings()


class HubResource(dg.ConfigurableResource):
    """The Hugging Face Hub: where archives, captions and models come from."""

    endpoint: str | None = Field(
        default=None, description="Address of the Hub. Default: HF_ENDPOINT, or the public Hub."
    )
    token: str | None = Field(
        default=None,
        description="Access token for gated repositories. Leave it empty and set HF_TOKEN, or use an EnvVar: what is "
        "typed here is stored with the run.",
    )
    revisions: dict[str, str] = Field(
        default={}, description="Repository -> commit or tag to which it is pinned. Default: the newest commit of each."
    )
    connect_timeout_s: float = Field(default=_POLICY.connect_timeout_s, description="Seconds to open a connection.")
    stall_timeout_s: float = Field(
        default=_POLICY.stall_timeout_s, description="Seconds without a byte after which a download is cut and resumed."
    )
    attempts: int = Field(
        default=_POLICY.attempts,
        description="Attempts without progress, with growing pauses, before an archive is given up.",
    )
    first_delay_s: float = Field(
        default=_POLICY.first_delay_s, description="Seconds before the second attempt; then doubled."
    )
    keep_archives: bool = Field(
        default=False, description="Keep the upstream archives below <dataset>/archives/ instead of deleting them."
    )

    def client(self) -> HubClient:
        """A client that remembers its listings; make one for each run."""
        policy = TransferPolicy(
            connect_timeout_s=self.connect_timeout_s,
            stall_timeout_s=self.stall_timeout_s,
            attempts=self.attempts,
            first_delay_s=self.first_delay_s,
        )
        return HubClient(endpoint=self.endpoint, token=self.token, revisions=self.revisions, policy=policy)

    def sources(self) -> Sources:
        """Every source, with this Hub among them; make one for each run."""
        return Sources(self.client())

    def environment(self) -> dict[str, str]:
        """The same Hub and account for processes in which huggingface_hub is called by other libraries."""
        variables = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token}
        return {name: value for name, value in variables.items() if value}


class ImagesResource(dg.ConfigurableResource):
    """Which images are kept and how they are stored. All but `num_workers` change bytes: archives made with other
    values become stale and are made again."""

    min_image_size: int = Field(
        default=_IMAGES.min_image_size, description="px; an image is kept when both edges are at least this long."
    )
    max_image_size: int = Field(
        default=_IMAGES.max_image_size, description="px; a smaller edge that is longer is resized to this, aspect kept."
    )
    jpeg_quality: int = Field(default=_IMAGES.jpeg_quality, description="1 to 100, of images that must be encoded.")
    safety_threshold: float = Field(
        default=_IMAGES.safety_threshold,
        description="Samples with a higher safety score are rejected, where the dataset has scores (diffdb): 0 to 1, "
        "and 2 for what the source has blurred.",
    )
    max_image_pixels: int = Field(
        default=_IMAGES.max_image_pixels, description="Pixels; an image with more is rejected before it is decoded."
    )
    max_member_bytes: int = Field(
        default=_IMAGES.max_member_bytes,
        description="Bytes; a file in an archive with more is rejected before it is read.",
    )
    num_workers: int | None = Field(
        default=None,
        description="Processes that decode images. Default: one for each core this process may use; 0: none.",
    )

    def settings(self) -> ImageSettings:
        return ImageSettings(
            min_image_size=self.min_image_size,
            max_image_size=self.max_image_size,
            jpeg_quality=self.jpeg_quality,
            safety_threshold=self.safety_threshold,
            max_image_pixels=self.max_image_pixels,
            max_member_bytes=self.max_member_bytes,
        )


class EncodersResource(dg.ConfigurableResource):
    """The encoders that make latents, and how they run."""

    vae: str | None = Field(
        default=None,
        description="Hub repository or local folder of a pipeline (with a subfolder vae) or of a VAE alone. "
        f"Default: {VAE_VARIABLE}, or {DEFAULT_VAE}.",
    )
    text_encoder: str | None = Field(
        default=None,
        description="openclip:hf-hub:ORG/NAME or openclip:local-dir:PATH; or a CLIP or T5 encoder of transformers: "
        "ORG/NAME or a path, of a pipeline (with text_encoder and tokenizer) or of the model alone. "
        f"Default: {TEXT_ENCODER_VARIABLE}, or {DEFAULT_TEXT_ENCODER}.",
    )
    image_resolutions: list[int] = Field(
        default=[256, 512], description="px, rising; each gives a column latents_<px> of a centre crop of that size."
    )
    num_processes: int | None = Field(
        default=None, description="Encoding processes of a run. Default: one for each GPU of this machine, else one."
    )
    batch_size: int = Field(default=32, ge=1, description="Images that go through the models at once.")
    model_dtype: str = Field(
        default="auto",
        description="auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, or float16 where the VAE bears it "
        "(the default one does not).",
    )
    save_dtype: str = Field(default="float16", description="float16 or float32, of the stored latents.")
    latent_mode: str = Field(
        default="sample",
        description="What is stored of the VAE's posterior: sample, mean, or moments (mean and standard deviation, of "
        "which the loader draws samples; twice the channels).",
    )
    text_storage: str = Field(
        default="full",
        description="What is stored of a caption's states: full, or trimmed, without those of the padding behind the "
        "caption, for trainings that mask it. Other loaders than ours read full only.",
    )
    seed: int = Field(default=0, description="Of the posterior noise, which depends on it and on a sample's key only.")
    save_images: bool = Field(default=False, description="Whether the JPEGs go into the latents' shards too.")

    def tag(self) -> str:
        """The encoder pair's name in paths, e.g. `sdxl1_dfnclipH14`."""
        return encoder_tag(self._vae(), self._text_encoder())

    def settings(self, hub: HubClient) -> EncoderSettings:
        """The settings with the models' revisions; the Hub is asked only for models that are not local."""
        vae, text_encoder = self._vae(), self._text_encoder()
        return EncoderSettings(
            vae=vae,
            text_encoder=text_encoder,
            vae_revision=vae_revision(vae, hub),
            text_encoder_revision=text_encoder_revision(text_encoder, hub),
            image_resolutions=tuple(self.image_resolutions),
            model_dtype=self.model_dtype,
            save_dtype=self.save_dtype,
            latent_mode=self.latent_mode,
            text_storage=self.text_storage,
            seed=self.seed,
            save_images=self.save_images,
        )

    def process_count(self) -> int:
        """Encoding processes to start, ≥ 1."""
        if self.num_processes is not None:
            return max(self.num_processes, 1)
        return max(_gpu_count(), 1)

    def _vae(self) -> str:
        return self.vae or os.environ.get(VAE_VARIABLE) or DEFAULT_VAE

    def _text_encoder(self) -> str:
        return self.text_encoder or os.environ.get(TEXT_ENCODER_VARIABLE) or DEFAULT_TEXT_ENCODER


def _gpu_count() -> int:
    """NVIDIA GPUs that a child process will see, told without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
