"""For all loader tests: streaming's lock files go to the test's own directory, and loaders end with the test."""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    monkeypatch.setenv("TMPDIR", str(path))
    gc.freeze()  # what was there before, torch above all, need not be looked through after every test
    yield path
    gc.collect()
    gc.unfreeze()
