"""What is in a shard: columns, element types and shapes of every stage.

Here: names and layouts that readers outside this project rely on. Not here: reading or writing them.
"""

from __future__ import annotations

from collections.abc import Sequence

SHARD_SIZE_LIMIT_BYTES = 256 * 2**20
"""256 MiB, the reference's shard size; a multiple of what object stores like to transfer."""

SHARD_HASHES = ("sha256",)
"""Hashes that a shard's index carries, so that `shards_intact` can tell a flipped byte."""

MDS_COLUMNS: dict[str, str] = {
    "key": "str",
    "jpg": "jpeg",
    "caption": "str",
    "width": "int32",
    "height": "int32",
}
"""Column -> MDS encoding of the mds stage; width and height are those of the stored image in px."""

LATENT_DOWNSCALE = 8
"""px of image edge for one latent cell: SD's and SDXL's VAEs halve the edge three times."""

ITEM_BYTES = {"float16": 2, "float32": 4}
"""Bytes of one stored element, by `save_dtype`."""

LATENT_MODES = ("sample", "mean", "moments")
"""What `latents_<px>` holds of the VAE's posterior, normalised: a sample, its mean, or its mean and then its standard
deviation, one below the other (2C×h×w), from which a reader draws `mean + std × noise` anew in each epoch."""

TEXT_STORAGES = ("full", "trimmed")
"""What `caption_latents` holds of a caption's L states: all, or the leading ones up to and including its end-of-text
token (1×caption_length×D), the same numbers, without those of the padding behind it."""

CAPTION_COLUMN = "caption_latents"

CAPTION_LENGTH_COLUMN = "caption_length"
"""Leading positions of `caption_latents` that belong to the caption; the rest is padding to be masked. Only where the
text encoder masks padding itself (T5) or the states of padding are not stored (`text_storage` trimmed)."""


def latents_column(resolution_px: int) -> str:
    """Name of the column with the image latents of one resolution, e.g. `latents_256`."""
    return f"latents_{resolution_px}"


def latents_columns(
    resolutions_px: Sequence[int], save_images: bool, with_caption_length: bool = False
) -> dict[str, str]:
    """Column -> MDS encoding of the latents stage.

    `caption_latents` is 1×L×D (see `TEXT_STORAGES`), `latents_<px>` is C×(px/8)×(px/8) (see `LATENT_MODES`), both
    row-major in `save_dtype`.
    """
    columns = {"key": "str", "caption": "str", CAPTION_COLUMN: "bytes"}
    columns |= {latents_column(px): "bytes" for px in resolutions_px}
    columns |= {"width": "int32", "height": "int32"}
    if with_caption_length:
        columns[CAPTION_LENGTH_COLUMN] = "int32"
    if save_images:
        columns["jpg"] = "jpeg"
    return columns
