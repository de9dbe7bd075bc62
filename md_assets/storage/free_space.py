"""Whether a disk has room for what is about to be written to it.

Here: the check and its error. Not here: how much a stage (`stages.raw`) or a transfer (`storage.http`) needs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from md_assets.core.errors import SourceError


def require_space(name: str, folder: Path, needed_bytes: int) -> None:
    """Raises `SourceError` with reason `disk_full` unless the disk of `folder` can take `needed_bytes` more.

    Args:
        name: of the file that is to be fetched.
        folder: any folder of that disk; it exists.
        needed_bytes: ≤ 0 for nothing.
    """
    if needed_bytes > shutil.disk_usage(folder).free:
        raise disk_full(name, folder, needed_bytes)


def disk_full(name: str, folder: Path, needed_bytes: int | None) -> SourceError:
    """The error for a disk that lacks `needed_bytes`; None where it is not known how many."""
    missing = "" if needed_bytes is None else f" and {needed_bytes} are needed"
    return SourceError(
        f"{name}: too little space is left in {folder}, {shutil.disk_usage(folder).free} bytes are free{missing}",
        "Free some, with `md-assets prune` for instance, or set MD_ASSETS_DATA to a larger disk; "
        "what came is kept and resumed",
        reason="disk_full",
        transient=False,
    )
