"""The benchmark of captions: real stage, real reads, figures of what it did."""

from pathlib import Path

import pytest

from md_assets.bench.captions import READS, Figures, measure_all, report


@pytest.mark.slow
def test_it_indexes_tables_and_texts_and_reads_archives(tmp_path: Path) -> None:
    table, texts = measure_all([2_500], [300], tmp_path)
    assert (table.rows, table.read_rows, texts.rows, texts.read_rows) == (2_000, 1_000, 300, 300)
    for figures in (table, texts):
        assert len(figures.read_ms) == READS and min(figures.read_ms) > 0
        assert figures.index_bytes > 10_000 and figures.source_bytes > 10_000 and 50 < figures.peak_mib < 2_000
    assert list(tmp_path.iterdir()) == []


def test_the_figures_in_one_line() -> None:
    text = report(
        Figures(
            "rows of parquet",
            14_000_000,
            10**9,
            2 * 10**9,
            100.0,
            90.0,
            512.4,
            1_000,
            (9.0, 1.0, 30.0),
            (5.0, 1.0, 8.0),
        )
    )
    assert "14,000,000 rows of parquet (1,000 MB) indexed in 100.0 s, 90.0 s of it computing" in text
    assert "(140,000 rows/s), with 512 MiB" in text
    assert (
        "the index has 2,000 MB" in text
        and "in 9.0 ms, 5.0 ms of it computing (medians of 3, worst 30.0 and 8.0 ms)" in text
    )
