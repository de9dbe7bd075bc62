"""Zip archives, read in the order of their directory.

Here: entries, their integrity, and a single file in a zip. Not here: other containers, see `storage.archives`.

The format is PKWARE's APPNOTE 6.3.10. zipfile is not used: it refuses a whole archive for one name that is not UTF-8,
takes names for one that differ behind a NUL, lets entries overlap, and keeps all it knows of every entry in memory.
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.names import refused_name, safe_name
from md_assets.core.spec import Member
from md_assets.storage.container import BLOCK_BYTES, Broken, broken_as_corrupt, is_web_page

_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\x05\x06"
_END_64 = struct.Struct("<4sQ2H2L4Q")
_END_64_SIGNATURE = b"PK\x06\x06"
_LOCATOR_64 = struct.Struct("<4sLQL")
_LOCATOR_64_SIGNATURE = b"PK\x06\x07"
_ENTRY = struct.Struct("<4s6H3L5H2L")
_ENTRY_SIGNATURE = b"PK\x01\x02"
_LOCAL = struct.Struct("<4s5H3L2H")
_LOCAL_SIGNATURE = b"PK\x03\x04"
"""APPNOTE 4.3.16, 4.3.14, 4.3.15, 4.3.12 and 4.3.7."""

_MAX_COMMENT_BYTES = 0xFFFF
_IN_EXTRA_FIELD = 0xFFFFFFFF
"""A size or offset that stands as 64 bits in the extra field `_ZIP_64` instead (APPNOTE 4.5.3)."""
_ZIP_64 = 1

_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_SIZES_BEHIND_DATA = 1 << 3
_PATCH = 1 << 5
"""General purpose flags (APPNOTE 4.4.4)."""

_STORED, _DEFLATED = 0, 8
"""Compression methods (APPNOTE 4.4.5): the ones that any source uses."""


def zip_members(
    path: Path, max_member_bytes: int, on_position: Callable[[int], None] | None = None
) -> Iterator[Member]:
    """The files of a zip; see `storage.archives.iter_members`."""
    with _open_zip(path) as archive:
        consumed_bytes = 0
        for entry in archive.entries():
            data_start = archive.data_start(entry)
            consumed_bytes += data_start + entry.packed_bytes - entry.start
            if on_position:
                on_position(consumed_bytes)
            if not entry.is_folder:
                yield _member(archive, entry, data_start, max_member_bytes)


@contextmanager
def open_zip_member(path: Path, name: str) -> Iterator[IO[bytes]]:
    """A file in a zip as a stream, e.g. the JSON file of annotations among others.

    Args:
        path: a local file.
        name: the file's safe name inside, with `/`.

    Leaving the block normally reads to the end of the file, so that its checksum is verified.

    Raises:
        CorruptArchiveError: the container is broken, or does not hold exactly one such file. Damage to the file
            itself may be found only when the stream is read to its end.
    """
    with _open_zip(path) as archive:
        found = [entry for entry in archive.entries() if entry.name == name and not entry.is_folder]
        if len(found) != 1:
            how_many = "more than one" if found else "no"
            raise CorruptArchiveError(f"{path.name} holds {how_many} file {name}", "Report it", reason="corrupt")
        (entry,) = found
        if entry.refused:
            raise Broken("corrupt", f"its member {name} is no plain file, encrypted or compressed in an unknown way")
        stream = io.BufferedReader(_BlockStream(archive.blocks(entry, archive.data_start(entry))), BLOCK_BYTES)
        yield stream
        while stream.read(BLOCK_BYTES):
            pass


class _Entry(NamedTuple):
    """One entry as the directory tells of it.

    Attributes:
        raw_name: as spelled.
        start: position of its local header in the file.
        packed_bytes, full_bytes: of its data as they lie in the archive, and unpacked.
        mode: st_mode of Unix, 0 where the archive does not tell.
    """

    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed_bytes: int
    full_bytes: int
    mode: int
    start: int

    @property
    def text(self) -> str:
        # Whatever the encoding, bytes that are not UTF-8 come as surrogates, so different names stay different.
        return self.raw_name.decode("utf-8", "surrogateescape")

    @property
    def name(self) -> str:
        """A harmless name, also of an entry that is refused for its own."""
        return safe_name(self.text) or refused_name(self.text)

    @property
    def is_folder(self) -> bool:
        return not self.full_bytes and (self.raw_name.endswith(b"/") or stat.S_ISDIR(self.mode))

    @property
    def refused(self) -> str | None:
        """The reason for which it must not be read."""
        if safe_name(self.text) is None or (stat.S_IFMT(self.mode) and not stat.S_ISREG(self.mode)):
            return Reason.UNSAFE_MEMBER
        if self.flags & (_ENCRYPTED | _PATCH) or self.method not in (_STORED, _DEFLATED):
            return Reason.UNREADABLE_MEMBER
        return None


def _member(archive: _Zip, entry: _Entry, data_start: int, max_member_bytes: int) -> Member:
    if entry.refused:
        return Member(entry.name, b"", entry.refused)
    if entry.full_bytes > max_member_bytes:
        return Member(entry.name, b"", Reason.TOO_LARGE)
    return Member(entry.name, b"".join(archive.blocks(entry, data_start)))


class _Zip:
    """An open zip.

    Args:
        file, directory: the same file opened twice, for data and for the directory.
        size_bytes: of the file.
    """

    def __init__(self, file: IO[bytes], directory: IO[bytes], size_bytes: int) -> None:
        self._file = file
        self._directory = directory
        self._shift = 0
        self._directory_start, self._directory_bytes, count = self._find_directory(size_bytes)
        # 8 bytes an entry are all that is kept, however many there are.
        starts = array("Q", (entry.start for entry in self.entries()))
        if len(starts) != count:
            raise Broken("corrupt", f"its directory has {len(starts)} entries and should have {count}")
        self._ends = np.sort(np.append(np.asarray(starts, np.uint64), np.uint64(self._directory_start)))
        if (self._ends[1:] == self._ends[:-1]).any():
            raise Broken("corrupt", "two of its entries are at the same place")

    def _find_directory(self, size_bytes: int) -> tuple[int, int, int]:
        """Position, bytes and number of entries of the directory."""
        if not size_bytes:
            raise Broken("truncated", "it is empty")
        end = self._find_end(size_bytes)
        self._file.seek(end)
        _, disk, first_disk, _, count, directory_bytes, offset, _ = _END.unpack(self._file.read(_END.size))
        directory_end = end
        self._file.seek(max(end - _LOCATOR_64.size - _END_64.size, 0))
        before = self._file.read(end - self._file.tell())
        if before[-_LOCATOR_64.size :].startswith(_LOCATOR_64_SIGNATURE):
            if not before.startswith(_END_64_SIGNATURE):
                raise Broken("corrupt", "its end record is damaged")
            directory_end = end - len(before)
            fields = _END_64.unpack(before[: _END_64.size])
            disk, first_disk, _, count, directory_bytes, offset = fields[4:]
        if disk or first_disk:
            raise Broken("corrupt", "it is one part of several")
        # Something may lie in front, like a program that unpacks it (APPNOTE 4.1.9); offsets then begin behind that.
        self._shift = directory_end - directory_bytes - offset
        if self._shift < 0:
            raise Broken("corrupt", f"{-self._shift} bytes of it are missing")
        if self._shift and self._starts_with(_LOCAL_SIGNATURE):
            raise Broken("corrupt", "its directory is not where it should be")
        return directory_end - directory_bytes, directory_bytes, count

    def _find_end(self, size_bytes: int) -> int:
        """Position of the end record: nothing may follow it but its own comment."""
        tail_start = max(size_bytes - _END.size - _MAX_COMMENT_BYTES, 0)
        self._file.seek(tail_start)
        tail = self._file.read()
        at = last = tail.rfind(_END_SIGNATURE, 0, len(tail) - _END.size + len(_END_SIGNATURE))
        while at >= 0:
            if _END.unpack_from(tail, at)[-1] == len(tail) - at - _END.size:
                return tail_start + at
            at = tail.rfind(_END_SIGNATURE, 0, at)
        if last >= 0 and _END.unpack_from(tail, last)[-1] < len(tail) - last - _END.size:
            raise Broken("corrupt", "there is something behind its end record")
        if last >= 0 or self._starts_with(_LOCAL_SIGNATURE) or self._starts_with(_END_SIGNATURE):
            raise Broken("truncated", "it is cut off")
        self._file.seek(0)
        page = is_web_page(self._file.read(512))
        raise Broken("not_an_archive", "it is a web page" if page else "it has no end record")

    def _starts_with(self, signature: bytes) -> bool:
        self._file.seek(0)
        start = self._file.read(len(signature))
        return start == signature[: len(start)]

    def entries(self) -> Iterator[_Entry]:
        """All entries in the order of the directory."""
        file, left_bytes = self._directory, self._directory_bytes
        file.seek(self._directory_start)
        while left_bytes:
            if left_bytes < _ENTRY.size:
                raise Broken("corrupt", "its directory is cut off")
            signature, *fields = _ENTRY.unpack(file.read(_ENTRY.size))
            _, _, flags, method, _, _, crc, packed, full, name_bytes, extra_bytes, comment_bytes, *rest = fields
            left_bytes -= _ENTRY.size + name_bytes + extra_bytes + comment_bytes
            if signature != _ENTRY_SIGNATURE or left_bytes < 0:
                raise Broken("corrupt", "its directory is damaged")
            name, extra = file.read(name_bytes), file.read(extra_bytes)
            file.seek(comment_bytes, io.SEEK_CUR)
            full, packed, offset = _widened((full, packed, rest[-1]), extra)
            if self._shift + offset >= self._directory_start:
                raise Broken("corrupt", "its directory tells of an entry that lies behind it")
            yield _Entry(name, flags, method, crc, packed, full, rest[-2] >> 16, self._shift + offset)

    def data_start(self, entry: _Entry) -> int:
        """Where an entry's data begin, after its local header was found to tell the same as the directory."""
        self._file.seek(entry.start)
        header = self._file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or not header.startswith(_LOCAL_SIGNATURE):
            raise Broken("corrupt", f"there is no header of {entry.name} where there should be one")
        _, _, flags, method, _, _, crc, packed, full, name_bytes, extra_bytes = _LOCAL.unpack(header)
        name, extra = self._file.read(name_bytes), self._file.read(extra_bytes)
        told = [name, method, flags & _ENCRYPTED]
        expected = [entry.raw_name, entry.method, entry.flags & _ENCRYPTED]
        if not flags & _SIZES_BEHIND_DATA:
            full, packed = _widened((full, packed), extra)
            told += [crc, packed, full]
            expected += [entry.crc, entry.packed_bytes, entry.full_bytes]
        if told != expected:
            raise Broken("corrupt", f"the header of {entry.name} contradicts the directory")
        data_start: int = entry.start + _LOCAL.size + name_bytes + extra_bytes
        following = self._ends[np.searchsorted(self._ends, np.uint64(entry.start), side="right")]
        if data_start + entry.packed_bytes > int(following):
            raise Broken("corrupt", f"{entry.name} reaches into what follows it")
        return data_start

    def blocks(self, entry: _Entry, data_start: int) -> Iterator[bytes]:
        """The unpacked data of an entry, never more than it declares, in blocks."""
        self._file.seek(data_start)
        inflate = zlib.decompressobj(-zlib.MAX_WBITS) if entry.method == _DEFLATED else None
        left_bytes, full_bytes, crc = entry.packed_bytes, 0, 0
        while left_bytes:
            block = self._file.read(min(left_bytes, BLOCK_BYTES))
            if not block:
                raise Broken("truncated", "it is cut off")
            left_bytes -= len(block)
            if inflate:
                try:
                    # One byte more than it may be, which tells.
                    block = inflate.decompress(block, entry.full_bytes - full_bytes + 1)
                except zlib.error as error:
                    raise Broken("corrupt", f"its member {entry.name} is damaged ({error})") from error
            full_bytes += len(block)
            crc = zlib.crc32(block, crc)
            if full_bytes > entry.full_bytes or (inflate and inflate.eof and (left_bytes or inflate.unused_data)):
                raise Broken("corrupt", f"its member {entry.name} has another size than it declares")
            yield block
        if full_bytes != entry.full_bytes or (inflate and entry.packed_bytes and not inflate.eof):
            raise Broken("corrupt", f"its member {entry.name} has another size than it declares")
        if crc != entry.crc:
            raise Broken("corrupt", f"its member {entry.name} has the wrong checksum")


def _widened(values: tuple[int, ...], extra: bytes) -> list[int]:
    """The values, those that do not fit into 32 bits taken from the extra field."""
    widened = list(values)
    too_small = [i for i, value in enumerate(values) if value == _IN_EXTRA_FIELD]
    while too_small and len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _ZIP_64 and len(field) >= 8 * len(too_small):
            for i, value in zip(too_small, struct.unpack_from(f"<{len(too_small)}Q", field), strict=True):
                widened[i] = value
            break
    return widened


class _BlockStream(io.RawIOBase):
    """Blocks of bytes as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._block = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = block
        count = min(len(buffer), len(self._block))
        buffer[:count], self._block = self._block[:count], self._block[count:]
        return count


@contextmanager
def _open_zip(path: Path) -> Iterator[_Zip]:
    with broken_as_corrupt(path.name, "zip"), path.open("rb") as file, path.open("rb") as directory:
        yield _Zip(file, directory, path.stat().st_size)
