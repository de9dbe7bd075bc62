"""Directories as repositories: hashes, commits, and which old commits still hold."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from md_assets.demo import loopback_tree
from md_assets.demo.loopback_tree import COMMITS_KEPT, LFS_FROM_BYTES, Repositories


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "datasets" / "org" / "data"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"hi")
    (folder / "b.tar").write_bytes(b"archive")
    return folder


def test_hashes_are_gits_and_lfss(folder: Path, tmp_path: Path) -> None:
    (folder / "long.txt").write_bytes(b"x" * LFS_FROM_BYTES)
    entries = Repositories(tmp_path).current("datasets", "org/data").entries
    assert list(entries) == ["a.txt", "b.tar", "long.txt"]
    # printf 'hi' | git hash-object --stdin
    assert entries["a.txt"].blob_id == entries["a.txt"].content_id == "32f95c0d1244a78b2be1bab8de17906fabb2c4a8"
    assert entries["a.txt"].sha256 is None
    assert entries["b.tar"].content_id == hashlib.sha256(b"archive").hexdigest()
    assert entries["long.txt"].sha256 is not None and entries["long.txt"].pointer_bytes == 130


def test_a_file_is_hashed_again_only_when_it_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.utime(folder / "a.txt", (0, 0))
    os.utime(folder / "b.tar", (0, 0))
    hashed: list[str] = []
    real = loopback_tree._hash
    monkeypatch.setattr(loopback_tree, "_hash", lambda file, path: hashed.append(path) or real(file, path))
    repositories = Repositories(tmp_path)
    first = repositories.current("datasets", "org/data").commit
    assert repositories.current("datasets", "org/data").commit == first
    os.utime(folder / "a.txt", (1, 1))
    assert repositories.current("datasets", "org/data").commit == first, "times are no content"
    assert sorted(hashed) == ["a.txt", "a.txt", "b.tar"]


def test_quick_changes_of_the_same_size_are_seen(folder: Path, tmp_path: Path) -> None:
    repositories = Repositories(tmp_path)
    now_ns = time.time_ns() + 10**10  # stays "now" however slow this machine is
    commits = set()
    for text in ("ho", "hu", "ha"):
        (folder / "a.txt").write_text(text)
        os.utime(folder / "a.txt", ns=(now_ns, now_ns))
        commits.add(repositories.current("datasets", "org/data").commit)
    assert len(commits) == 3


def test_old_commits_give_what_is_unchanged_as_long_as_they_are_remembered(folder: Path, tmp_path: Path) -> None:
    repositories = Repositories(tmp_path)
    old = repositories.current("datasets", "org/data").commit
    for number in range(COMMITS_KEPT - 1):
        (folder / "a.txt").write_text(f"version {number}")
        new = repositories.current("datasets", "org/data").commit
    commit, entry = repositories.resolve("datasets", "org/data", old, "b.tar") or ("", None)
    assert commit == old and entry is not None and entry.size_bytes == 7
    assert repositories.resolve("datasets", "org/data", old, "a.txt") is None
    assert repositories.resolve("datasets", "org/data", new, "none") == (new, None)
    assert repositories.at("datasets", "org/data", old) is None
    assert repositories.blob("datasets", "org/data", "b.tar", entry.content_id) == entry
    (folder / "a.txt").write_text("one more")
    repositories.current("datasets", "org/data")
    assert repositories.resolve("datasets", "org/data", old, "b.tar") is None
    (folder / "b.tar").unlink()
    assert repositories.blob("datasets", "org/data", "b.tar", entry.content_id) is None


@pytest.mark.parametrize("name", ["../data", "org/..", "org", "", "org/data/..", "./org/data", "org/none"])
def test_only_repositories_exist(folder: Path, tmp_path: Path, name: str) -> None:
    assert not Repositories(tmp_path).exists("datasets", name)
    assert Repositories(tmp_path).exists("datasets", "org/data")
