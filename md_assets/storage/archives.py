"""Reading archives member by member: nothing is extracted to disk and no member name is trusted.

Here: containers (tar, plain or gzipped), their integrity, safe names, refused members, and a single file in a tar.
Not here: which members are samples (`datasets/`), what is in an image (`storage.images`), our own raw tars
(`storage.raw_tar`).
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.names import refused_name, safe_name
from md_assets.core.spec import ArchiveFormat, Member

GZIP_MAGIC = b"\x1f\x8b"
"""RFC 1952, section 2.3.1."""

_MAX_TAR_BYTES = 2**40
"""A header that makes a tar longer than this, unpacked, is damaged: the largest of any source has 11 GB. tarfile
would skip to the end that it promises, block by block, for years."""

_MAX_HEADER_BYTES = 2**20
"""A long name or a pax header of more is damaged; tarfile would read it into memory whatever its size."""

_BLOCK_BYTES = 1 << 20

_REFETCH = "Run the archive again; if it stays so, the file is broken at its source"


def iter_members(
    path: Path,
    archive_format: ArchiveFormat,
    max_member_bytes: int,
    on_position: Callable[[int], None] | None = None,
) -> Iterator[Member]:
    """The files of an archive in order, folders left out.

    Args:
        path: a local file.
        archive_format: its container.
        max_member_bytes: a larger member is refused without being read.
        on_position: called with the bytes of `path` consumed so far, once a member.

    Raises:
        CorruptArchiveError: the container is cut off or broken. Members that came before are then worth
            nothing either, because how many are missing is unknown; callers must drop what they made.
    """
    if archive_format != "tar":
        raise NotImplementedError(archive_format)
    with _open_tar(path) as (tar, file):
        for info in _entries(tar):
            if on_position:
                on_position(file.tell())
            if not info.isdir():
                yield _member(tar, info, max_member_bytes)


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, max_member_bytes: int) -> Member:
    name = safe_name(info.name)
    if name is None or not info.isreg():
        return Member(name or refused_name(info.name), b"", Reason.UNSAFE_MEMBER)
    if info.size > max_member_bytes:
        return Member(name, b"", Reason.TOO_LARGE)
    content = tar.extractfile(info)
    assert content is not None  # isreg() was checked
    return Member(name, content.read())


@contextmanager
def open_single_file(path: Path) -> Iterator[IO[bytes]]:
    """The only file of a tar (plain or gzipped) as a stream, e.g. a JSON-lines file of annotations.

    Raises:
        CorruptArchiveError: the container is broken, or does not hold exactly one file. Both may be found
            only when the stream is read to its end.
    """
    with _open_tar(path) as (tar, _):
        found = False
        for info in _entries(tar):
            if not info.isreg():
                continue
            if found:
                raise CorruptArchiveError(f"{path.name} holds more than one file", "Report it", reason="corrupt")
            found = True
            content = tar.extractfile(info)
            assert content is not None
            yield content
        if not found:
            raise CorruptArchiveError(f"{path.name} holds no file", _REFETCH, reason="corrupt")


class _CompleteTarInfo(tarfile.TarInfo):
    """Headers of a tar that must be complete.

    tarfile takes a header that is cut off or damaged for the end of the archive, so a truncated tar would
    pass for a shorter one. A complete tar ends with a block of zeros (POSIX.1-1988); anything else is an error.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _HEADERS_OF_HEADERS and info.size > _MAX_HEADER_BYTES:
            raise _Broken("corrupt", f"a header of {info.size} bytes")
        return info

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise _Broken("truncated", "it is cut off") from error
        except tarfile.HeaderError as error:
            at_start = tar.offset == 0
            raise _Broken("not_an_archive" if at_start else "corrupt", str(error)) from error


_HEADERS_OF_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class _Broken(Exception):
    def __init__(self, reason: str, what: str) -> None:
        self.reason = reason
        super().__init__(what)


def _entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All entries in order; each is worth something until the next one is asked for."""
    entries = iter(tar)
    while True:
        with _header_errors():
            info = next(entries, None)
        if info is None:
            return
        if info.size < 0 or tar.offset > _MAX_TAR_BYTES:
            raise _Broken("corrupt", f"an entry of {info.size} bytes")
        yield info
        tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every header it saw


@contextmanager
def _header_errors() -> Iterator[None]:
    """What tarfile raises, undocumented, on headers that it does not expect."""
    try:
        yield
    except (LookupError, ValueError, ArithmeticError, RecursionError) as error:
        raise _Broken("corrupt", f"a header makes no sense ({error})") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """Only zeros may follow the end mark: it is itself a block of zeros, which a hole in a file has too."""
    rest = cast(IO[bytes], tar.fileobj)
    while block := rest.read(_BLOCK_BYTES):
        if block.count(0) != len(block):
            raise _Broken("corrupt", "there is something behind its end mark")


@contextmanager
def _open_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
    """A tar to be read once from front to back, and the file below it, whose position tells progress.

    Leaving the block normally reads to the end of the file, so that gzip's checksum is verified too.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
            file.seek(0)
            if not start:
                raise _Broken("truncated", "it is empty")
            if start.lstrip()[:1] == b"<" and start[257:262] != tarfile.POSIX_MAGIC[:5]:
                raise _Broken("not_an_archive", "it is a web page")
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if start.startswith(GZIP_MAGIC) else file
            with _header_errors():
                # errors: names that are not UTF-8 come as surrogates, which safe_name encodes.
                tar = tarfile.open(  # noqa: SIM115 (it holds nothing that must be closed)
                    fileobj=stream,
                    mode="r|",
                    tarinfo=_CompleteTarInfo,
                    encoding="utf-8",
                    errors="surrogateescape",
                    bufsize=_BLOCK_BYTES,
                )
            yield tar, file
            _check_end(tar)
    except EOFError as error:
        raise CorruptArchiveError(f"{path.name} is cut off", _REFETCH, reason="truncated") from error
    except _Broken as error:
        raise CorruptArchiveError(f"{path.name} is no usable tar: {error}", _REFETCH, reason=error.reason) from error
    except tarfile.ReadError as error:
        reason = "truncated" if "unexpected end of data" in str(error) else "corrupt"
        raise CorruptArchiveError(f"{path.name} is no usable tar: {error}", _REFETCH, reason=reason) from error
    except (tarfile.TarError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptArchiveError(f"{path.name} is damaged: {error}", _REFETCH, reason="corrupt") from error
