"""What `md-assets` prints: tables and lines of values that others computed."""

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dagster as dg
import pytest
from rich.console import Console

from md_assets import terminal
from md_assets.core.ledger import Ledger, Pruned
from md_assets.core.paths import DataRoot
from md_assets.core.verdict import Verdict
from md_assets.datasets.jdb import SPEC
from md_assets.orchestration.failures import FailedArchive
from md_assets.stages.prune import KeptBack, PruneReport
from md_assets.stages.stale import Difference, StaleGroup
from md_assets.stages.status import StageTotals
from md_assets.terminal import (
    FAILED_SHOWN,
    PLAIN_WIDTH,
    console,
    print_archives,
    print_failed,
    print_pruned,
    print_stale,
    print_totals,
    print_verdicts,
)


def cells(line: str) -> list[str]:
    """The cells of a row of a table."""
    return [cell.strip() for cell in line.strip().strip("│┃").replace("┃", "│").split("│")]


def rows(text: str) -> list[list[str]]:
    """The rows of a printed table, the heading first."""
    return [cells(line) for line in text.splitlines() if "│" in line or "┃" in line]


def test_totals_are_a_row_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    rejected = Counter({"too_small": 1200, "undecodable": 3})
    raw = StageTotals("raw", 400, 9, 2, 1, 385, 34567, 33364, rejected, 7_890_000_000, 0, 5400.0, failed=3)
    print_totals(SPEC, [raw, StageTotals("mds_latents_sdxl1_dfnclipH14", 400, missing=400)])
    text = capsys.readouterr().out
    assert text.split()[0] == "jdb"
    assert rows(text) == [
        ["stage", "done", "failed", "stale", "pruned", "missing", "read", "kept", "rejected", "reasons", "GB", "hours"],
        [
            "raw",
            "9",
            "3",
            "2",
            "1",
            "385",
            "34,567",
            "33,364",
            "1,203",
            "too_small 1,200, undecodable 3",
            "7.89",
            "1.50",
        ],
        ["mds_latents_sdxl1_dfnclipH14", "0", "", "0", "0", "400", "0", "0", "0", "", "0.00", "0.00"],
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


def test_stale_archives_are_told_by_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    archives = tuple(f"train/{number:03}" for number in range(12))
    groups = (
        StaleGroup(Difference("images.jpeg_quality", 90, 95), archives),
        StaleGroup(Difference("caption_cleaning", None, "deepfloyd"), archives[:2]),
        StaleGroup(Difference("input raw"), archives[:1]),
    )
    print_stale(SPEC, [StageTotals("raw"), StageTotals("mds", 400, 388, 12, stale_groups=groups)])
    assert capsys.readouterr().out.splitlines() == [
        "jdb/mds: 12 archives are stale",
        "  images.jpeg_quality: 90 in 12 archives, 95 wanted (train/000, train/001, train/002 and 9 more)",
        "  caption_cleaning: absent in 2 archives, deepfloyd wanted (train/000, train/001)",
        "  input raw changed after 1 archives were made (train/000)",
    ]


def test_failed_archives_are_lines_as_far_as_a_person_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    key = dg.AssetKey(["jdb", "raw"])
    ids = [f"train/{number:03}" for number in range(FAILED_SHOWN)]
    failed = [FailedArchive(f"jdb {i}: [gone]", "not_found", False, key, i, 1, 0.0, key) for i in ids]
    failed.append(replace(failed[0], reason="timeout", transient=True, attempt=3))
    print_failed(failed[-2:])
    assert capsys.readouterr().out.splitlines() == [
        "FAILED jdb/raw: jdb train/049: [gone] (not_found, permanent)",
        "FAILED jdb/raw: jdb train/000: [gone] (attempt 3, timeout, may pass)",
    ]
    print_failed(failed)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == FAILED_SHOWN + 1 and lines[-1] == "and 1 more; --json has all of them"


def test_what_was_pruned_and_what_was_not(capsys: pytest.CaptureFixture[str]) -> None:
    kept_back = [KeptBack(f"train/{number:03}", "[not] encoded", False) for number in range(5)]
    kept_back.append(KeptBack("valid/000", "damaged", True))
    report = PruneReport("jdb", True, Counter(raw=2, mds=2), Counter(raw=1_234_567, mds=10), kept_back)
    print_pruned(report)
    text = capsys.readouterr().out
    assert text.startswith("jdb: would be removed") and report.failed
    assert rows(text) == [
        ["stage", "archives", "bytes"],
        ["raw", "2", "1,234,567"],
        ["mds", "2", "10"],
        ["together", "", "1,234,577"],
    ]
    assert text.splitlines()[-2:] == [
        "jdb: not pruned, [not] encoded: 5 archives (train/000, train/001, train/002 and 2 more)",
        "jdb: not pruned, damaged: 1 archives (valid/000)",
    ]
    print_pruned(PruneReport("jdb", False))
    assert capsys.readouterr().out.startswith("jdb: removed")


def test_a_pruned_archive_is_marked(
    tmp_path: Any, publish_mds: Any, mds_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = DataRoot(tmp_path)
    ledger = publish_mds(root, "jdb", "train/000", mds_rows("train/000", 1))
    pruned = replace(ledger, pruned=Pruned("2026-11-22", 1))
    root.mds("jdb").ledger("train/000").write_text(pruned.to_json())
    print_archives(SPEC, [root.mds("jdb")])
    assert rows(capsys.readouterr().out)[1][:3] == ["train/000", "mds (pruned)", "1"]


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
