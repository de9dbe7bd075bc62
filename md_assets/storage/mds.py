"""MDS shards: written with mosaicml-streaming, read row by row without it.

Importing `streaming` costs seconds and shared memory (it brings torch), so writing imports it when the first
shard is opened, and reading does without: checks, audits and decoding workers want single rows of a
closed directory, not a training stream. The layout read here is that of `streaming.base.format.mds`
version 2 and is held to it by tests that read the same rows with `StreamingDataset`.

Here: one archive's directory of shards. Not here: merged indexes (`stages.index`), training (`loader/`).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from md_assets.core.errors import DamagedError
from md_assets.core.ledger import OutputFile
from md_assets.core.schema import SHARD_HASHES, SHARD_SIZE_LIMIT_BYTES
from md_assets.storage.publish import output_file

INDEX_NAME = "index.json"
INDEX_VERSION = 2
"""Version of the index format, as `streaming.base.format` writes it."""


class ShardError(DamagedError):
    """A directory of shards is not what its index says."""


class _Writer(Protocol):
    new_samples: list[bytes]
    executor: ThreadPoolExecutor

    def write(self, sample: dict[str, Any]) -> None: ...
    def flush_shard(self) -> None: ...
    def finish(self) -> None: ...


class ShardWriter:
    """Writes rows in order into a new directory of shards.

    Args:
        directory: empty or absent.
        columns: column -> MDS encoding, see `core.schema`.

    Used as a context manager; leaving it normally writes the index, leaving it by an error does not.
    The same rows give the same bytes.
    """

    def __init__(self, directory: Path, columns: Mapping[str, str]) -> None:
        from streaming import MDSWriter  # imports torch

        self.directory = directory
        self.row_count = 0
        self._writer: _Writer = MDSWriter(
            out=str(directory),
            columns=dict(columns),
            hashes=list(SHARD_HASHES),
            size_limit=SHARD_SIZE_LIMIT_BYTES,
            max_workers=1,  # local shards are never uploaded, so a pool of threads would only idle
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._writer.write(dict(row))
        self.row_count += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        """`finish`, without its pause of a second where the thread for uploads has not yet seen that the last shard
        needs none (`Writer._write_index`, streaming 0.13)."""
        if self._writer.new_samples:
            self._writer.flush_shard()
            self._writer.new_samples = []
        self._writer.executor.submit(int).result()  # it takes one after the other, so now it has seen them all
        self._writer.finish()


@dataclass(frozen=True)
class Shard:
    """One shard file as an index describes it: columns in stored order with encodings and fixed sizes."""

    path: Path
    rows: int
    bytes: int
    sha256: str | None
    columns: tuple[tuple[str, str, int | None], ...]


def read_index(directory: Path) -> tuple[Shard, ...]:
    """The shards that `directory/index.json` lists; the directory may be one archive's or a merged one.

    Raises:
        ShardError: the index is absent, unreadable or of another version.
    """
    path = directory / INDEX_NAME
    try:
        index = json.loads(path.read_bytes())
        if index["version"] != INDEX_VERSION:
            raise ValueError(f"version {index['version']} instead of {INDEX_VERSION}")
        return tuple(_shard(directory, entry) for entry in index["shards"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{path} is no index of MDS shards: {error}", "Materialize the archive again.") from error


def _shard(directory: Path, entry: Mapping[str, Any]) -> Shard:
    raw = entry["raw_data"]
    return Shard(
        path=directory / raw["basename"],
        rows=entry["samples"],
        bytes=raw["bytes"],
        sha256=raw["hashes"].get("sha256"),
        columns=tuple(zip(entry["column_names"], entry["column_encodings"], entry["column_sizes"], strict=True)),
    )


class ShardReader:
    """Rows of one shard by their position, through a memory map.

    Args:
        shard: of `read_index`.

    Raises:
        ShardError: the file's size or header is not what the index says.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        try:
            with shard.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ShardError(f"{shard.path} cannot be read: {error}", "Materialize the archive again.") from error
        if len(self._map) != shard.bytes:
            raise ShardError(
                f"{shard.path} has {len(self._map)} bytes, its index says {shard.bytes}",
                "Materialize the archive again.",
            )
        try:
            (rows,) = struct.unpack_from("<I", self._map)
            if rows != shard.rows:
                raise ValueError(f"it has {rows} rows, its index says {shard.rows}")
            self._offsets = struct.unpack_from(f"<{rows + 1}I", self._map, 4)
        except (struct.error, ValueError) as error:
            raise ShardError(f"{shard.path} is damaged: {error}", "Materialize the archive again.") from error

    def __len__(self) -> int:
        return self.shard.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Column -> value: text and integers decoded, bytes and JPEGs as bytes.

        Raises:
            ShardError: the row's lengths do not add up.
            IndexError: there is no such row.
        """
        if not 0 <= row < len(self):
            raise IndexError(row)
        cursor, end = self._offsets[row], self._offsets[row + 1]
        sizes: list[int] = []
        try:
            for _, _, fixed_size in self.shard.columns:
                if fixed_size:
                    sizes.append(fixed_size)
                else:
                    sizes += struct.unpack_from("<I", self._map, cursor)
                    cursor += 4
            values: dict[str, Any] = {}
            for (name, encoding, _), size in zip(self.shard.columns, sizes, strict=True):
                data = self._map[cursor : cursor + size]
                if len(data) != size:
                    raise ValueError(f"column {name} goes on behind the end of the file")
                values[name] = _decoded(encoding, data)
                cursor += size
        except (struct.error, ValueError) as error:
            raise ShardError(f"{self.shard.path} row {row} is damaged: {error}", "Materialize it again.") from error
        if cursor != end:
            raise ShardError(
                f"{self.shard.path} row {row} is damaged: its columns end at byte {cursor}, not {end}",
                "Materialize it again.",
            )
        return values


def _decoded(encoding: str, data: bytes) -> Any:
    if encoding == "str":
        return data.decode("utf-8")
    if encoding == "int32":
        return struct.unpack("<i", data)[0]
    if encoding in ("bytes", "jpeg"):
        return data
    raise ValueError(f"encoding {encoding} is not one of core.schema")


def iter_rows(directory: Path) -> Iterator[dict[str, Any]]:
    """All rows of a directory of shards in order; see `ShardReader.__getitem__`."""
    for shard in read_index(directory):
        reader = ShardReader(shard)
        for row in range(len(reader)):
            yield reader[row]


def spread_rows(directory: Path, count: int) -> Iterator[dict[str, Any]]:
    """At most `count` rows of a directory of shards, spread evenly, the first and the last among them."""
    shards = read_index(directory)
    rows = sum(shard.rows for shard in shards)
    count = min(rows, count)
    wanted = sorted({round(i * (rows - 1) / max(count - 1, 1)) for i in range(count)})
    start = 0
    for shard in shards:
        positions = [row - start for row in wanted if start <= row < start + shard.rows]
        if positions:
            reader = ShardReader(shard)
            yield from (reader[position] for position in positions)
        start += shard.rows


def row_count(directory: Path) -> int:
    """Rows of a directory as its index says."""
    return sum(shard.rows for shard in read_index(directory))


def ledgered_files(directory: Path, archive: str) -> tuple[OutputFile, ...]:
    """The directory's shards and index for a ledger; shard hashes are those the writer computed."""
    shards = tuple(
        OutputFile(f"{archive}/{s.path.name}", s.bytes, s.sha256 or output_file(s.path, "").sha256)
        for s in read_index(directory)
    )
    return (*shards, output_file(directory / INDEX_NAME, f"{archive}/{INDEX_NAME}"))


def verify_shards(directory: Path) -> int:
    """Read every byte of a directory of shards and compare it with the index.

    Returns: the number of rows.

    Raises:
        ShardError: a shard is absent, of another size, or hashes to something else.
    """
    rows = 0
    for shard in read_index(directory):
        if not shard.path.is_file():
            raise ShardError(f"{shard.path} is missing", "Materialize the archive again.")
        reader = ShardReader(shard)
        digest = hashlib.sha256(reader._map).hexdigest()
        if shard.sha256 is not None and digest != shard.sha256:
            raise ShardError(f"{shard.path} does not hash to what its index says", "Materialize the archive again.")
        rows += len(reader)
    return rows
