"""The rows of a file of captions, one at a time, whatever its format.

Here: upstream's formats, and rows that cannot be read. Not here: containers (`storage.archives`), what a row means
(`datasets/`), the index that is made of them (`storage.captions`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import pyarrow as pa

from md_assets.core.errors import CorruptArchiveError, MdAssetsError
from md_assets.core.spec import AnnotationFormat, AnnotationSource
from md_assets.storage.archives import iter_members, open_single_file, open_zip_member
from md_assets.storage.container import REFETCH, is_web_page
from md_assets.storage.parquet_members import open_parquet
from md_assets.storage.tar_members import GZIP_MAGIC

ROWS_TO_JUDGE_COLUMNS = 1_000
"""If none of the first rows has the columns, the file is of another format and is refused."""

MAX_ROW_BYTES = 16 * 2**20
"""A longer line or text is no row of captions; reading it whole could take any amount of memory."""

MAX_JSON_BYTES = 512 * 2**20
"""A JSON document is held in memory as a whole, at about 5 times its size. That of COCO's training split, the longest
of its caption files, has 67 MB."""

ROWS_AT_ONCE = 10_000
"""Rows of a parquet file decoded together; a few MB."""

Row: TypeAlias = "tuple[str, Any]"
"""How to call it (`line 5`), and its fields, or the exception that tells why it has none. Of a JSON line the fields are
whatever JSON is there."""


def iter_rows(path: Path, source: AnnotationSource, name: str) -> Iterator[Row]:
    """The rows of an annotations file in order.

    Args:
        path: a local file.
        source: its format, the file in it that counts, the columns that rows must have.
        name: what to call the file in an error.

    Raises:
        CorruptArchiveError: the file is cut off or broken.
        MdAssetsError: it does not have the columns.
    """
    return _with_columns(name, source.columns, _READERS[source.format](path, source, name))


def _with_columns(name: str, columns: Sequence[str], rows: Iterator[Row]) -> Iterator[Row]:
    missing = list(columns)
    count = 0
    for count, row in enumerate(rows, 1):
        if missing and isinstance(row[1], Mapping):
            missing = [column for column in missing if column not in row[1]]
        if missing and count == ROWS_TO_JUDGE_COLUMNS:
            break
        yield row
    if missing and count:
        raise _without(name, missing, f"in its first {count} rows")


def _without(name: str, missing: Sequence[str], where: str) -> MdAssetsError:
    return MdAssetsError(
        f"{name} has no column {', '.join(missing)} {where}",
        "Upstream changed its format; pin an older revision of the repository or report it",
    )


def _json_lines(path: Path, source: AnnotationSource, name: str) -> Iterator[Row]:
    with _open_lines(path) as lines:
        number = 0
        while line := lines.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                yield f"line {number}", ValueError(f"the line has more than {MAX_ROW_BYTES} bytes")
            elif line.strip():
                yield f"line {number}", _parsed(line)
            while line and not line.endswith(b"\n"):  # the rest of a long one
                line = lines.readline(MAX_ROW_BYTES + 1)


def _open_lines(path: Path) -> AbstractContextManager[IO[bytes]]:
    """A plain file as it is, the single file of a tar otherwise."""
    with path.open("rb") as file:
        start = file.read(512)
    # A tar's header has NULs.
    plain = start and b"\0" not in start and not start.startswith(GZIP_MAGIC) and not is_web_page(start)
    return cast("AbstractContextManager[IO[bytes]]", path.open("rb") if plain else open_single_file(path))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def _parquet(path: Path, source: AnnotationSource, name: str) -> Iterator[Row]:
    with open_parquet(path) as file:
        columns = list(source.columns)
        there = file.schema_arrow.names
        missing = [column for column in columns if column not in there]
        if missing:
            raise _without(name, missing, f"but {', '.join(there) or 'none'}")
        number = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False):
            for values in _values(batch.select(columns)):
                number += 1
                fields = values if isinstance(values, Exception) else dict(zip(columns, values, strict=True))
                yield f"row {number}", fields


def _values(batch: pa.RecordBatch) -> Iterator[tuple[Any, ...] | Exception]:
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except (ValueError, OverflowError):  # text that is not UTF-8, a time that Python has no date for
        for row in range(len(batch)):
            try:
                yield tuple(column[row].as_py() for column in batch.columns)
            except (ValueError, OverflowError) as error:
                yield error
    else:
        yield from zip(*columns, strict=True)


def _texts(path: Path, source: AnnotationSource, name: str) -> Iterator[Row]:
    for member in iter_members(path, "tar", MAX_ROW_BYTES):
        if member.refused:
            yield member.name, ValueError(f"it is refused: {member.refused}")
            continue
        try:
            yield member.name, {"name": member.name, "text": member.data.decode()}
        except UnicodeDecodeError as error:
            yield member.name, error


def _coco_captions(path: Path, source: AnnotationSource, name: str) -> Iterator[Row]:
    with open_zip_member(path, source.member) as file:
        text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise CorruptArchiveError(
                f"{source.member} in {name} has more than {MAX_JSON_BYTES} bytes", "Report it", reason="corrupt"
            )
    file_names: dict[Any, Any] = {}
    try:
        body = json.loads(text)
        del text
        annotations, images = body["annotations"], body["images"]
        if not isinstance(annotations, list) or not isinstance(images, list):
            raise TypeError("annotations or images are no list")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArchiveError(
            f"{source.member} in {name} is no file of COCO captions: {type(error).__name__}: {error}",
            REFETCH,
            reason="corrupt",
        ) from error
    for image in images:
        with suppress(KeyError, TypeError):  # captions of an image without ID or name are broken rows then
            file_names[image["id"]] = image["file_name"]
    for number, annotation in enumerate(annotations, 1):
        yield f"annotation {number}", _coco_row(annotation, file_names)


def _coco_row(annotation: Any, file_names: Mapping[Any, Any]) -> Any:
    try:
        image = annotation["image_id"]
        if image not in file_names:
            return ValueError(f"the file has no image {image!r}")
        caption = {"caption": annotation["caption"]} if "caption" in annotation else {}
    except (KeyError, TypeError) as error:
        return error
    return {"file_name": file_names[image], **caption}


_READERS: dict[AnnotationFormat, Callable[[Path, AnnotationSource, str], Iterator[Row]]] = {
    "json_lines": _json_lines,
    "parquet": _parquet,
    "texts": _texts,
    "coco_captions": _coco_captions,
}
