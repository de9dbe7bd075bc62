"""What the readers of all containers share: how a file that is no usable archive is told.

Here: the exception that readers raise inside, and its translation into one sentence. Not here: any container, see
`storage.tar_members`, `storage.zip_members` and `storage.parquet_members`; all of them, see `storage.archives`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from md_assets.core.errors import CorruptArchiveError

REFETCH = "Run the archive again; if it stays so, the file is broken at its source"
"""The remedy for a file that may have been damaged on its way."""

BLOCK_BYTES = 1 << 20
"""What is read at once where a reader is free to choose."""


class Broken(Exception):
    """What is wrong with a container, without its name.

    Args:
        reason: of the `CorruptArchiveError` that it becomes.
        what: the end of the sentence `<file> is no usable <kind>: ...`.
    """

    def __init__(self, reason: Literal["truncated", "corrupt", "not_an_archive"], what: str) -> None:
        self.reason = reason
        super().__init__(what)


@contextmanager
def broken_as_corrupt(name: str, kind: str) -> Iterator[None]:
    """A `Broken` of the block becomes a `CorruptArchiveError`.

    Args:
        name: of the file, for people.
        kind: of the container, for people.
    """
    try:
        yield
    except Broken as error:
        raise CorruptArchiveError(f"{name} is no usable {kind}: {error}", REFETCH, reason=error.reason) from error


def is_web_page(start: bytes) -> bool:
    """Whether a file that begins so and is no archive is an HTML page: what servers send for an expired link."""
    return start.lstrip().startswith(b"<")
