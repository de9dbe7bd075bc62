"""Batches: rows of mds shards, decoded and tokenized ahead of the models.

Archives are taken one at a time from an iterator, and only when prefetching reaches them. So the next
archive's images are being decoded while the current one is encoded, and no archive is held that nobody works
on. A batch never mixes archives, and rows keep their order.

Workers are forked before the first archive is taken: they must not inherit the descriptor that locks it, or
a killed process's archive would stay locked for as long as its orphaned workers live.

Shapes: B batch, C channels, H and W px of the image, h and w cells of the latent, L tokens. uint8 RGB images.

Here: what is in a batch and the processes that make it. Not here: the models, and who may work on an archive.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from md_assets.core.errors import MdAssetsError, one_line
from md_assets.encoders.text import Tokenize, Tokens
from md_assets.encoders.vae import posterior_noise
from md_assets.storage.mds import Shard, ShardError, ShardReader, verify_shard


class Archive(Protocol):
    """An archive that somebody made sure to be the only one to work on."""

    @property
    def archive(self) -> str:
        """Its ID."""

    @property
    def shards(self) -> Sequence[Shard]:
        """Its mds shards."""

    @property
    def failed(self) -> bool:
        """Whether no more batches of it are wanted."""


@dataclass(frozen=True)
class RowAddress:
    """Where one row lies: the archive's ID, one of its mds shards, and the row in that."""

    archive: str
    shard: Shard
    row: int


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one archive, ready for the models; a list or tensor has one entry per row.

    Attributes:
        archive: its ID.
        key, caption, width, height, jpg: as in mds.
        tokens: of the captions.
        faults: why a row cannot be encoded, empty where it can. Such a row goes through the models with a black image,
            so that the others stay in their places, and is not stored.
        images_BCHW: resolution in px -> square crops, uint8, 0–255.
        noise_BChw: resolution in px -> see `encoders.vae.posterior_noise`; empty where none is wanted.
    """

    archive: str
    key: list[str]
    caption: list[str]
    width: list[int]
    height: list[int]
    jpg: list[bytes]
    tokens: Tokens
    faults: list[str]
    images_BCHW: dict[int, torch.Tensor]
    noise_BChw: dict[int, torch.Tensor]

    def __len__(self) -> int:
        return len(self.key)

    def pin_memory(self) -> Batch:
        """Called by DataLoader: the same batch in memory that a GPU can read from directly."""
        return Batch(
            **{
                **vars(self),
                "tokens": Tokens(*(part.pin_memory() for part in self.tokens)),
                "images_BCHW": {px: images.pin_memory() for px, images in self.images_BCHW.items()},
                "noise_BChw": {px: noise.pin_memory() for px, noise in self.noise_BChw.items()},
            }
        )


@dataclass(frozen=True)
class Unreadable:
    """What comes in the place of a batch of which a row cannot be read, because its shard was damaged.

    Attributes:
        archive: its ID.
        what: names the sample and what is wrong with it.
    """

    archive: str
    what: str


class UnreadableRowError(Exception):
    """A row cannot be read; the text names it."""


@dataclass(frozen=True)
class Preparation:
    """What a batch is prepared for: everything the workers need to know of the models.

    Attributes:
        tokenize: captions -> tokens.
        resolutions_px: edges of the square crops.
        seed: of the noise.
        noise_channels: C of the noise; 0 for none.
    """

    tokenize: Tokenize
    resolutions_px: tuple[int, ...]
    seed: int
    noise_channels: int


def batches(
    archives: Iterable[Archive], preparation: Preparation, batch_size: int, num_workers: int, pin_memory: bool
) -> Iterator[Batch | Unreadable]:
    """All rows of `archives` in order, as batches.

    Args:
        archives: taken lazily, in this process; one that has failed gives no further batches, but those that
            are on their way still come.
        preparation: see there.
        batch_size: rows; the last batch of an archive has as many as are left.
        num_workers: processes that prepare batches; 0 prepares in this one.
        pin_memory: whether tensors come in pinned memory, for a GPU.

    Raises:
        MdAssetsError: a worker was killed.
    """
    loader = DataLoader(
        PreparedBatches(preparation),
        # one list of addresses is one item: a batch is prepared as a whole, by one worker
        sampler=_Addresses(archives, batch_size),
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        pin_memory=pin_memory,
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MdAssetsError(
            f"a process that prepares batches was killed ({error})",
            "Give it more memory or a larger /dev/shm, or lower encoders.num_workers or batch_size; "
            "num_workers 0 uses neither",
        ) from error


class _Addresses:
    """The addresses of all rows of `archives`, batch by batch."""

    def __init__(self, archives: Iterable[Archive], batch_size: int) -> None:
        self._archives = archives
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[list[RowAddress]]:
        for archive in self._archives:
            addresses = [
                RowAddress(archive.archive, shard, row) for shard in archive.shards for row in range(shard.rows)
            ]
            for first in range(0, len(addresses), self._batch_size):
                if archive.failed:
                    break
                yield addresses[first : first + self._batch_size]


class PreparedBatches(Dataset[Batch | Unreadable]):
    """Batches by the addresses of their rows; runs in the workers."""

    def __init__(self, preparation: Preparation) -> None:
        self._preparation = preparation
        self._reader: ShardReader | None = None
        self._intact: set[Shard] = set()

    def __getitem__(self, addresses: Sequence[RowAddress]) -> Batch | Unreadable:
        """The batch of rows at `addresses`, all of one archive.

        Nothing is raised for a row that cannot be read: an exception that crosses from a worker to the main
        process arrives without its type.
        """
        archive = addresses[0].archive
        try:
            return self._batch(archive, addresses)
        except (MdAssetsError, UnreadableRowError) as error:
            return Unreadable(archive, str(error))

    def _batch(self, archive: str, addresses: Sequence[RowAddress]) -> Batch:
        to = self._preparation
        rows = [self._row(address) for address in addresses]
        keys, captions = [row["key"] for row in rows], [row["caption"] for row in rows]
        crops, faults = [], []
        for address, row in zip(addresses, rows, strict=True):
            try:
                crops.append(crops_of(row["key"], row["jpg"], to.resolutions_px))
                faults.append("")
            except UnreadableRowError as error:
                self._verify(address.shard, error)
                crops.append({px: torch.zeros(3, px, px, dtype=torch.uint8) for px in to.resolutions_px})
                faults.append(str(error))
        return Batch(
            archive=archive,
            key=keys,
            caption=captions,
            width=[row["width"] for row in rows],
            height=[row["height"] for row in rows],
            jpg=[row["jpg"] for row in rows],
            tokens=to.tokenize(captions),
            faults=faults,
            images_BCHW={px: torch.stack([crop[px] for crop in crops]) for px in to.resolutions_px},
            noise_BChw={
                px: torch.stack([posterior_noise(to.seed, key, px, to.noise_channels) for key in keys])
                for px in to.resolutions_px
                if to.noise_channels
            },
        )

    def _verify(self, shard: Shard, error: UnreadableRowError) -> None:
        """Raise where `error` is the disk's: then the row was whole once, and will be when mds is made again."""
        if shard in self._intact:
            return
        try:
            verify_shard(shard)
        except ShardError:
            raise UnreadableRowError(f"{error}, and {shard.path} does not hash to what its index says") from error
        self._intact.add(shard)

    def _row(self, address: RowAddress) -> dict[str, Any]:
        if self._reader is None or self._reader.shard != address.shard:
            self._reader = ShardReader(address.shard)
        return self._reader[address.row]


def crops_of(key: str, jpeg: bytes, resolutions_px: Sequence[int]) -> dict[int, torch.Tensor]:
    """One image, as square crops: bicubic resize (antialiased) of its smaller edge, then the centre.

    Args:
        key: what to call the image in an error.
        jpeg: the stored image.
        resolutions_px: edges of the crops; an image that is smaller is upscaled.

    Returns: resolution in px -> crop_CHW, uint8.

    Raises:
        UnreadableRowError: the image cannot be decoded. raw decodes every image that it keeps, so this one was
            most probably damaged since.
    """
    try:
        with Image.open(io.BytesIO(jpeg)) as opened:
            image_HWC = np.array(opened.convert("RGB"))
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        raise UnreadableRowError(f"the image of sample {key} cannot be decoded ({one_line(str(error))})") from error
    # A view: channels last in memory, where torch's uint8 kernel is several times as fast as PIL's resize and
    # within one grey level of it.
    image_CHW = torch.from_numpy(image_HWC).permute(2, 0, 1)
    crops = {}
    for px in resolutions_px:
        resized_CHW = functional.resize(image_CHW, [px], interpolation=InterpolationMode.BICUBIC, antialias=True)
        crops[px] = functional.center_crop(resized_CHW, [px, px])
    return crops
