"""Tar archives, plain or gzipped, read once from front to back.

Here: entries, their integrity, and a single file in a tar. Not here: other containers, see `storage.archives`; our own
raw tars, see `storage.raw_tar`.

tarfile reads the headers, except those of plain files, nearly all there are: with tarfile alone 11 million one-line
files take 20 minutes, so these are read here, by the same rules (POSIX.1-1988, ustar). isal unpacks gzip in a quarter
of the standard library's time.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from isal import igzip, isal_zlib

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.names import refused_name, safe_name
from md_assets.core.spec import Member
from md_assets.storage.container import BLOCK_BYTES, REFETCH, Broken, broken_as_corrupt, is_web_page

# isal's own types are incomplete.
_gunzip: Any = igzip.GzipFile
_IsalError = cast("type[Exception]", isal_zlib.error)

GZIP_MAGIC = b"\x1f\x8b"
"""RFC 1952, section 2.3.1."""

_MAX_TAR_BYTES = 2**40
"""A header that makes a tar longer than this, unpacked, is damaged: the largest of any source has 11 GB. Skipping to
the end that it promises would take years."""

_MAX_HEADER_BYTES = 2**20
"""A long name or a pax header of more is damaged; tarfile would read it into memory whatever its size."""


def tar_members(
    path: Path,
    max_member_bytes: int,
    on_position: Callable[[int], None] | None = None,
    digest: hashlib._Hash | None = None,
) -> Iterator[Member]:
    """The files of a tar; see `storage.archives.iter_members`.

    Args:
        digest: is given all bytes of the file by the time that its last member was taken.
    """
    with _open_tar(path, digest) as (tar, file):
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
    if info.sparse is None:
        return Member(name, _exactly(cast(_ForwardStream, tar.fileobj), info.size))
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
            raise CorruptArchiveError(f"{path.name} holds no file", REFETCH, reason="corrupt")


class _ForwardStream:
    """As much of a file as tarfile needs, only forwards, from a stream that is read in large blocks."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._block = b""
        self._block_start = 0
        self._at = 0  # in the block

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        end = self._at + size
        if self._at <= end <= len(self._block):
            data = self._block[self._at : end]
            self._at = end
            return data
        if size < 0:
            raise Broken("corrupt", f"an entry of {size} bytes")
        parts = [self._block[self._at :]]
        missing = size - len(parts[0])
        self._block_start += len(self._block)
        self._block, self._at = b"", 0
        while missing > 0 and (block := self._stream.read(BLOCK_BYTES)):
            parts.append(block[:missing])
            missing -= len(parts[-1])
            if missing <= 0:
                self._block, self._at = block, len(parts[-1])
            else:
                self._block_start += len(block)
        return b"".join(parts)

    def tell(self) -> int:
        return self._block_start + self._at

    def seek(self, position: int) -> int:
        """Skips to `position`, or to the end if that comes first."""
        missing = position - self.tell()
        if missing < 0:
            raise Broken("corrupt", "an entry begins before the end of the one before it")
        while missing > 0 and (skipped := len(self.read(min(missing, BLOCK_BYTES)))):
            missing -= skipped
        return self.tell()

    def seekable(self) -> bool:
        return False


