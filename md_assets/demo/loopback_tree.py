"""Directories as repositories of the loopback Hub: files, hashes, commits.

Here: what a repository contains now, and which of the commits told lately still hold. Not here: HTTP, see
`demo.loopback_hub`.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RepoKind = Literal["datasets", "models"]

LFS_FROM_BYTES = 10 * 1024
"""Files from this size are stored in LFS. The Hub's own bound for text is 10 MB; a miniature needs a low one
for its archives to be treated as the real ones are."""

LFS_SUFFIXES = frozenset(
    {".tar", ".tgz", ".gz", ".zip", ".parquet", ".arrow", ".bin", ".safetensors", ".pt", ".npy"}
    | {".jpg", ".jpeg", ".png", ".webp"}
)
"""Always in LFS, however small; from the `.gitattributes` that the Hub gives new datasets."""

CLOCK_TICK_NS = 20_000_000
"""A file this young may change again without its modification time telling so: the kernel stamps files with
a clock that ticks every 1 to 10 ms. It is hashed again the next time, as git does."""

COMMITS_KEPT = 16
"""Of one repository; a listing older than so many changes no longer resolves."""


@dataclass(frozen=True)
class Entry:
    """A file of a repository.

    Attributes:
        path: inside the repository, with `/`.
        file: on this machine.
        size_bytes: its size.
        blob_id: git's hash of the file, or of its LFS pointer.
        sha256: of the file if it is in LFS, else None.
        pointer_bytes: size of the LFS pointer, 0 without LFS.
    """

    path: str
    file: Path
    size_bytes: int
    blob_id: str
    sha256: str | None
    pointer_bytes: int

    @property
    def content_id(self) -> str:
        """What the Hub gives as the file's ETag."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True)
class Tree:
    """All files of a repository at one commit, by path in alphabetical order."""

    commit: str
    entries: Mapping[str, Entry]


class Repositories:
    """The repositories below `root`: `datasets/<organisation>/<name>/…` and `models/…`. Thread-safe.

    A hash is computed once for each path, size, inode and modification time.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashed: dict[Path, tuple[tuple[int, int, int], Entry]] = {}
        self._commits: dict[tuple[RepoKind, str], OrderedDict[str, Tree]] = {}
        self._lock = threading.Lock()

    def exists(self, kind: RepoKind, repo: str) -> bool:
        """Whether there is such a repository; `repo` comes from outside and is not trusted."""
        organisation, _, name = repo.partition("/")
        plain = all(part not in ("", ".", "..") and "/" not in part for part in (organisation, name))
        return plain and (self.root / kind / organisation / name).is_dir()

    def current(self, kind: RepoKind, repo: str) -> Tree:
        """What the directory holds now. The commit follows from names and contents alone."""
        folder = self.root / kind / repo
        entries: dict[str, Entry] = {}
        for directory, folders, names in os.walk(folder):
            folders.sort()
            for name in names:
                file = Path(directory, name)
                entry = self._entry(file, file.relative_to(folder).as_posix())
                if entry is not None:
                    entries[entry.path] = entry
        entries = dict(sorted(entries.items()))
        listed = "".join(f"{path}\0{entry.content_id}\n" for path, entry in entries.items())
        named = f"{kind}/{repo}\n{listed}".encode()
        tree = Tree(hashlib.sha1(named, usedforsecurity=False).hexdigest(), entries)
        with self._lock:
            commits = self._commits.setdefault((kind, repo), OrderedDict())
            commits[tree.commit] = tree
            commits.move_to_end(tree.commit)
            while len(commits) > COMMITS_KEPT:
                commits.popitem(last=False)
        return tree

    def at(self, kind: RepoKind, repo: str, revision: str) -> Tree | None:
        """The tree at a revision: `main`, or the current commit; None for any other."""
        tree = self.current(kind, repo)
        return tree if revision in ("main", tree.commit) else None

    def resolve(self, kind: RepoKind, repo: str, revision: str, path: str) -> tuple[str, Entry | None] | None:
        """The commit of a revision and the file at it, which may not be there; None without such a revision.

        A commit that was current lately still gives the files that have not changed since, so that a
        download begun before another file was mended can end.
        """
        with self._lock:
            commits = self._commits.get((kind, repo))
            known = None if commits is None else commits.get(revision)
        if known is not None and (entry := known.entries.get(path)) is not None:
            now = self._entry(entry.file, path)
            if now is not None and now.content_id == entry.content_id:
                return known.commit, now
        tree = self.at(kind, repo, revision)
        return None if tree is None else (tree.commit, tree.entries.get(path))

    def blob(self, kind: RepoKind, repo: str, path: str, sha256: str) -> Entry | None:
        """A file with this content that some listing has told of, if it still has it."""
        with self._lock:
            trees = list(self._commits.get((kind, repo), OrderedDict()).values())
        for tree in reversed(trees):
            if (entry := tree.entries.get(path)) is not None and entry.sha256 == sha256:
                now = self._entry(entry.file, path)
                return now if now is not None and now.sha256 == sha256 else None
        return None

    def _entry(self, file: Path, path: str) -> Entry | None:
        try:
            stat = file.stat()
            stamp = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            with self._lock:
                hashed = self._hashed.get(file)
            if hashed is None or hashed[0] != stamp:
                begun_ns = time.time_ns()
                hashed = (stamp, _hash(file, path))
                if begun_ns - stat.st_mtime_ns > CLOCK_TICK_NS:
                    with self._lock:
                        self._hashed[file] = hashed
        except FileNotFoundError:  # removed while we looked
            return None
        return hashed[1]


def _hash(file: Path, path: str) -> Entry:
    size_bytes = file.stat().st_size
    if size_bytes < LFS_FROM_BYTES and file.suffix.lower() not in LFS_SUFFIXES:
        return Entry(path, file, size_bytes, _git_blob_id(file.read_bytes()), sha256=None, pointer_bytes=0)
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    sha256 = digest.hexdigest()
    # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()
    return Entry(path, file, size_bytes, _git_blob_id(pointer), sha256, len(pointer))


def _git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
