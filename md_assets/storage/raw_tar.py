"""The raw stage's own archive: an uncompressed, WebDataset-shaped tar of `<key>.jpg` and `<key>.json`.

Here: writing it byte for byte reproducibly, and reading it back verified. Not here: upstream's archives,
see `storage.archives`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, cast

from md_assets.core.errors import DamagedError
from md_assets.core.ledger import OutputFile
from md_assets.storage.images import StoredImage

_BUFFER_BYTES = 1 << 17
"""tarfile copies its whole buffer whenever something is added to it or taken from it, so a larger one costs time."""


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


class _Hashing:
    """A file that hashes what goes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        self.bytes += len(block)
        return self._file.write(block)

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.digest.update(block)
        self.bytes += len(block)
        return block


class RawTarWriter:
    """Writes samples in order. The same samples give the same bytes: no times, owners or modes of this machine.

    Args:
        path: a new file.

    Used as a context manager; `file` has size and hash once the block is left.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb", buffering=_BUFFER_BYTES)
        self._hashing = _Hashing(self._file)
        self._tar = tarfile.open(  # noqa: SIM115 (closed in __exit__)
            fileobj=cast(IO[bytes], self._hashing), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BUFFER_BYTES
        )

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
        self._tar.addfile(info, io.BytesIO(data))

    def output_file(self, name: str) -> OutputFile:
        """Size and hash of the finished file, to be ledgered under `name`."""
        return OutputFile(name, self._hashing.bytes, self._hashing.digest.hexdigest())

    def __enter__(self) -> RawTarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(*() if kind is None else (OSError,)):
                self._tar.close()  # after an error too, or tarfile would do it later, with the file closed
        finally:
            self._file.close()


def iter_raw_tar(path: Path, expected: OutputFile) -> Iterator[RawSample]:
    """The samples of a published raw tar in order.

    Args:
        path: the tar.
        expected: what the ledger says of it; compared when the last sample was read.

    Raises:
        DamagedError: the file is not what the ledger says. Drop what was made of earlier samples.
    """
    damaged = DamagedError(f"{path} is not what its ledger says", "Materialize raw of it again")
    try:
        with path.open("rb", buffering=0) as file:
            hashing = _Hashing(file)
            with tarfile.open(fileobj=cast(IO[bytes], hashing), mode="r|", bufsize=_BUFFER_BYTES) as tar:
                jpeg = b""
                for info in tar:
                    content = tar.extractfile(info)
                    data = content.read() if content else b""
                    if info.name.endswith(".jpg"):
                        jpeg = data
                    else:
                        meta = json.loads(data)
                        yield RawSample(meta["key"], jpeg, meta["width"], meta["height"], meta.get("caption"))
                    tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header
            while hashing.read(_BUFFER_BYTES):
                pass
    except (OSError, tarfile.TarError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise damaged from error
    if (hashing.bytes, hashing.digest.hexdigest()) != (expected.bytes, expected.sha256):
        raise damaged


def spread_jpegs(path: Path, count: int) -> list[bytes]:
    """At most `count` images of a raw tar, spread evenly over it; reads headers and those images only."""
    with tarfile.open(path, mode="r:") as tar:
        members = [info for info in tar.getmembers() if info.name.endswith(".jpg")]
        count = min(count, len(members))
        chosen = [members[i * len(members) // count] for i in range(count)]
        return [content.read() for info in chosen if (content := tar.extractfile(info)) is not None]
