"""Which directories are mixed, in which parts, and how many samples they hold.

Here: the `streams` argument, checked before anything is started. Not here: what a directory holds
(`loader.layout`), reading samples (`loader.latents`). Imports neither torch nor streaming.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from md_assets.core.errors import SettingsError
from md_assets.loader.layout import LatentsIndex, read_latents_index
from md_assets.storage.mds import INDEX_NAME


@dataclass(frozen=True)
class LatentsStream:
    """One directory of latents as a part of the mixture.

    Attributes:
        local: the directory with the `index.json`; with `remote`, a directory of its own to cache shards in.
        proportion: > 0; this stream's share of an epoch, relative to the other streams' proportions. The epoch
            is then as long as all streams together. Given for every stream or for none.
        repeat: > 0; times each sample is seen in an epoch; a fraction is drawn anew each epoch.
        choose: ≥ 1; samples seen in an epoch.
        remote: where shards are fetched from: a directory or a URL that streaming knows (`s3://…`, `hf://…`).

    At most one of `proportion`, `repeat` and `choose`; without any, each sample is seen once per epoch.

    Raises:
        SettingsError: more than one is given, one is not positive, or `local` is `remote`.
    """

    local: str | os.PathLike[str]
    proportion: float | None = None
    repeat: float | None = None
    choose: int | None = None
    remote: str | None = None

    def __post_init__(self) -> None:
        weights = [weight for weight in (self.proportion, self.repeat, self.choose) if weight is not None]
        if len(weights) > 1 or any(not weight > 0 for weight in weights):
            raise SettingsError(
                f"{self.local}: proportion={self.proportion}, repeat={self.repeat}, choose={self.choose} do not fit",
                "Give at most one of them, and a positive number; leave a stream out to see nothing of it.",
            )
        if self.remote is not None and Path(self.remote).absolute() == self.directory:
            raise SettingsError(f"{self.local} is both local and remote", "Leave remote out to read it where it lies.")

    @property
    def directory(self) -> Path:
        """`local` as an absolute path."""
        return Path(self.local).absolute()

    @property
    def has_index(self) -> bool:
        """Whether the index can be read; that of a remote stream comes when the loader is first built."""
        return self.remote is None or (self.directory / INDEX_NAME).exists()

    def read_index(self) -> LatentsIndex:
        """See `loader.layout.read_latents_index`."""
        return read_latents_index(self.directory)


Streams: TypeAlias = "str | os.PathLike[str] | LatentsStream | Sequence[str | os.PathLike[str] | LatentsStream]"
"""One directory or several; a plain path is a stream whose samples are each seen once per epoch."""


def checked_streams(streams: Streams) -> tuple[LatentsStream, ...]:
    """The streams in the given order.

    Raises:
        SettingsError: none is given, one is given twice, or only some have a proportion.
    """
    if isinstance(streams, (str, os.PathLike, LatentsStream)):
        streams = [streams]
    checked = tuple(s if isinstance(s, LatentsStream) else LatentsStream(s) for s in streams)
    if not checked:
        raise SettingsError("no streams are given", "Name at least one directory of latents.")
    directories = [s.directory for s in checked]
    for directory in directories:
        if directories.count(directory) > 1:
            raise SettingsError(f"{directory} is given twice", "Use LatentsStream(…, repeat=2) to see it twice.")
    relative = [s.proportion is not None for s in checked]
    if any(relative) and not all(relative):
        raise SettingsError(
            f"{directories[relative.index(False)]} has no proportion, others have",
            "Give every stream a proportion, or none.",
        )
    return checked


def samples_by_directory(streams: Streams) -> dict[Path, int]:
    """Absolute directory -> its number of samples, in the given order, as the indexes say.

    Neither shards nor shared memory are touched. Weights (`repeat`, …) do not count here.

    Raises:
        SettingsError, ShardError: see `checked_streams` and `loader.layout.read_latents_index`.
    """
    return {s.directory: s.read_index().samples for s in checked_streams(streams)}


def count_samples(streams: Streams) -> int:
    """Number of samples of all directories together; see `samples_by_directory`."""
    return sum(samples_by_directory(streams).values())
