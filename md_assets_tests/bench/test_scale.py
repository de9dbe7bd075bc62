"""The scale benchmark's figures: what is made of them, and what cannot be measured."""

from pathlib import Path

import pytest

from md_assets.bench.scale import DEPLOY, STORAGES, Figures, Range, measure_all, report, report_growth
from md_assets.core.errors import SettingsError


def figures(storage: str, archives: int, seconds: float) -> Figures:
    return Figures(
        storage=storage,
        archives=archives,
        seconds=seconds,
        runs={"raw": 2, "mds": 3, "latents": 2, "mds_index": 1},
        run_s={"raw": Range((5.0, 7.0)), "mds": Range((1.0, 3.0, 2.0)), "latents": Range((4.0, 4.0))},
        memory_mib={"daemon": (150.0, 160.0, 170.0)},
        partitions_s=(0.5, 0.25),
        status_s=1.5,
        ticks=((200, 6.0), (0, 0.5)),
        passed_over_ms={"raw": Range((1.0, 3.0, 2.0))},
        records_bytes=5_000_000,
    )


def test_the_figures_in_lines() -> None:
    text = report(figures("sqlite", 100, 60.0))
    assert text.startswith("100 archives, sqlite: backfill of three stages in 60 s, 0.200 s for each archive and stage")
    assert "runs: raw 2, mds 3, latents 2, mds_index 1;" in text
    assert "raw 6.0 s (0.120 s for each archive), mds 2.0 s (0.060 s for each archive)" in text
    assert "daemon 150 → 160 (most 170)" in text
    assert "0.50 s, again 0.25 s (limit 2); md-assets status: 1.5 s (limit 5)" in text
    assert "200 results in 6.0 s, 0 results in 0.5 s (limit 30 s)" in text
    assert "raw 2.0 (worst 3.0) (limit 10)" in text and text.endswith("Dagster's records: 5 MB")


def test_growth_is_against_the_fewest_archives_of_the_same_storage() -> None:
    measured = [figures("sqlite", 400, 360.0), figures("postgres", 100, 30.0), figures("sqlite", 100, 60.0)]
    assert report_growth(measured) == "sqlite, 400 archives: 1.50 times the time for each of 100 (limit 1.2)"


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    for archives, storages in (([0], ["sqlite"]), ([14_001], ["sqlite"]), ([5], ["mysql"])):
        with pytest.raises(SettingsError, match=r"14,000|of sqlite, postgres"):
            next(measure_all(archives, storages, 64, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_committed_instances_are_measured() -> None:
    assert {name: (DEPLOY / file).is_file() for name, file in STORAGES.items()} == {"sqlite": True, "postgres": True}
