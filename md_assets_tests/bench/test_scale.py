"""The scale benchmark: what cannot be measured, and of which instances it is."""

from pathlib import Path

import pytest

from md_assets.bench.scale import DEPLOY, STORAGES, measure_all
from md_assets.core.errors import SettingsError


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for archives, storages in (([0], ["sqlite"]), ([14_001], ["sqlite"]), ([5], ["mysql"])):
        with pytest.raises(SettingsError, match=r"14,000|of sqlite, postgres"):
            next(measure_all(archives, storages, 64, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_committed_instances_are_measured() -> None:
    assert {name: (DEPLOY / file).is_file() for name, file in STORAGES.items()} == {"sqlite": True, "postgres": True}
