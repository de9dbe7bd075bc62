"""The caption index: a parquet file from which one archive's captions are read without scanning the rest.

Rows are sorted by place: the archive's ID or, where upstream does not tell the archive, the sample's number. About
16,000 of them make a row group, and the file's metadata say which places are in which. So a reader needs the footer,
which stays small, and the one or few row groups with its places, however long the table is.

Upstream's rows come in any order, so they are first spread over spill files by place; memory holds one buffer and one
spill file's rows.

Here: the file. Not here: upstream's formats (`storage.annotation_rows`), broken rows (`stages.annotations`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from md_assets.core.errors import MdAssetsError

Place: TypeAlias = "str | int"
"""Where a caption belongs: an archive's ID, or a sample's number."""

INDEX_VERSION = 2
"""Raised when the file's layout changes, so that older indexes are made anew."""

ROW_GROUP_ROWS = 16_384
"""Rows of a row group at least; one ends where the place changes. 14 million rows make 850, whose footer is parsed in
3 ms, and one is read in 4 ms; of 8,192 or 65,536 rows it takes as long or longer together."""

SPILL_FILES = 128
"""Spill files for one index at most: a table of 14 million rows needs 1/128 of them in memory at a time."""

NUMBERS_PER_SPILL = 2**17
"""Numbers in one spill file: 11 million captions make 86. The last one takes all numbers from 16.6 million on."""

MAX_NUMBER = 2**63 - 1
"""The largest number that a sample may have: an int64."""

BUFFERED_ROWS = 100_000
"""Rows held in memory before they are spilled; about 30 MB of captions."""

BUFFERED_CHARACTERS = 50_000_000
"""Characters of captions held in memory before they are spilled, however few the rows."""

NAN = float("nan")

_ROW_GROUPS_KEY = b"md_assets.row_groups"
_TEXT = pa.large_string()  # with string, 2 GiB of captions in one spill file would overflow


def _schema(numbered: bool, scored: bool) -> pa.Schema:
    place = ("number", pa.int64()) if numbered else ("archive", _TEXT)
    scores = [("unsafe", pa.float32())] if scored else []
    return pa.schema([place, ("key", _TEXT), ("caption", _TEXT), *scores])


_SCHEMAS = [_schema(numbered, scored) for numbered in (False, True) for scored in (False, True)]


class IndexedCaption(NamedTuple):
    """A row of the index.

    Attributes:
        key: as `core.spec.Caption` has it.
        text: the caption.
        unsafe: float32, NaN where the row has no score; None in an index without scores.
    """

    key: str
    text: str
    unsafe: float | None


