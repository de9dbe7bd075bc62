"""What one directory of latents holds: how many samples, which columns, which shapes.

Shapes come from what the encoding stage wrote down: the object `md_assets` of a merged index, or the ledger
beside a single archive. Latents of the reference codebase say nothing of their shapes; whoever mixes them in
gives a `LatentsLayout`.

Here: reading one directory's metadata, and comparing those of several. Not here: mixing (`loader.streams`),
reading samples (`loader.latents`). Imports neither torch nor streaming.

Legend: L tokens, D width of a text embedding, C latent channels, s = image size in px / 8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md_assets.core.errors import MdAssetsError, SettingsError
from md_assets.core.schema import (
    CAPTION_COLUMN,
    CAPTION_LENGTH_COLUMN,
    ITEM_BYTES,
    LATENT_DOWNSCALE,
    LATENT_MODES,
    TEXT_STORAGES,
    latents_column,
)
from md_assets.storage.mds import INDEX_NAME, INDEX_VERSION, ShardError
from md_assets.storage.publish import read_ledger

METADATA_KEY = "md_assets"
"""The object of a merged index that is ours; streaming's own reader passes over it."""


@dataclass(frozen=True)
class LatentsLayout:
    """Shapes and element type of the stored arrays; needed by hand only for latents of the reference codebase.

    Attributes:
        caption_latents: (1, L, D), e.g. (1, 77, 1024).
        image_latents: image size in px -> (C, s, s), e.g. {256: (4, 32, 32), 512: (4, 64, 64)}; (2C, s, s) of moments.
        dtype: `float16` or `float32`.
        latent_mode: see `core.schema.LATENT_MODES`.
        text_storage: see `core.schema.TEXT_STORAGES`.

    Raises:
        SettingsError: a shape is not three positive numbers, or the dtype is another.
    """

    caption_latents: tuple[int, int, int]
    image_latents: Mapping[int, tuple[int, int, int]]
    dtype: str = "float16"
    latent_mode: str = "sample"
    text_storage: str = "full"

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise SettingsError(f"latents of dtype {self.dtype!r} are unknown", f"Use one of {sorted(ITEM_BYTES)}.")
        if self.latent_mode not in LATENT_MODES:
            raise SettingsError(
                f"latent_mode {self.latent_mode!r} is unknown", f"Use one of {', '.join(LATENT_MODES)}."
            )
        if self.text_storage not in TEXT_STORAGES:
            raise SettingsError(
                f"text_storage {self.text_storage!r} is unknown", f"Use one of {', '.join(TEXT_STORAGES)}."
            )
        for shape in (self.caption_latents, *self.image_latents.values()):
            if len(shape) != 3 or any(not isinstance(n, int) or n < 1 for n in shape):
                raise SettingsError(
                    f"{shape} is no shape of latents",
                    "Use for example caption_latents=(1, 77, 1024) and image_latents={256: (4, 32, 32)}.",
                )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> LatentsLayout:
        """The layout in an index's `md_assets` object or in a ledger's details, which spell it alike."""
        one, tokens, width = metadata["caption_latents"]
        image_latents: dict[int, tuple[int, int, int]] = {}
        for image_size, (channels, height, across) in metadata["image_latents"].items():
            image_latents[int(image_size)] = (channels, height, across)
        later = {name: metadata[name] for name in ("latent_mode", "text_storage") if name in metadata}
        return cls((one, tokens, width), image_latents, metadata["dtype"], **later)


@dataclass(frozen=True)
class LatentsIndex:
    """What a directory's index says, plus the ledger beside it.

    Attributes:
        directory: of the index.
        samples: number of rows, ≥ 1.
        columns: names of the shards' columns.
        layout: None where nobody wrote it down, as in latents of the reference codebase.
    """

    directory: Path
    samples: int
    columns: frozenset[str]
    layout: LatentsLayout | None

    @property
    def has_caption_length(self) -> bool:
        """Whether a model must mask padding: the text encoder did, or there are no states of it."""
        return CAPTION_LENGTH_COLUMN in self.columns


