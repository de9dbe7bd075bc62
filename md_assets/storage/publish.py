"""The publish protocol: data first, ledger last, each whole or not at all.

A stage works in a *workspace*, a hidden directory beside its output on the same file system. The workspace
is also the lock: whoever holds `flock` on it works on that archive, and the kernel gives it free when the
holder dies, so a killed run leaves nothing to clear by hand; the next run takes the same workspace over.

Publishing renames the finished data out of the workspace and then writes the ledger. Readers ask for the
ledger first, so data without one do not exist for them. This also holds where a rename is not atomic.

Here: workspaces, publishing, reading ledgers. Not here: what is in the data, see `stages/`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from md_assets.core.ledger import Ledger, LedgerNumbers, OutputFile
from md_assets.core.paths import StageDir

WORKSPACE_SUFFIX = ".tmp"


class BusyError(Exception):
    """Another process works on this archive."""


@contextmanager
def workspace(ledger_path: Path, *, wait: bool = True, on_wait: Callable[[], None] | None = None) -> Iterator[Path]:
    """A directory of one's own for making what `ledger_path` will describe.

    What a killed holder left in it is still there (a partial download is worth keeping); take `scratch`
    of it for everything else. When the block ends normally the directory is removed; when it raises, the
    directory stays only if a partial download is in it.

    Args:
        ledger_path: the ledger of the archive; its directory is created.
        wait: whether to wait for another holder.
        on_wait: called once before waiting, to tell people.

    Raises:
        BusyError: another process holds it and `wait` is False.
    """
    path = _workspace_path(ledger_path)
    descriptor = _locked(path, wait, on_wait)
    try:
        yield path
    except BaseException:
        _remove(path, keep_partial_downloads=True)
        raise
    else:
        _remove(path, keep_partial_downloads=False)
    finally:
        # Not only closed: a child process forked meanwhile may hold a copy of the descriptor, and with it the lock.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def is_busy(ledger_path: Path) -> bool:
    """Whether some process works on the archive; touches nothing."""
    try:
        descriptor = os.open(_workspace_path(ledger_path), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def clear_leftovers(ledger_path: Path) -> None:
    """Remove the workspace of a published archive whose run was killed between publishing and tidying up."""
    if _workspace_path(ledger_path).exists():
        with suppress(BusyError), workspace(ledger_path, wait=False):
            pass


def _workspace_path(ledger_path: Path) -> Path:
    return ledger_path.parent / f".{ledger_path.stem}{WORKSPACE_SUFFIX}"


def _locked(path: Path, wait: bool, on_wait: Callable[[], None] | None) -> int:
    """An open descriptor of the directory `path`, locked, and certain to be the one that the path names."""
    while True:
        try:
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileExistsError, FileNotFoundError):
            if path.is_file():
                raise
            continue  # its holder finished and removed it meanwhile
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(descriptor)
                raise BusyError(str(path)) from None
            if on_wait:
                on_wait()
                on_wait = None
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _names(path, descriptor):
            return descriptor
        os.close(descriptor)


def _names(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(path: Path, keep_partial_downloads: bool) -> None:
    for entry in path.iterdir():
        if keep_partial_downloads and entry.suffix == ".part":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if not any(path.iterdir()):
        path.rmdir()


def scratch(workspace_dir: Path, name: str) -> Path:
    """An empty directory `name` in a workspace, whatever a killed run left there."""
    path = workspace_dir / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def publish(stage_dir: StageDir, made: Path, ledger: Ledger) -> Ledger:
    """Make `made` the data of the ledger's archive, replacing what was there.

    Args:
        stage_dir: where the archive is published.
        made: a finished file (raw) or directory (mds, latents) inside the archive's workspace, which the
            caller holds.
        ledger: what to write; its `files` are those of `made`.

    Returns: `ledger`, once it is on disk.

    May be repeated: a crash between any two steps leaves data without a ledger, which do not exist for
    readers and are replaced by the next run.
    """
    final = stage_dir.data(ledger.archive)
    ledger_path = stage_dir.ledger(ledger.archive)
    _fsync_tree(made)
    if ledger_path.exists():
        ledger_path.unlink()
        fsync_directory(ledger_path.parent)
    if made.is_dir():
        if final.exists():
            # A directory cannot be renamed onto a full one: the old one moves into the workspace and
            # goes with it.
            replaced = made.with_name("replaced")
            shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed right after this
            final.rename(replaced)
        made.rename(final)
    else:
        made.replace(final)
    fsync_directory(final.parent)
    write_atomically(ledger_path, ledger.to_json().encode(), made.parent)
    return ledger


def write_atomically(path: Path, content: bytes, temporary_dir: Path) -> None:
    """Replace `path` by `content` so that a reader sees the old or the new file, and after a crash too.

    Args:
        path: the file; its directory exists.
        content: the new bytes.
        temporary_dir: a directory on the same file system for the file in the making.
    """
    temporary = temporary_dir / f"{path.name}.new"
    temporary.write_bytes(content)
    _fsync_tree(temporary)
    temporary.replace(path)
    fsync_directory(path.parent)


def read_ledger(path: Path) -> Ledger | None:
    """The ledger at `path`, None where nothing is published.

    Raises:
        MdAssetsError: the file is no ledger or was edited.
    """
    try:
        text = path.read_bytes().decode("utf-8", "replace")  # what is no text is then no ledger either
    except FileNotFoundError:
        return None
    return Ledger.from_json(text, str(path))


def read_numbers(path: Path) -> LedgerNumbers | None:
    """The numbers of the ledger at `path`, None where nothing is published; see `read_ledger`."""
    try:
        return LedgerNumbers.from_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


def with_files(ledger: Ledger, files: tuple[OutputFile, ...]) -> Ledger:
    """`ledger` with its published files and their total size."""
    return replace(ledger, files=files, bytes_out=sum(f.bytes for f in files))


def output_file(path: Path, name: str) -> OutputFile:
    """Size and sha256 of a finished file, to be ledgered under `name`."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return OutputFile(name, file.tell(), digest.hexdigest())


def fsync_directory(path: Path) -> None:
    """Make renames and deletions in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if path.is_dir():
        fsync_directory(path)
