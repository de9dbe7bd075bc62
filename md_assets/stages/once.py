"""Doing an archive's work once: passing over what is current, one worker at a time, publishing at the end.

Here: what all stages that publish an archive share. Not here: the work itself, nor the protocol on disk
(`storage.publish`).
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from md_assets import __version__
from md_assets.core.errors import ArchiveError, CorruptArchiveError, DamagedError, MdAssetsError, SourceError
from md_assets.core.ledger import Ledger
from md_assets.core.paths import StageDir
from md_assets.core.settings import fingerprint
from md_assets.storage.publish import (
    BusyError,
    clear_leftovers,
    fsync_directory,
    publish,
    read_ledger,
    workspace,
)

UPSTREAM_MISSING, UPSTREAM_DAMAGED = "upstream_missing", "upstream_damaged"
"""Reasons of archives that failed since the stage before cannot be read: nothing whole is published there, or its files
are not what their ledger says."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of one archive: its ledger, and whether it had been published before."""

    ledger: Ledger
    passed_over: bool


@dataclass(frozen=True)
class Made:
    """Finished data in a workspace, and the ledger that describes them."""

    data: Path
    ledger: Ledger


def published(stage_dir: StageDir, archive: str) -> Ledger | None:
    """The ledger of an archive whose data are all there, else None.

    A ledger that cannot be read, and data that do not have the ledgered sizes, count as unpublished: the next
    run replaces them. So do data that were pruned.
    """
    ledger = recorded(stage_dir, archive)
    return None if ledger is None or ledger.pruned else ledger


def recorded(stage_dir: StageDir, archive: str) -> Ledger | None:
    """The ledger of an archive that is published, or was and is pruned, else None.

    What was made of a pruned archive is still judged by its ledger; whoever wants the data calls `refuse_pruned`.
    """
    try:
        ledger = read_ledger(stage_dir.ledger(archive))
    except MdAssetsError:
        return None
    if ledger is None or ledger.pruned:
        return ledger
    for file in ledger.files:
        path = stage_dir.path / file.path
        if not path.is_file() or path.stat().st_size != file.bytes:
            return None
    return ledger


def refuse_pruned(stage_dir: StageDir, archive: str) -> None:
    """Make sure that a recorded archive's data can be read.

    To be called in the workspace of what is made of them: `stages.prune` holds it while it removes them.

    Raises:
        ArchiveError: they were pruned.
    """
    ledger = recorded(stage_dir, archive)
    if ledger is not None and ledger.pruned:
        raise ArchiveError(
            stage_dir.dataset,
            archive,
            f"{stage_dir.asset} was pruned on {ledger.pruned.at}",
            f"Materialize {stage_dir.dataset}/{stage_dir.asset} of it again",
            reason="pruned",
        )


