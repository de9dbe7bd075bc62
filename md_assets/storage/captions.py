"""The caption index: a parquet file from which one archive's captions are read without scanning the rest.

Each archive has a row group of its own, and the file's metadata say which. Upstream's rows come in any order, so
they are first spread over spill files by archive; memory holds one buffer and one spill file's rows, however long
the table is.

Here: the file. Not here: upstream's formats and broken rows, see `stages.annotations`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from md_assets.core.errors import MdAssetsError
from md_assets.core.spec import Caption

SPILL_FILES = 64
"""Spill files for one index: a table of 14 million rows needs 1/64 of them in memory at a time (about 220,000)."""

BUFFERED_ROWS = 100_000
"""Rows held in memory before they are spilled; about 30 MB of captions."""

BUFFERED_CHARACTERS = 50_000_000
"""Characters of captions held in memory before they are spilled, however few the rows."""

_ROW_GROUPS_KEY = b"md_assets.row_groups"
_SCHEMA = pa.schema([("archive", pa.string()), ("key", pa.string()), ("caption", pa.string())])


class CaptionIndexWriter:
    """Builds one index.

    Args:
        path: a new file.
        scratch: an empty directory for spill files, removed by the caller.
        archives: all archive IDs that rows may have; row groups come in this order.

    Used as a context manager; the file is complete when `finish` returns. The same rows in the same order give the
    same bytes.
    """

    def __init__(self, path: Path, scratch: Path, archives: Sequence[str]) -> None:
        self._path = path
        self._archives = archives
        self._ordinal = {archive: number for number, archive in enumerate(archives)}
        self._rows_per_spill = -(-len(archives) // SPILL_FILES)
        self._scratch = scratch
        self._files = ExitStack()
        self._spills: dict[int, Any] = {}
        self._buffer: list[tuple[int, str, str]] = []
        self._buffered_characters = 0

    def add(self, caption: Caption) -> None:
        """Take one row.

        Raises:
            KeyError: its archive is none of the dataset's.
        """
        self._buffer.append((self._ordinal[caption.archive], caption.key, caption.text))
        self._buffered_characters += len(caption.text)
        if len(self._buffer) >= BUFFERED_ROWS or self._buffered_characters >= BUFFERED_CHARACTERS:
            self._spill()

    def finish(self) -> tuple[int, list[str]]:
        """Write the index.

        Returns: the number of rows kept, and the key of each row left out because an earlier one has the same.
        """
        self._spill()
        for writer in self._spills.values():
            writer.close()
        kept = 0
        duplicates: list[str] = []
        row_groups: dict[str, int] = {}
        with pq.ParquetWriter(self._path, _SCHEMA, compression="zstd", write_page_checksum=True) as parquet:
            for number in sorted(self._spills):
                by_archive: dict[int, dict[str, str]] = {}
                with pa.OSFile(str(self._spill_path(number))) as file, pa.ipc.open_stream(file) as batches:
                    for batch in batches:
                        columns = (column.to_pylist() for column in batch.columns)
                        for ordinal, key, text in zip(*columns, strict=True):
                            captions = by_archive.setdefault(ordinal, {})
                            if key in captions:
                                duplicates.append(key)
                            else:
                                captions[key] = text
                for ordinal in sorted(by_archive):
                    captions = by_archive[ordinal]
                    archive = self._archives[ordinal]
                    arrays = [[archive] * len(captions), list(captions), list(captions.values())]
                    table = pa.table([pa.array(a, pa.string()) for a in arrays], schema=_SCHEMA)
                    parquet.write_table(table, row_group_size=len(captions))
                    row_groups[archive] = len(row_groups)
                    kept += len(captions)
            parquet.add_key_value_metadata({_ROW_GROUPS_KEY.decode(): json.dumps(row_groups)})
        return kept, duplicates

    def _spill(self) -> None:
        by_spill: dict[int, list[tuple[int, str, str]]] = {}
        for row in self._buffer:
            by_spill.setdefault(row[0] // self._rows_per_spill, []).append(row)
        self._buffer = []
        self._buffered_characters = 0
        schema = pa.schema([("ordinal", pa.int32()), ("key", pa.string()), ("caption", pa.string())])
        for number, rows in by_spill.items():
            if number not in self._spills:
                file = self._files.enter_context(pa.OSFile(str(self._spill_path(number)), "wb"))
                self._spills[number] = pa.ipc.new_stream(file, schema)
            columns = [pa.array(column, field.type) for column, field in zip(zip(*rows), schema)]  # noqa: B905
            self._spills[number].write_batch(pa.record_batch(columns, schema=schema))

    def _spill_path(self, number: int) -> Path:
        return self._scratch / f"spill-{number:02}.arrow"

    def __enter__(self) -> CaptionIndexWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


def read_captions(path: Path, archive: str) -> dict[str, str]:
    """The captions of one archive by key; empty where the index has none of it.

    Reads the file's footer and one row group.

    Raises:
        MdAssetsError: the file is missing or damaged.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            row_groups = json.loads(parquet.metadata.metadata[_ROW_GROUPS_KEY])
            if archive not in row_groups:
                return {}
            table = parquet.read_row_group(row_groups[archive])
            if table.schema.remove_metadata() != _SCHEMA or table["archive"].unique().to_pylist() != [archive]:
                raise ValueError(f"row group {row_groups[archive]} does not hold the captions of {archive}")
            return dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise MdAssetsError(
            f"the caption index {path} cannot be read: {error}", "Delete its .json and materialize annotations again"
        ) from error