def read_latents_index(directory: Path) -> LatentsIndex:
    """Read the index of a directory of latents: a merged one, or that of a single archive.

    Raises:
        SettingsError: there is no such directory or no index in it, or it lists no samples.
        ShardError: the index is broken.
    """
    path = directory / INDEX_NAME
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise SettingsError(*_no_index(directory)) from None
    try:
        index = json.loads(text)
        if index["version"] != INDEX_VERSION:
            raise ValueError(f"version {index['version']} instead of {INDEX_VERSION}")
        samples = sum(shard["samples"] for shard in index["shards"])
        columns = frozenset(index["shards"][0]["column_names"]) if index["shards"] else frozenset()
        metadata = index.get(METADATA_KEY) or _ledger_details(directory)
        layout = LatentsLayout.from_metadata(metadata) if "caption_latents" in metadata else None
        said_samples = metadata.get("samples", samples)
    except (ValueError, KeyError, TypeError, AttributeError, MdAssetsError) as error:
        raise ShardError(f"{path} is no index of latents: {error}", "Materialize it again.") from error
    if samples != said_samples:
        raise ShardError(f"{path} lists {samples} samples but says {said_samples}", "Materialize it again.")
    if not samples:
        raise SettingsError(f"{directory} holds no samples", "Leave it out.")
    return LatentsIndex(directory, samples, columns, layout)


def _ledger_details(directory: Path) -> Mapping[str, Any]:
    try:
        ledger = read_ledger(directory.with_name(f"{directory.name}.json"))
    except MdAssetsError:
        return {}  # somebody's own file beside latents that are not ours
    return ledger.details if ledger else {}


def _no_index(directory: Path) -> tuple[str, str]:
    if not directory.is_dir():
        return f"{directory} does not exist", "Check the path, or materialize the dataset's latents."
    inner = sorted(path.parent.name for path in directory.glob(f"*/{INDEX_NAME}"))[:3]
    hint = f" or name a directory inside that has one, like {directory / inner[0]}" if inner else ""
    return f"{directory} has no {INDEX_NAME}", f"Materialize the dataset's latents_index{hint}."


def agreed_layout(indexes: Sequence[LatentsIndex], image_size: int, given: LatentsLayout | None) -> LatentsLayout:
    """The one layout that all directories share, so that their samples fit into one batch.

    Args:
        indexes: one or more.
        image_size: px; the size whose latents will be read. Other sizes need not agree.
        given: the layout of directories that carry none.

    Raises:
        SettingsError: a directory's layout is unknown, it was not encoded at `image_size`, or two differ.
    """
    first, first_layout = indexes[0], _layout_of(indexes[0], image_size, given)
    for other in indexes[1:]:
        layout = _layout_of(other, image_size, given)
        for what, ours, theirs in (
            ("caption latents", first_layout.caption_latents, layout.caption_latents),
            (f"{image_size} px latents", first_layout.image_latents[image_size], layout.image_latents[image_size]),
            ("dtype", first_layout.dtype, layout.dtype),
            ("latent_mode", first_layout.latent_mode, layout.latent_mode),
            ("text_storage", first_layout.text_storage, layout.text_storage),
            (CAPTION_LENGTH_COLUMN, first.has_caption_length, other.has_caption_length),
        ):
            if ours != theirs:
                raise SettingsError(
                    f"{first.directory} and {other.directory} cannot be mixed: {what} {ours} and {theirs}",
                    "Mix latents of the same encoders, save_dtype, latent_mode and text_storage only.",
                )
    return first_layout


def _layout_of(index: LatentsIndex, image_size: int, given: LatentsLayout | None) -> LatentsLayout:
    layout = index.layout or given
    if layout is None:
        s = image_size // LATENT_DOWNSCALE
        raise SettingsError(
            f"{index.directory} does not say which shapes its latents have",
            "Pass layout=LatentsLayout(...) with the numbers of the encoders that made it, for example "
            f"caption_latents=(1, 77, 1024), image_latents={{{image_size}: (4, {s}, {s})}}.",
        )
    missing = {CAPTION_COLUMN, latents_column(image_size)} - index.columns
    if image_size not in layout.image_latents or missing:
        sizes = sorted(size for size in layout.image_latents if latents_column(size) in index.columns)
        raise SettingsError(
            f"{index.directory} was not encoded at image_size {image_size}: it has {sizes or sorted(index.columns)}",
            f"Choose one of these, or encode it again with {image_size} among image_resolutions.",
        )
    return layout