def current(stage_dir: StageDir, archive: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Ledger | None:
    """The ledger of an archive that is published and made from these inputs with these settings, else None."""
    ledger = published(stage_dir, archive)
    return ledger if ledger is not None and ledger.is_current(settings, inputs) else None


def upstream_ledger(stage_dir: StageDir, archive: str, settings: Mapping[str, Any]) -> Ledger:
    """The ledger that a stage builds on, checked.

    Args:
        stage_dir: of the upstream stage.
        archive: its ID.
        settings: those that the upstream stage must have been made with.

    Returns: the ledger, which may be that of a pruned archive: see `refuse_pruned`.

    Raises:
        ArchiveError: the archive is not published there, does not balance, or was made with other settings.
    """

    def refuse(what: str, remedy: str, reason: str) -> ArchiveError:
        return ArchiveError(stage_dir.dataset, archive, what, remedy, reason=reason)

    ledger = recorded(stage_dir, archive)
    again = f"Materialize {stage_dir.dataset}/{stage_dir.asset} of it"
    if ledger is None:
        raise refuse(f"{stage_dir.asset} is not published", again, UPSTREAM_MISSING)
    if not ledger.balances:
        raise refuse(
            f"the ledger of {stage_dir.asset} does not balance: {ledger.read} read, {ledger.kept} kept, "
            f"{ledger.rejected_count} rejected",
            again,
            "unbalanced",
        )
    if ledger.fingerprint != fingerprint(settings):
        raise refuse(f"{stage_dir.asset} was made with other settings", again, "stale")
    return ledger


def once(
    stage_dir: StageDir,
    archive: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Callable[[Path], Made],
    on_wait: Callable[[], None] | None = None,
) -> Outcome:
    """Publish an archive unless that is done already.

    Args:
        stage_dir: where it is published.
        archive: its ID.
        settings, inputs: what decides whether a published one is current.
        make: does the work in a workspace that nobody else uses, and leaves its result there.
        on_wait: called when another process works on the same archive and this one must wait for it.

    Raises:
        ArchiveError: the work failed; nothing was published, what was there before is untouched.
    """
    with archive_errors(stage_dir.dataset, archive):
        done = current(stage_dir, archive, settings, inputs)
        if done is not None:
            clear_leftovers(stage_dir.ledger(archive))
            return Outcome(done, passed_over=True)
    started = time.monotonic()
    with (
        archive_errors(stage_dir.dataset, archive),
        workspace(stage_dir.ledger(archive), on_wait=on_wait) as own,
    ):
        done = current(stage_dir, archive, settings, inputs)
        if done is not None:  # whoever we waited for has done it
            return Outcome(done, passed_over=True)
        made = make(own)
        ledger = replace(made.ledger, seconds=round(time.monotonic() - started, 3))
        return Outcome(publish(stage_dir, made.data, ledger), passed_over=False)


def withdraw(stage_dir: StageDir, archive: str, found_s: float) -> bool:
    """Take back the ledger of an archive that was found damaged: its data do not exist any more for any reader, and
    whoever asks for the archive next makes it again.

    Args:
        found_s: when it was found, Unix time. A ledger that is newer describes other data and stays, as does that of an
            archive on which another process works.

    Returns: whether there was such a ledger.
    """
    ledger_path = stage_dir.ledger(archive)
    try:
        with workspace(ledger_path, wait=False):
            if not ledger_path.exists() or ledger_path.stat().st_mtime >= found_s:
                return False
            ledger_path.unlink()
            fsync_directory(ledger_path.parent)
            return True
    except BusyError:
        return False


@contextmanager
def archive_errors(dataset: str, archive: str) -> Iterator[None]:
    """Whatever goes wrong in the block becomes an `ArchiveError` of this archive, so that the others go on.

    What nobody foresaw is logged with its traceback, for it is a defect of this code.
    """
    try:
        yield
    except ArchiveError:
        raise
    except (SourceError, CorruptArchiveError) as error:
        transient = isinstance(error, SourceError) and error.transient
        raise ArchiveError(
            dataset, archive, error.what, error.remedy, reason=error.reason, transient=transient
        ) from error
    except MdAssetsError as error:
        reason = UPSTREAM_DAMAGED if isinstance(error, DamagedError) else "failed"
        raise ArchiveError(dataset, archive, error.what, error.remedy, reason=reason) from error
    except OSError as error:
        what = f"{error.strerror or error} at {error.filename}" if error.filename else str(error)
        raise ArchiveError(
            dataset, archive, what, "Check space and permissions of the data root", reason="disk"
        ) from error
    except Exception as error:
        _log.exception("%s %s: an error that nobody foresaw", dataset, archive)
        what = f"{type(error).__name__}: {error}"
        raise ArchiveError(dataset, archive, what, "Report it with the run's log", reason="internal") from error


def versions_of(*packages: str) -> dict[str, str]:
    """Version of md_assets and of each installed package, by its name in the package index."""
    return {"md_assets": __version__} | {package: importlib.metadata.version(package) for package in packages}
