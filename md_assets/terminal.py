"""Tables for the terminal: what `md-assets` prints.

Here: showing values that others computed. Not here: computing them, see `stages.status` and `stages.verify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from md_assets.core.paths import StageDir
from md_assets.core.spec import DatasetSpec
from md_assets.core.verdict import Verdict
from md_assets.stages.status import StageTotals, published_ledgers

PLAIN_WIDTH = 160
"""Columns where the output is no terminal: a log or a pipe shows the whole table."""


def console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough for a log."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=PLAIN_WIDTH)


def print_archives(spec: DatasetSpec, stage_dirs: Iterable[StageDir]) -> None:
    """A row for each published archive and stage: samples read, kept, rejected by reason, seconds."""
    table = _table(spec.slug, "archive", "stage", "read", "kept", "rejected", "reasons", "MB", "seconds")
    ledgers = [ledger for stage_dir in stage_dirs for ledger in published_ledgers(spec, stage_dir)]
    order = {archive: number for number, archive in enumerate(spec.archives)}
    previous = None
    for ledger in sorted(ledgers, key=lambda ledger: order[ledger.archive]):
        if previous not in (None, ledger.archive):
            table.add_section()
        table.add_row(
            "" if previous == ledger.archive else ledger.archive,
            ledger.stage,
            f"{ledger.read:,}",
            f"{ledger.kept:,}",
            f"{ledger.rejected_count:,}",
            _reasons({reason: len(keys) for reason, keys in ledger.rejected.items()}),
            f"{ledger.bytes_out / 1e6:,.1f}",
            f"{ledger.seconds:,.1f}",
        )
        previous = ledger.archive
    console().print(table)


def print_totals(spec: DatasetSpec, totals: Iterable[StageTotals]) -> None:
    """A row for each stage of a dataset: archives and samples."""
    table = _table(spec.slug, "stage", "archives", "of", "read", "kept", "rejected", "reasons", "GB", "hours")
    for stage in totals:
        table.add_row(
            stage.stage,
            f"{stage.archives:,}",
            f"{len(spec.archives):,}",
            f"{stage.read:,}",
            f"{stage.kept:,}",
            f"{sum(stage.rejected.values()):,}",
            _reasons(stage.rejected),
            f"{stage.bytes_out / 1e9:,.2f}",
            f"{stage.seconds / 3600:,.2f}",
        )
    console().print(table)


def print_verdicts(verdicts: Iterable[tuple[str, str, Verdict]]) -> int:
    """A line for each failed check, given as (stage, archive, verdict), and a summary; returns how many failed."""
    shown, passed, failed = console(), 0, 0
    for stage, archive, verdict in verdicts:
        if verdict.passed:
            passed += 1
        else:
            failed += 1
            # As it is: paths and names may hold what rich takes for markup.
            line = f"FAILED {stage} {archive} {verdict.check}: {verdict.what}"
            shown.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
    shown.print(f"{passed} checks passed, {failed} failed", highlight=False)
    return failed


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_text = column in ("archive", "stage", "reasons")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "reasons")
    return table


def _reasons(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejected.items()))
