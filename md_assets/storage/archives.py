"""Reading archives member by member: nothing is extracted to disk and no member name is trusted.

Here: the one door to all containers. Not here: a container's own reader (`storage.tar_members`,
`storage.zip_members`, `storage.parquet_members`), which members are samples (`datasets/`), what is in an image
(`storage.images`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from md_assets.core.spec import ArchiveFormat, Member, ParquetLayout
from md_assets.storage.parquet_members import parquet_members
from md_assets.storage.tar_members import open_single_file, tar_members
from md_assets.storage.zip_members import open_zip_member, zip_members

__all__ = ["iter_members", "open_single_file", "open_zip_member"]


def iter_members(
    path: Path,
    archive_format: ArchiveFormat,
    max_member_bytes: int,
    on_position: Callable[[int], None] | None = None,
    parquet: ParquetLayout | None = None,
) -> Iterator[Member]:
    """The files of an archive in its own order (a zip's is that of its directory), folders left out.

    Args:
        path: a local file.
        archive_format: its container.
        max_member_bytes: a larger member is refused without being read.
        on_position: called with the bytes of `path` consumed so far, once a member.
        parquet: which columns make a member; needed for a parquet file, whose rows are its members.

    Raises:
        CorruptArchiveError: the container is cut off or broken. Members that came before are then worth
            nothing either, because how many are missing is unknown; callers must drop what they made.
    """
    if archive_format == "tar":
        return tar_members(path, max_member_bytes, on_position)
    if archive_format == "zip":
        return zip_members(path, max_member_bytes, on_position)
    assert parquet is not None  # a contract test holds every dataset to it
    return parquet_members(path, parquet, max_member_bytes, on_position)
