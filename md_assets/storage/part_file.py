"""A file while it is being fetched: what has come so far, its hash, its lock, its final check.

Here: `<destination>.part` with the bytes so far and `<destination>.source.part`, two lines that tell which
content they are the beginning of. Both may be deleted at any time; the next download then begins anew.
Not here: where the bytes come from, see `storage.http`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from md_assets.core.errors import SourceError
from md_assets.core.source import RemoteFile
from md_assets.storage.free_space import disk_full

REHASH_BYTES = 1024 * 1024
"""Read at a time when a file on disk is hashed; any size from 64 KiB up gives the same speed."""


@dataclass(frozen=True)
class Digest:
    """What the bytes of a file must hash to.

    Attributes:
        algorithm: a name that `hashlib.new` knows.
        hexdigest: lower-case hexadecimal.
        prefix: hashed before the file's bytes; git hashes a blob as `blob <size>\\0<bytes>`.
    """

    algorithm: str
    hexdigest: str
    prefix: bytes = b""


class MismatchError(SourceError):
    """What came is not what was announced; the part is useless."""

    def __init__(self, what: str, remedy: str, *, reason: str) -> None:
        super().__init__(what, remedy, reason=reason, transient=False)


class PartFile:
    """`<destination>.part`: the bytes so far and their running hash. A context manager that holds its lock.

    Args:
        remote: what the bytes are the beginning of.
        destination: the name that the file gets when it is whole.
        digest: what it must then hash to. Where nothing tells, its sha256 is found out.
    """

    def __init__(self, remote: RemoteFile, destination: Path, digest: Digest | None) -> None:
        self.remote, self.destination, self.digest = remote, destination, digest
        self.path = destination.with_name(destination.name + ".part")
        self.source_path = destination.with_name(destination.name + ".source.part")
        self._published = False
        self.size_bytes = 0
        self.etag = ""
        """Of the answer that the bytes came with, empty where the server gave none."""

    def __enter__(self) -> PartFile:
        with _DiskErrors(self):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._open_locked()
            try:
                self._adopt()
            except BaseException:
                os.close(self._fd)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.size_bytes == 0 and not self._published:
            self.path.unlink(missing_ok=True)
            self.source_path.unlink(missing_ok=True)
        os.close(self._fd)  # releases the lock

    def _open_locked(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise SourceError(
                    f"{self.remote.name}: another process is fetching it to {self.destination}",
                    "Wait until that one has finished, then run again",
                    reason="busy",
                    transient=True,
                ) from None
            except OSError:
                pass  # a file system without locks (some NFS): as without this guard, the checksum decides
            # Between open and lock the owner may have published this very file under its final name.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), self.path.stat()):
                    return fd
            os.close(fd)

    def _adopt(self) -> None:
        """Takes over what an earlier call left, if it is the beginning of this very content."""
        left_bytes = os.fstat(self._fd).st_size
        try:
            content_id, self.etag, *_ = [*self.source_path.read_text("utf-8").split("\n"), "", ""]
            same = content_id == self.remote.content_id
        except (OSError, UnicodeDecodeError):
            same = self.digest is not None  # nothing tells, but the checksum would find out
        expected_bytes = self.remote.size_bytes
        if left_bytes == 0 or not same or (expected_bytes is not None and left_bytes > expected_bytes):
            self.clear()
            return
        self._reset_hash()
        while chunk := os.read(self._fd, REHASH_BYTES):
            self._hash.update(chunk)
            self.size_bytes += len(chunk)

    def _reset_hash(self) -> None:
        self._hash = hashlib.new(self.digest.algorithm if self.digest else "sha256", usedforsecurity=False)
        self._hash.update(self.digest.prefix if self.digest else b"")

    def clear(self) -> None:
        """Forgets all bytes."""
        if os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self.size_bytes, self.etag = 0, ""
        self._reset_hash()

    def note_source(self, etag: str) -> None:
        """Leaves word for a later process which content the bytes belong to."""
        self.etag = etag
        with _DiskErrors(self):
            self.source_path.write_text(f"{self.remote.content_id}\n{etag}\n", "utf-8")

    def append(self, chunk: bytes) -> None:
        """Adds bytes at the end."""
        with _DiskErrors(self):
            rest = memoryview(chunk)
            while rest:  # write(2) may take less, on a disk that is nearly full for instance
                rest = rest[os.write(self._fd, rest) :]
        self._hash.update(chunk)
        self.size_bytes += len(chunk)

    @property
    def hexdigest(self) -> str:
        """Of the bytes so far, by the digest's algorithm, or sha256 where there is none."""
        return self._hash.hexdigest()

    def verify(self) -> None:
        """Raises `MismatchError` unless size and checksum are those announced."""
        name, expected_bytes = self.remote.name, self.remote.size_bytes
        if expected_bytes is not None and self.size_bytes != expected_bytes:
            raise MismatchError(
                f"{name}: {self.size_bytes} bytes came where the source announces {expected_bytes}",
                "The source is inconsistent; try again after it has been mended",
                reason="size_mismatch",
            )
        if self.digest is not None and self.hexdigest != self.digest.hexdigest:
            raise MismatchError(
                f"{name}: its {self.digest.algorithm} is {self.hexdigest} where the source announces "
                f"{self.digest.hexdigest}",
                "The bytes are damaged at the source or by a proxy on the way; ask there",
                reason="checksum_mismatch",
            )

    def publish(self) -> None:
        """Gives the bytes their final name, on disk before it."""
        with _DiskErrors(self):
            os.fsync(self._fd)
            self.path.replace(self.destination)
            self._published = True
            self.source_path.unlink(missing_ok=True)


def verified_size(path: Path, remote: RemoteFile, digest: Digest) -> int | None:
    """The size in bytes of the file at `path` if it is whole and has this digest, else None."""
    if not path.is_file() or path.stat().st_size != (remote.size_bytes or path.stat().st_size):
        return None
    running = hashlib.new(digest.algorithm, digest.prefix, usedforsecurity=False)
    size_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(REHASH_BYTES):
            running.update(chunk)
            size_bytes += len(chunk)
    return size_bytes if running.hexdigest() == digest.hexdigest else None


class _DiskErrors:
    """Turns errors of the local disk into `SourceError`s that say what to do."""

    def __init__(self, part: PartFile) -> None:
        self.part = part

    def __enter__(self) -> None: ...

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder, size_bytes = self.part.destination.parent, self.part.remote.size_bytes
            needed_bytes = None if size_bytes is None else size_bytes - self.part.size_bytes
            raise disk_full(self.part.remote.name, folder, needed_bytes) from error
