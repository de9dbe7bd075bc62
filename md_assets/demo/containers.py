"""Archive files in the formats of the sources; the same members give the same bytes.

Here: writing them for the miniature sources and tests. Not here: what is in them (`demo.miniatures`), reading them
(`storage.archives`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

Entry = tuple[str, "bytes | None"]
"""Name and content of a member; None makes a symbolic link that leads out of the archive."""

LINK_TARGET = "../../../etc/passwd"

_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
"""The earliest that the format can say."""


def write_tar(path: Path, members: Iterable[Entry]) -> None:
    """Write a plain tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        _write_tar(file, members)


def write_tgz(path: Path, members: Iterable[Entry]) -> None:
    """Write a gzipped tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=1) as stream,
    ):
        _write_tar(cast(IO[bytes], stream), members)


def _write_tar(stream: IO[bytes], members: Iterable[Entry]) -> None:
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, LINK_TARGET
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_zip(path: Path, members: Iterable[Entry]) -> None:
    """Write a zip whose members are stored as they are, as images are in the sources' zips."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name, _ZIP_DATE)
            info.create_system = 3  # Unix, so that the upper half of external_attr is its mode
            info.external_attr = (0o120777 if data is None else 0o100644) << 16
            archive.writestr(info, LINK_TARGET if data is None else data)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], schema: Any, row_group_size: int = 8) -> None:
    """Write rows as a table of several row groups; `schema` is pyarrow's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema), path, row_group_size=row_group_size)


def write_md5_beside(path: Path) -> None:
    """Write `<path>.md5` as `md5sum` does."""
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    path.with_name(f"{path.name}.md5").write_text(f"{digest}  {path.name}\n")
