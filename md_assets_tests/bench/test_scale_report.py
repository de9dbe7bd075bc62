"""What is made of the scale benchmark's figures."""

from md_assets.bench.scale_report import Figures, Range, report, report_growth


def figures(storage: str, archives: int, seconds: float) -> Figures:
    return Figures(
        storage=storage,
        archives=archives,
        seconds=seconds,
        runs={"raw": 2, "mds": 3, "latents": 2, "mds_index": 1},
        run_s={"raw": Range((5.0, 7.0)), "mds": Range((1.0, 3.0, 2.0)), "latents": Range((4.0, 4.0))},
        processor_s={"runs": 9.0, "daemon": 3.0 * seconds / 60},
        memory_mib={"daemon": (150.0, 160.0, 170.0)},
        partitions_s={"raw": (0.5, 0.25), "mds": (0.75, 0.2), "latents": (0.6, 0.1)},
        status_s=1.5,
        ticks=((200, 6.0), (0, 0.5)),
        passed_over_ms={"raw": Range((1.0, 3.0, 2.0))},
        passed_over_in_run_ms={"raw": Range((8.0, 9.0))},
        records_bytes=5_000_000,
    )


def test_the_figures_in_lines() -> None:
    text = report(figures("sqlite", 100, 60.0))
    assert text.startswith("100 archives, sqlite: backfill of three stages in 60 s, 0.200 s for each archive and stage")
    assert "runs: raw 2, mds 3, latents 2, mds_index 1;" in text
    assert "raw 6.0 s (0.120 s for each archive), mds 2.0 s (0.060 s for each archive)" in text
    assert "processor time for each archive and stage: 40.0 ms: runs 30.0, daemon 10.0" in text
    assert "daemon 150 → 160 (most 170)" in text
    assert "UI: raw 0.50 s, again 0.25, mds 0.75 s, again 0.20, latents 0.60 s, again 0.10 (limit 2)" in text
    assert "md-assets status: 1.5 s (limit 5)" in text
    assert "200 results in 6.0 s, 0 results in 0.5 s (limit 30 s)" in text
    assert "raw 2.0 (worst 3.0) (limit 10); recorded by a run: raw 8.5 (worst 9.0)" in text
    assert text.endswith("Dagster's records: 5 MB")


def test_growth_is_against_the_fewest_archives_of_the_same_storage() -> None:
    measured = [figures("sqlite", 400, 360.0), figures("postgres", 100, 30.0), figures("sqlite", 100, 60.0)]
    said = "sqlite, 400 archives: 1.50 times the time for each of 100, 0.56 times the processor time (limit 1.2)"
    assert report_growth(measured) == said
