"""The raw stage's own archive: an uncompressed, WebDataset-shaped tar of `<key>.jpg` and `<key>.json`.

Here: writing it byte for byte reproducibly, and reading it back verified. Not here: upstream's archives,
see `storage.archives`; how a tar is read, see `storage.tar_members`.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from md_assets.core.errors import CorruptArchiveError, DamagedError
from md_assets.core.ledger import OutputFile
from md_assets.storage.images import StoredImage
from md_assets.storage.tar_members import tar_members

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class RawSample:
    """One kept image, as the mds stage reads it.

    Attributes:
        key: unique within the dataset.
        jpeg: the stored bytes.
        width, height: px, of the stored picture.
        caption: as the archive carried it, None where captions come from annotations.
    """

    key: str
    jpeg: bytes
    width: int
    height: int
    caption: str | None


class RawTarWriter:
    """Writes samples in order. The same samples give the same bytes: no times, owners or modes of this machine.

    Args:
        path: a new file.

    Used as a context manager; `file` has size and hash once the block is left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=_BUFFER_BYTES)
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, key: str, image: StoredImage, caption: str | None) -> None:
        meta: dict[str, object] = {
            "key": key,
            "width": image.width,
            "height": image.height,
            "source_width": image.source_width,
            "source_height": image.source_height,
            "source_format": image.source_format,
            "original_bytes": image.original,
        }
        if caption is not None:
            meta["caption"] = caption
        self._add(f"{key}.jpg", image.jpeg)
        self._add(f"{key}.json", json.dumps(meta, separators=(",", ":")).encode())

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._append(info.tobuf(tarfile.PAX_FORMAT))
        self._append(data)
        self._append(bytes(-len(data) % tarfile.BLOCKSIZE))

    def _append(self, block: bytes) -> None:
        self._digest.update(block)
        self._bytes += len(block)
        self._file.write(block)

    def output_file(self, name: str) -> OutputFile:
        """Size and hash of the finished file, to be ledgered under `name`."""
        return OutputFile(name, self._bytes, self._digest.hexdigest())

    def __enter__(self) -> RawTarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._append(bytes(2 * tarfile.BLOCKSIZE))  # the end mark
                self._append(bytes(-self._bytes % tarfile.RECORDSIZE))


def iter_raw_tar(path: Path, expected: OutputFile) -> Iterator[RawSample]:
    """The samples of a published raw tar in order.

    Args:
        path: the tar.
        expected: what the ledger says of it; compared when the last sample was read.

    Raises:
        DamagedError: the file is not what the ledger says. Drop what was made of earlier samples.
    """
    damaged = DamagedError(f"{path} is not what its ledger says", "Materialize raw of it again")
    digest, jpeg = hashlib.sha256(), b""
    try:
        if path.stat().st_size != expected.bytes:
            raise damaged
        for member in tar_members(path, max_member_bytes=expected.bytes, digest=digest):
            if member.refused:
                raise damaged
            if member.name.endswith(".jpg"):
                jpeg = member.data
            else:
                meta = json.loads(member.data)
                yield RawSample(meta["key"], jpeg, meta["width"], meta["height"], meta.get("caption"))
    except (OSError, CorruptArchiveError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise damaged from error
    if digest.hexdigest() != expected.sha256:
        raise damaged


def spread_jpegs(path: Path, count: int) -> list[bytes]:
    """At most `count` images of a raw tar, spread evenly over it; reads headers and those images only."""
    with tarfile.open(path, mode="r:") as tar:
        members = [info for info in tar.getmembers() if info.name.endswith(".jpg")]
        count = min(count, len(members))
        chosen = [members[i * len(members) // count] for i in range(count)]
        return [content.read() for info in chosen if (content := tar.extractfile(info)) is not None]