class CaptionIndexWriter:
    """Builds one index.

    Args:
        path: a new file.
        scratch: an empty directory for spill files, removed by the caller.
        archives: all archive IDs that rows may have; None where places are numbers.
        scored: whether rows have safety scores.

    Used as a context manager; the file is complete when `finish` returns. The same rows in the same order give the
    same bytes.
    """

    def __init__(self, path: Path, scratch: Path, archives: Sequence[str] | None, scored: bool = False) -> None:
        self._path = path
        self._scratch = scratch
        # As text sorts, so that whoever filters the file by archive gains from its order too.
        self._archives = sorted(archives) if archives is not None else None
        self._ordinal = {archive: number for number, archive in enumerate(self._archives or ())}
        self._places_per_spill = max(1, -(-len(self._ordinal) // SPILL_FILES)) if archives else NUMBERS_PER_SPILL
        self._schema = _schema(numbered=archives is None, scored=scored)
        self._spill_schema = self._schema.set(0, pa.field("place", pa.int64()))
        self._files = ExitStack()
        self._spills: dict[int, Any] = {}
        self._buffer: list[tuple[int, str, str, float]] = []
        self._buffered_characters = 0

    def add(self, place: Place, key: str, text: str, unsafe: float | None = None) -> None:
        """Take one row.

        Args:
            place: the archive's ID or the sample's number, from 0 to `MAX_NUMBER`.
            key, text: see `IndexedCaption`.
            unsafe: the score, None counts as NaN; not used in an index without scores.

        Raises:
            KeyError: the archive is none of the dataset's.
        """
        number = self._ordinal[place] if isinstance(place, str) else place
        self._buffer.append((number, key, text, NAN if unsafe is None else unsafe))
        self._buffered_characters += len(text)
        if len(self._buffer) >= BUFFERED_ROWS or self._buffered_characters >= BUFFERED_CHARACTERS:
            self._spill()

    def finish(self) -> tuple[int, list[str]]:
        """Write the index.

        Returns: the number of rows kept, and the key of each row left out because an earlier one of the same place has
            the same.
        """
        self._spill()
        for writer in self._spills.values():
            writer.close()
        kept = 0
        duplicates: list[str] = []
        row_groups: list[tuple[Place, Place, int]] = []
        place_column = self._schema.names[0]
        with pq.ParquetWriter(
            self._path,
            self._schema,
            compression="zstd",
            use_dictionary=[place_column],
            write_statistics=[place_column],
            write_page_checksum=True,
        ) as parquet:
            for number in sorted(self._spills):
                table, left_out = _sorted_by_place(self._spill_path(number))
                kept += len(table)
                duplicates += left_out
                for rows in _row_groups(table):
                    rows = self._with_names(rows)
                    parquet.write_table(rows, row_group_size=len(rows))
                    row_groups.append((rows[0][0].as_py(), rows[0][-1].as_py(), len(rows)))
            told = json.dumps(row_groups)
            checked = json.dumps({"crc32": zlib.crc32(told.encode()), "first_last_rows": told})
            parquet.add_key_value_metadata({_ROW_GROUPS_KEY.decode(): checked})
        return kept, duplicates

    def _with_names(self, rows: pa.Table) -> pa.Table:
        """Rows as the index stores them, ordinals replaced by archives."""
        places = rows.column(0)
        if self._archives is not None:
            places = pa.chunked_array([pa.array(self._archives, _TEXT).take(places.combine_chunks())])
        return pa.table([places, *rows.columns[1:]], schema=self._schema)

    def _spill(self) -> None:
        if not self._buffer:
            return
        fields = self._spill_schema
        columns = zip(fields, zip(*self._buffer))  # noqa: B905 (scores are in the buffer even where there are none)
        batch = pa.record_batch([pa.array(column, field.type) for field, column in columns], schema=fields)
        self._buffer = []
        self._buffered_characters = 0
        spills = np.minimum(batch.column(0).to_numpy() // self._places_per_spill, SPILL_FILES - 1)
        order = np.argsort(spills, kind="stable")
        batch = batch.take(pa.array(order))
        bounds = [0, *(np.flatnonzero(np.diff(spills[order])) + 1).tolist(), len(order)]
        for start, end in pairwise(bounds):
            number = int(spills[order[start]])
            if number not in self._spills:
                file = self._files.enter_context(pa.OSFile(str(self._spill_path(number)), "wb"))
                compressed = pa.ipc.IpcWriteOptions(compression="lz4")
                self._spills[number] = pa.ipc.new_stream(file, fields, options=compressed)
            self._spills[number].write_batch(batch.slice(start, end - start))

    def _spill_path(self, number: int) -> Path:
        return self._scratch / f"spill-{number:03}.arrow"

    def __enter__(self) -> CaptionIndexWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()


def _sorted_by_place(spill: Path) -> tuple[pa.Table, list[str]]:
    """A spill file's rows by place and then as they came, without those whose place and key an earlier one has, and the
    keys of the latter."""
    with pa.OSFile(str(spill)) as file, pa.ipc.open_stream(file) as batches:
        table = batches.read_all()
    places = table["place"].to_numpy()
    keys = table["key"].combine_chunks().dictionary_encode()
    _, place_codes = np.unique(places, return_inverse=True)
    _, first = np.unique(place_codes * len(keys.dictionary) + keys.indices.to_numpy(), return_index=True)
    first.sort()
    left_out = np.ones(len(table), dtype=bool)
    left_out[first] = False
    order = first[np.argsort(places[first], kind="stable")]
    return table.take(pa.array(order)), table["key"].filter(pa.array(left_out)).to_pylist()


def _row_groups(table: pa.Table) -> Iterator[pa.Table]:
    """Sorted rows in pieces of at least `ROW_GROUP_ROWS`, a place never in two."""
    places = table.column(0).to_numpy()
    start = 0
    while start < len(table):
        last = min(start + ROW_GROUP_ROWS, len(table)) - 1
        end = int(np.searchsorted(places, places[last], side="right"))
        yield table.slice(start, end - start)
        start = end


def read_captions(path: Path, archive: str) -> dict[str, IndexedCaption]:
    """The captions of one archive by key; empty where the index has none of it.

    Reads the file's footer and one row group.

    Raises:
        MdAssetsError: the file is missing or damaged.
    """
    return {caption.key: caption for caption in _rows(path, archive, archive)}


def read_numbered_captions(path: Path, first: int, last: int) -> Iterator[IndexedCaption]:
    """The captions of the samples with these numbers, both included, in their order.

    Reads the file's footer and the row groups that have such numbers; holds one at a time.

    Raises:
        MdAssetsError: the file is missing or damaged.
    """
    return _rows(path, first, last)


def _rows(path: Path, first: Any, last: Any) -> Iterator[IndexedCaption]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            for group, (group_first, group_last, rows) in enumerate(_told_row_groups(parquet)):
                if group_last < first or last < group_first:
                    continue
                table = parquet.read_row_group(group, use_threads=False)
                if table.schema.remove_metadata() not in _SCHEMAS:
                    raise ValueError("its columns are not those of an index")
                places = table.column(0)
                if [places[0].as_py(), places[-1].as_py(), len(table)] != [group_first, group_last, rows]:
                    raise ValueError(f"row group {group} does not hold the captions of {group_first} to {group_last}")
                found = table.filter(pc.and_(pc.greater_equal(places, first), pc.less_equal(places, last)))
                columns = [column.to_pylist() for column in found.columns[1:]]
                if len(columns) == 2:
                    columns.append([None] * len(found))
                yield from map(IndexedCaption, *columns)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise MdAssetsError(
            f"the caption index {path} cannot be read: {error}", "Delete its .json and materialize annotations again"
        ) from error


def _told_row_groups(parquet: pq.ParquetFile) -> list[tuple[Any, Any, int]]:
    """First place, last place and rows of each row group, as the file's metadata say; they have a checksum of their
    own, because a footer has none."""
    metadata = json.loads(parquet.metadata.metadata[_ROW_GROUPS_KEY])
    told: str = metadata["first_last_rows"]
    row_groups: list[tuple[Any, Any, int]] = json.loads(told)
    if zlib.crc32(told.encode()) != metadata["crc32"] or len(row_groups) != parquet.num_row_groups:
        raise ValueError("its footer is damaged")
    return row_groups
