"""Archives as any program, or nobody, would write them: made byte by byte for tests of the readers."""

import gzip
import io
import stat
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from md_assets.core.names import safe_name
from md_assets.core.spec import ArchiveFormat, ParquetLayout

# tar


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a tar; `fields` are of its header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar_of(*entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, errors="surrogateescape") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def fit_checksum(data: bytearray, start: int = 0) -> None:
    """Makes the header at `start` say its own sum."""
    header = data[start : start + 512]
    header[148:156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(header)


def as_tarfile_reads(data: bytes) -> list[tuple[str, bytes]]:
    """Names, as far as they are safe, and content of the plain files before the first header that tarfile refuses."""
    found = []
    with (
        suppress(tarfile.ReadError),
        tarfile.open(fileobj=io.BytesIO(data), mode="r|", encoding="utf-8", errors="surrogateescape") as tar,
    ):
        for info in tar:
            name, content = safe_name(info.name), tar.extractfile(info) if info.isreg() else None
            if name and content:
                found.append((name, content.read()))
    return found


# zip

STORED, DEFLATED = 0, 8
ENCRYPTED, SIZES_BEHIND_DATA, UTF_8 = 1 << 0, 1 << 3, 1 << 11


@dataclass
class ZipEntry:
    """A member of a zip.

    Attributes:
        name: as spelled; bytes where it is not UTF-8.
        data: unpacked.
        mode: of Unix.
        method, flags: as the format numbers them. Data of an unknown method lie there as they are.
        packed: what lies in the archive instead of `data`.
        told: fields of both headers that are not true: `crc`, `packed_bytes`, `full_bytes`.
        told_locally: those of the local header, besides `name`, `method`, `flags` and `signature`.
        extra: extra field of both headers.
        at: where the directory says that it lies, instead of where it does.
    """

    name: str | bytes
    data: bytes = b""
    mode: int = stat.S_IFREG | 0o644
    method: int = DEFLATED
    flags: int = 0
    packed: bytes | None = None
    told: Mapping[str, int] = field(default_factory=dict)
    told_locally: Mapping[str, Any] = field(default_factory=dict)
    extra: bytes = b""
    at: int | None = None

    @property
    def raw_name(self) -> bytes:
        return self.name.encode() if isinstance(self.name, str) else self.name

    def packed_data(self) -> bytes:
        if self.packed is not None:
            return self.packed
        if self.method != DEFLATED:
            return self.data
        deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        return deflate.compress(self.data) + deflate.flush()

    def values(self) -> dict[str, Any]:
        sizes = {"packed_bytes": len(self.packed_data()), "full_bytes": len(self.data)}
        return {"crc": zlib.crc32(self.data), **sizes, **self.told}


def zip_of(*entries: ZipEntry, front: bytes = b"", comment: bytes = b"", count: int | None = None) -> bytes:
    """A zip whose offsets begin behind `front`."""
    body, directory = b"", b""
    for e in entries:
        said = e.values()
        behind = bool(e.flags & SIZES_BEHIND_DATA)
        local: dict[str, Any] = {"name": e.raw_name, "method": e.method, "flags": e.flags, "signature": b"PK\3\4"}
        local |= dict.fromkeys(said, 0) if behind else said
        local |= e.told_locally
        at = len(body) if e.at is None else e.at
        numbers = local["crc"], local["packed_bytes"], local["full_bytes"], len(local["name"]), len(e.extra)
        body += struct.pack("<4s5H3L2H", local["signature"], 20, local["flags"], local["method"], 0, 33, *numbers)
        body += local["name"] + e.extra + e.packed_data()
        if behind:
            body += b"PK\7\x08" + struct.pack("<3L", *said.values())
        numbers = *said.values(), len(e.raw_name), len(e.extra)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 0x314, 20, e.flags, e.method, 0, 33, *numbers, *(0, 0, 0),
                                 e.mode << 16, at)  # fmt: skip
        directory += e.raw_name + e.extra
    count = len(entries) if count is None else count
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), len(comment))
    return front + body + directory + end + comment


# parquet


def table_of(rows: Sequence[Mapping[str, Any]], **types: pa.DataType) -> pa.Table:
    """A table; columns that `types` does not name have the type that pyarrow finds."""
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in rows[0]}
    return pa.table(columns)


def parquet_of(table: pa.Table, **options: Any) -> bytes:
    """A file as the Hub's are: row groups of few rows, and pages with checksums unless `options` say otherwise."""
    file = io.BytesIO()
    pq.write_table(table, file, **{"row_group_size": 3, "write_page_checksum": True, **options})
    return file.getvalue()


def not_utf_8(*values: bytes) -> pa.Array:
    """A column of text whose bytes are what they are."""
    binary = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), binary.buffers())


# Any of them

LAYOUT = ParquetLayout(image="image", name="name", others=("caption",))
"""Of the parquet files made here."""

CONTAINERS: dict[str, ArchiveFormat] = {"tar": "tar", "tgz": "tar", "zip": "zip", "parquet": "parquet"}
"""What an archive may be called -> its format."""


def archive_of(container: str, members: Sequence[tuple[str, bytes]], captions: Sequence[str | None] = ()) -> bytes:
    """An archive with these members; captions only a parquet file can hold, beside the member of the same number."""
    if container == "parquet":
        rows = [(*member, caption) for member, caption in zip_longest(members, captions)]
        schema = pa.schema([("name", pa.string()), ("image", pa.binary()), ("caption", pa.string())])
        return parquet_of(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema))
    if container == "zip":
        return zip_of(*(ZipEntry(*member) for member in members))
    tar = tar_of(*(entry(*member) for member in members))
    return gzip.compress(tar, 1, mtime=0) if container == "tgz" else tar