def _exactly(stream: _ForwardStream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise Broken("truncated", "it is cut off")
    return data


def _text(field: bytes | bytearray, encoding: str, errors: str) -> str:
    return field.partition(b"\0")[0].decode(encoding, errors)


class _CompleteTarInfo(tarfile.TarInfo):
    """Headers of a tar that must be complete.

    tarfile takes a header that is cut off or damaged for the end of the archive, so a truncated tar would
    pass for a shorter one. A complete tar ends with a block of zeros (POSIX.1-1988); anything else is an error.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        info = cls._plain_file(buf, encoding, errors) or super().frombuf(buf, encoding, errors)
        if info.type in _HEADERS_OF_HEADERS and info.size > _MAX_HEADER_BYTES:
            raise Broken("corrupt", f"a header of {info.size} bytes")
        return info

    @classmethod
    def _plain_file(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        """The header of a plain file as nearly all are spelled, in a fifth of the time; None for any other."""
        size, checksum = buf[124:135], buf[148:154]
        if buf[156:157] != tarfile.REGTYPE or len(buf) != tarfile.BLOCKSIZE:
            return None
        if buf[135] not in b"\0 " or buf[154:156] != b"\0 ":
            return None
        info = cls(_text(buf[:100], encoding, errors))
        try:
            info.size = int(size, 8)
            if int(checksum, 8) != sum(buf) - sum(buf[148:156]) + sum(b" " * 8):
                return None
        except ValueError:
            return None
        if prefix := _text(buf[345:500], encoding, errors):
            info.name = f"{prefix}/{info.name}"
        return info

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise Broken("truncated", "it is cut off") from error
        except tarfile.HeaderError as error:
            at_start = tar.offset == 0
            raise Broken("not_an_archive" if at_start else "corrupt", str(error)) from error


_HEADERS_OF_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All entries in order; each is worth something until the next one is asked for."""
    entries = iter(tar)
    while True:
        with _header_errors():
            info = next(entries, None)
        if info is None:
            return
        if info.size < 0 or tar.offset > _MAX_TAR_BYTES:
            raise Broken("corrupt", f"an entry of {info.size} bytes")
        yield info
        tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every header it saw


@contextmanager
def _header_errors() -> Iterator[None]:
    """What tarfile raises, undocumented, on headers that it does not expect."""
    try:
        yield
    except (LookupError, ValueError, ArithmeticError, RecursionError) as error:
        raise Broken("corrupt", f"a header makes no sense ({error})") from error


def _check_end(tar: tarfile.TarFile) -> None:
    """Only zeros may follow the end mark: it is itself a block of zeros, which a hole in a file has too."""
    rest = cast(IO[bytes], tar.fileobj)
    while block := rest.read(BLOCK_BYTES):
        if block.count(0) != len(block):
            raise Broken("corrupt", "there is something behind its end mark")


class _Digested:
    """A file of which a digest is given all that is read."""

    def __init__(self, file: IO[bytes], digest: hashlib._Hash) -> None:
        self._file, self._digest = file, digest

    def read(self, size: int) -> bytes:
        block = self._file.read(size)
        self._digest.update(block)
        return block


@contextmanager
def _open_tar(path: Path, digest: hashlib._Hash | None = None) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
    """A tar to be read once from front to back, and the file below it, whose position tells progress.

    Leaving the block normally reads to the end of the file, so that gzip's checksum is verified too.
    """
    with broken_as_corrupt(path.name, "tar"), path.open("rb") as file:
        try:
            start = file.read(512)
            file.seek(0)
            if not start:
                raise Broken("truncated", "it is empty")
            if is_web_page(start) and start[257:262] != tarfile.POSIX_MAGIC[:5]:
                raise Broken("not_an_archive", "it is a web page")
            below = cast(IO[bytes], _Digested(file, digest)) if digest else file
            stream = cast(IO[bytes], _gunzip(fileobj=below)) if start.startswith(GZIP_MAGIC) else below
            with _header_errors():
                # errors: names that are not UTF-8 come as surrogates, which safe_name encodes.
                tar = tarfile.TarFile(
                    fileobj=cast(IO[bytes], _ForwardStream(stream)),
                    tarinfo=_CompleteTarInfo,
                    encoding="utf-8",
                    errors="surrogateescape",
                )
            yield tar, file
            _check_end(tar)
        except EOFError as error:
            raise Broken("truncated", "it is cut off") from error
        except tarfile.ReadError as error:
            cut = "unexpected end of data" in str(error)
            raise Broken("truncated" if cut else "corrupt", str(error)) from error
        except (tarfile.TarError, _IsalError, igzip.BadGzipFile) as error:
            raise Broken("corrupt", str(error)) from error
