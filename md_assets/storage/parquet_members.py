"""Parquet files whose rows are samples, an image and its columns each.

Here: rows as members, and the file's integrity. Not here: other containers, see `storage.archives`; the index of
captions, see `storage.captions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.names import refused_name, safe_name
from md_assets.core.spec import Member, ParquetLayout
from md_assets.storage.container import Broken, broken_as_corrupt, is_web_page

ROWS_AT_ONCE = 16
"""Decoded together. The file decides more: a page is unpacked as a whole, so the largest page of the image column is
in memory twice. Hugging Face's `datasets` writes row groups, and thereby pages, of 100 images."""

_READ_BYTES = 1 << 16
"""Of a column at once; without it pyarrow reads a row group's column as a whole."""

_MAGIC = b"PAR1"
"""At the beginning and at the end (parquet-format, README, section File format)."""


def parquet_members(
    path: Path, layout: ParquetLayout, max_member_bytes: int, on_position: Callable[[int], None] | None = None
) -> Iterator[Member]:
    """The rows of a parquet file as members; see `storage.archives.iter_members`.

    Args:
        path, max_member_bytes, on_position: see there; the position is the share of the rows.
        layout: the columns. A name that is no text is spelled as Python does it.

    A row without name is refused and called `row 12`, counted from 1. A row without image has empty data.
    """
    size_bytes = path.stat().st_size
    with open_parquet(path) as file:
        image = _image_column(path, file.schema_arrow, layout)
        count = file.metadata.num_rows
        number = 0
        columns = [image, layout.name, *layout.others]
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            for row in range(len(batch)):
                number += 1
                if on_position:
                    on_position(size_bytes * number // max(count, number))
                yield _member(batch, row, number, layout, max_member_bytes)
        if number != count:
            raise Broken("corrupt", f"it has {number} rows and should have {count}")


def _image_column(path: Path, schema: pa.Schema, layout: ParquetLayout) -> str:
    """What pyarrow calls the column of the image's bytes."""
    missing = [column for column in (layout.image, layout.name, *layout.others) if column not in schema.names]
    if missing:
        raise CorruptArchiveError(
            f"{path.name} has no column {', '.join(missing)}; it has {', '.join(schema.names) or 'none'}",
            "Upstream changed its format; pin an older revision of the repository or report it",
            reason="corrupt",
        )
    kind = schema.field(layout.image).type
    column = layout.image
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
        column = f"{column}.bytes"
    if not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
        raise Broken("corrupt", f"its column {layout.image} is {kind} and holds no images")
    return column


def _member(batch: pa.RecordBatch, row: int, number: int, layout: ParquetLayout, max_member_bytes: int) -> Member:
    spelled = _name(batch.column(layout.name), row)
    if spelled is None:
        return Member(f"row {number}", b"", Reason.UNSAFE_MEMBER)
    name = safe_name(spelled)
    if name is None:
        return Member(refused_name(spelled), b"", Reason.UNSAFE_MEMBER)
    images = batch.column(layout.image)
    if pa.types.is_struct(images.type):
        images = images.field("bytes")
    data = images[row].as_buffer()
    if data is None:
        data = b""
    if len(data) > max_member_bytes:
        return Member(name, b"", Reason.TOO_LARGE)
    try:
        fields = {column: batch.column(column)[row].as_py() for column in layout.others}
    except (ValueError, OverflowError):  # text that is not UTF-8, a time that Python has no date for
        return Member(name, b"", Reason.UNREADABLE_MEMBER)
    return Member(name, bytes(data), fields=fields)


def _name(names: pa.Array, row: int) -> str | None:
    if pa.types.is_string(names.type) or pa.types.is_large_string(names.type):
        # Bytes that are not UTF-8 come as surrogates, which safe_name encodes.
        spelled = names[row].as_buffer()
        return None if spelled is None else spelled.to_pybytes().decode("utf-8", "surrogateescape")
    value: Any = names[row].as_py()
    return None if value is None else str(value)


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file to be read in batches, its checksums verified where it has any.

    Raises:
        CorruptArchiveError: it is cut off or broken, which may be found only when it is read to its end.
    """
    with broken_as_corrupt(path.name, "parquet file"):
        _check_magic(path)
        try:
            with pq.ParquetFile(
                path, buffer_size=_READ_BYTES, pre_buffer=False, page_checksum_verification=True
            ) as file:
                yield file
        except OSError as error:
            if error.errno is not None:  # of the disk; pyarrow's own has none
                raise
            raise Broken("corrupt", str(error)) from error
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise Broken("corrupt", str(error)) from error


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(512)
        file.seek(max(path.stat().st_size - len(_MAGIC), 0))
        end = file.read()
    if not start:
        raise Broken("truncated", "it is empty")
    if not start.startswith(_MAGIC[: len(start)]):
        page = is_web_page(start)
        raise Broken("not_an_archive", "it is a web page" if page else f"it does not begin with {_MAGIC.decode()}")
    if end != _MAGIC or len(start) < 3 * len(_MAGIC):
        raise Broken("truncated", "it is cut off")
