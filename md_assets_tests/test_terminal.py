"""What `md-assets` prints: tables and lines of values that others computed."""

import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from md_assets import terminal
from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot
from md_assets.core.verdict import Verdict
from md_assets.datasets.jdb import SPEC
from md_assets.stages.status import StageTotals
from md_assets.terminal import PLAIN_WIDTH, console, print_archives, print_totals, print_verdicts


def cells(line: str) -> list[str]:
    """The cells of a row of a table."""
    return [cell.strip() for cell in line.strip().strip("│┃").replace("┃", "│").split("│")]


def rows(text: str) -> list[list[str]]:
    """The rows of a printed table, the heading first."""
    return [cells(line) for line in text.splitlines() if "│" in line or "┃" in line]


def test_totals_are_a_row_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    rejected = Counter({"too_small": 1200, "undecodable": 3})
    raw = StageTotals("raw", 12, 34567, 33364, rejected, 7_890_000_000, 5400.0)
    print_totals(SPEC, [raw, StageTotals("mds_latents_sdxl1_dfnclipH14")])
    text = capsys.readouterr().out
    assert text.split()[0] == "jdb"
    assert rows(text) == [
        ["stage", "archives", "of", "read", "kept", "rejected", "reasons", "GB", "hours"],
        ["raw", "12", "400", "34,567", "33,364", "1,203", "too_small 1,200, undecodable 3", "7.89", "1.50"],
        ["mds_latents_sdxl1_dfnclipH14", "0", "400", "0", "0", "0", "", "0.00", "0.00"],
    ]


def test_archives_are_a_row_for_each_stage_in_upstreams_order(
    tmp_path: Any, publish_mds: Any, mds_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = DataRoot(tmp_path)
    ledgers = [
        publish_mds(root, "jdb", archive, mds_rows(archive, count))
        for archive, count in (("valid/000", 1), ("train/001", 2))
    ]
    print_archives(SPEC, [root.raw("jdb"), root.mds("jdb")])
    valid, train = (f"{ledger.bytes_out / 1e6:.1f}" for ledger in ledgers)
    assert rows(capsys.readouterr().out) == [
        ["archive", "stage", "read", "kept", "rejected", "reasons", "MB", "seconds"],
        ["train/001", "mds", "2", "2", "0", "", train, "0.0"],
        ["valid/000", "mds", "1", "1", "0", "", valid, "0.0"],
    ]  # fmt: skip


def test_an_archives_name_is_shown_once(
    tmp_path: Any, publish_mds: Callable[..., Ledger], mds_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = DataRoot(tmp_path)
    publish_mds(root, "jdb", "train/000", mds_rows("train/000", 1))
    print_archives(SPEC, [root.mds("jdb"), root.mds("jdb")])
    assert [row[:2] for row in rows(capsys.readouterr().out)[1:]] == [["train/000", "mds"], ["", "mds"]]


def test_failed_verdicts_are_lines_and_all_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    what = "[bold]x[/bold] [/data] :smile: " + "long " * 60 + "end"
    verdicts = [
        ("jdb/raw", "train/000", Verdict("counts_balance", True, "fine")),
        ("jdb/mds", "train/000", Verdict("shards_intact", False, what)),
        ("jdb/mds", "train/001", Verdict("shards_intact", False, "short")),
    ]
    assert print_verdicts(iter(verdicts)) == 2
    assert capsys.readouterr().out.splitlines() == [
        f"FAILED jdb/mds train/000 shards_intact: {what}",
        "FAILED jdb/mds train/001 shards_intact: short",
        "1 checks passed, 2 failed",
    ]


def test_no_verdict_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_verdicts([]) == 0
    assert capsys.readouterr().out == "0 checks passed, 0 failed\n"


def test_a_pipe_gets_wide_lines_without_colours_and_a_terminal_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console().width == PLAIN_WIDTH and not console().is_terminal
    monkeypatch.setattr(
        terminal, "Console", lambda **options: Console(file=io.StringIO(), force_terminal=True, width=70)
    )
    assert console().width == 70
