"""Batches of latents for training, mixed from any number of directories.

Built on `streaming.StreamingDataset`, so an epoch's order depends on the seed and not on ranks or workers, and
`StreamingDataLoader.state_dict` / `load_state_dict` continue in the middle of an epoch.

Here: the loader. Not here: what may be mixed (`loader.streams`), stored shapes (`loader.layout`), shared memory
(`loader.shared_memory`).

Legend: B batch, L tokens, D width of a text embedding, C latent channels, s = image size in px / 8.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from streaming import Stream, StreamingDataLoader, StreamingDataset

from md_assets.core.errors import SettingsError
from md_assets.core.schema import CAPTION_COLUMN, CAPTION_LENGTH_COLUMN, ITEM_BYTES, latents_column
from md_assets.loader.layout import LatentsIndex, LatentsLayout, agreed_layout
from md_assets.loader.shared_memory import clear_start
from md_assets.loader.streams import LatentsStream, Streams, checked_streams
from md_assets.storage.latent_arrays import restored, stored_shape
from md_assets.storage.mds import ShardError

KEY_COLUMN = "key"


def build_latents_dataloader(
    streams: Streams,
    *,
    batch_size: int,
    image_size: int = 256,
    caption_drop_prob: float = 0.0,
    shuffle: bool = True,
    shuffle_seed: int = 9176,
    drop_last: bool = True,
    num_workers: int = 2,
    with_keys: bool = False,
    layout: LatentsLayout | None = None,
    cache_limit: int | str | None = None,
    **dataloader_options: Any,
) -> StreamingDataLoader:
    """A data loader over one or many directories of latents.

    Args:
        streams: a directory with an `index.json`, a `LatentsStream`, or a list of these.
        batch_size: samples per batch and rank.
        image_size: px; which of the encoded sizes to read.
        caption_drop_prob: 0–1; chance that a sample's caption counts as dropped, for classifier-free guidance.
            The decision follows from (shuffle seed, epoch, sample's position in the streams), so it changes
            from epoch to epoch and is the same after resuming and for any number of ranks and workers. A sample
            that `repeat` brings twice in one epoch has it twice.
        shuffle: whether each epoch has its own order; otherwise the stored one.
        shuffle_seed: ≥ 0; of the order and of dropped captions. Resuming takes it from the state instead.
        drop_last: whether to leave out an incomplete last batch.
        num_workers: processes that read, per rank; 0 reads in this one.
        with_keys: whether batches carry the samples' keys.
        layout: of latents whose metadata do not tell it, those of the reference codebase.
        cache_limit: of `remote` streams: bytes, also like `"100gb"`, above which the longest unused shards
            are deleted from their local directories; at least 4 × the largest shard.
        dataloader_options: further arguments of `torch.utils.data.DataLoader`, e.g. `pin_memory`.

    Returns: a loader of dicts, arrays in the stored dtype (float16 or float32):
        `image_latents` (B, C, s, s), of moments a sample that is drawn anew in each epoch; `caption_latents`
        (B, 1, L, D); `drop_caption_mask` (B,) float32, 0.0 where the caption is dropped and 1.0 elsewhere, the
        reference's convention; of text encoders that mask padding (T5) and of trimmed captions also `caption_mask`
        (B, L) bool, True at the caption's own tokens; of trimmed captions `caption_latents` is zero where that is
        False; with `with_keys` also `key`, a list of B texts. `len(loader)` is the number of batches of this rank
        in an epoch. On one rank an epoch has no sample twice unless weights ask for it; several ranks get equally
        many, so a few are repeated.

    Raises:
        SettingsError: a directory or index is missing, was not encoded at `image_size`, or cannot be mixed with
            the others; an argument is out of range; a remote stream's directory is in use by another training.
        ShardError: an index is broken. While iterating: a row is not as long as its layout says.

    Leftovers of killed trainings in shared memory are cleared first (`loader.shared_memory`). Every rank
    calls this, with the same arguments.
    """
    checked = checked_streams(streams)
    if not 0.0 <= caption_drop_prob <= 1.0:
        raise SettingsError(f"caption_drop_prob {caption_drop_prob} is out of range", "Choose 0 to 1.")
    if cache_limit is not None and any(stream.remote is None for stream in checked):
        # streaming would delete shards of which there is no other copy.
        raise SettingsError("cache_limit would delete shards of streams without remote", "Leave it out.")
    indexes = [stream.read_index() for stream in checked if stream.has_index]
    if indexes:
        _agreed(indexes, image_size, with_keys, layout)  # refuses before anything is started

    with clear_start([stream.directory for stream in checked if stream.remote is not None]):
        dataset = LatentsDataset(
            [_as_stream(stream) for stream in checked],
            image_size=image_size,
            caption_drop_prob=caption_drop_prob,
            with_keys=with_keys,
            shuffle=shuffle,
            shuffle_seed=shuffle_seed,
            batch_size=batch_size,
            cache_limit=cache_limit,
        )
    if len(indexes) < len(checked):  # what was missing of remote streams is there now
        indexes = [stream.read_index() for stream in checked]
    dataset.layout = _agreed(indexes, image_size, with_keys, layout)
    dataset.with_caption_mask = indexes[0].has_caption_length
    return StreamingDataLoader(
        dataset, batch_size=batch_size, drop_last=drop_last, num_workers=num_workers, **dataloader_options
    )


def _agreed(
    indexes: list[LatentsIndex], image_size: int, with_keys: bool, layout: LatentsLayout | None
) -> LatentsLayout:
    for index in indexes:
        if with_keys and KEY_COLUMN not in index.columns:
            raise SettingsError(f"{index.directory} has no keys", "Leave out with_keys.")
    return agreed_layout(indexes, image_size, layout)


def _as_stream(stream: LatentsStream) -> Stream:
    return Stream(
        local=str(stream.directory),
        remote=stream.remote,
        proportion=stream.proportion,
        repeat=stream.repeat,
        choose=stream.choose,
    )


class LatentsDataset(StreamingDataset):
    """Samples as tensors; made by `build_latents_dataloader` only, which also sets these two."""

    layout: LatentsLayout
    with_caption_mask: bool

    def __init__(
        self, streams: list[Stream], *, image_size: int, caption_drop_prob: float, with_keys: bool, **options: Any
    ) -> None:
        super().__init__(streams=streams, **options)
        self.image_size = image_size
        self.caption_drop_prob = caption_drop_prob
        self.with_keys = with_keys

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue where `state_dict` was called, see `StreamingDataLoader.load_state_dict`."""
        super().load_state_dict(obj)
        # streaming 0.13 hands these to the workers of the resumed epoch only; those of later epochs copy this
        # process's values, and would shuffle by another seed.
        self.shuffle_seed = obj["shuffle_seed"]
        self.num_canonical_nodes = obj["num_canonical_nodes"]
        self.initial_physical_nodes = obj.get("initial_physical_nodes")

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        """One sample by its position in all streams together; see `build_latents_dataloader` for what is in it."""
        row = super().get_item(sample_id, retry)
        image_shape, image_column = self.layout.image_latents[self.image_size], latents_column(self.image_size)
        drops = self._drops_caption(sample_id)
        sample = {
            # First, as `StreamingDataLoader` counts samples by the length of a batch's first entry.
            "image_latents": self._sampled(self._tensor(row, image_column, image_shape, sample_id), sample_id),
            "caption_latents": self._tensor(row, CAPTION_COLUMN, self.layout.caption_latents, sample_id),
            "drop_caption_mask": torch.tensor(0.0 if drops else 1.0),
        }
        if self.with_caption_mask:
            positions_L = torch.arange(self.layout.caption_latents[1])
            sample["caption_mask"] = positions_L < int(row[CAPTION_LENGTH_COLUMN])
        if self.with_keys:
            sample["key"] = row[KEY_COLUMN]
        return sample

    def _tensor(self, row: dict[str, Any], column: str, shape: tuple[int, ...], sample_id: int) -> torch.Tensor:
        data, dtype = row[column], self.layout.dtype
        try:
            there = stored_shape(row, column, shape, self.layout.text_storage)
        except (KeyError, ValueError) as error:
            raise self._damaged(column, sample_id, f"cannot be restored: {error}") from error
        expected_bytes = ITEM_BYTES[dtype] * math.prod(there)
        if len(data) != expected_bytes:
            has = f"has {len(data)} bytes, but {dtype} {there} has {expected_bytes}"
            raise self._damaged(column, sample_id, has)
        return torch.from_numpy(restored(data, shape, dtype))  # a copy, for torch wants to be able to write

    def _damaged(self, column: str, sample_id: int, what: str) -> ShardError:
        shard, position = self.spanner[sample_id]
        directory = self.streams[self.stream_per_shard[shard]].local
        return ShardError(
            f"{directory}: {column} of row {position} in shard {shard} {what}",
            "Check the layout that was given, or materialize the latents again.",
        )

    def _drops_caption(self, sample_id: int) -> bool:
        if self.caption_drop_prob == 0.0:
            return False
        return self._random(sample_id, 0).random() < self.caption_drop_prob

    def _sampled(self, latents: torch.Tensor, sample_id: int) -> torch.Tensor:
        """A sample of stored moments; other latents as they are."""
        if self.layout.latent_mode != "moments":
            return latents
        mean, std = latents.float().chunk(2)
        noise = self._random(sample_id, 1).standard_normal(mean.shape, dtype=np.float32)
        return (mean + std * torch.from_numpy(noise)).to(latents.dtype)

    def _random(self, sample_id: int, purpose: int) -> np.random.Generator:
        """Follows from (shuffle seed, epoch, sample, purpose), so it is the same after resuming and in any worker."""
        # `next_epoch` counts up before an epoch's first sample, and a loaded state sets it.
        epoch = max(self.next_epoch - 1, 0)
        return np.random.default_rng((self.shuffle_seed, epoch, int(sample_id), purpose))
