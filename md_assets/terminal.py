"""Tables for the terminal: what `md-assets` prints.

Here: showing values that others computed. Not here: computing them, see `stages.status` and `stages.verify`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from md_assets.core.names import first_of
from md_assets.core.paths import StageDir
from md_assets.core.spec import DatasetSpec
from md_assets.core.verdict import Verdict
from md_assets.stages.status import StageTotals, recorded_ledgers

if TYPE_CHECKING:
    from md_assets.orchestration.failures import FailedArchive
    from md_assets.stages.prune import PruneReport

PLAIN_WIDTH = 160
"""Columns where the output is no terminal: a log or a pipe shows the whole table."""

FAILED_SHOWN = 50
"""Failed archives of one dataset that are named."""


def console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough for a log."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=PLAIN_WIDTH)


def print_archives(spec: DatasetSpec, stage_dirs: Iterable[StageDir]) -> None:
    """A row for each archive and stage, published or pruned: samples read, kept, rejected by reason, seconds."""
    table = _table(spec.slug, "archive", "stage", "read", "kept", "rejected", "reasons", "MB", "seconds")
    ledgers = [(stage_dir, ledger) for stage_dir in stage_dirs for ledger in recorded_ledgers(spec, stage_dir)]
    order = {archive: number for number, archive in enumerate(spec.archives)}
    previous = None
    for stage_dir, ledger in sorted(ledgers, key=lambda found: order[found[1].archive]):
        if previous not in (None, ledger.archive):
            table.add_section()
        table.add_row(
            "" if previous == ledger.archive else ledger.archive,
            f"{stage_dir.asset} (pruned)" if ledger.pruned else stage_dir.asset,
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
    archives, samples = ("done", "failed", "stale", "pruned", "missing"), ("read", "kept", "rejected", "reasons")
    table = _table(spec.slug, "stage", *archives, *samples, "GB", "hours")
    for stage in totals:
        table.add_row(
            stage.stage,
            f"{stage.done:,}",
            "" if stage.failed is None else f"{stage.failed:,}",
            f"{stage.stale:,}",
            f"{stage.pruned:,}",
            f"{stage.missing:,}",
            f"{stage.read:,}",
            f"{stage.kept:,}",
            f"{sum(stage.rejected.values()):,}",
            _reasons(stage.rejected),
            f"{stage.bytes_out / 1e9:,.2f}",
            f"{stage.seconds / 3600:,.2f}",
        )
    console().print(table)


def print_stale(spec: DatasetSpec, totals: Iterable[StageTotals]) -> None:
    """For each stage with stale archives in what they differ: `images.jpeg_quality: 90 in 12 archives, 95 wanted`."""
    for stage in totals:
        if stage.stale:
            _line(f"{spec.slug}/{stage.stage}: {stage.stale:,} archives are stale")
        for group in stage.stale_groups:
            difference, count = group.difference, f"{len(group.archives):,} archives"
            if difference.is_input:
                what = f"{difference.what} changed after {count} were made"
            else:
                found, wanted = map(_setting, (difference.found, difference.wanted))
                what = f"{difference.what}: {found} in {count}, {wanted} wanted"
            _line(f"  {what} ({first_of(group.archives)})")


def print_failed(failed: Sequence[FailedArchive]) -> None:
    """A line for each failed archive of a dataset, as far as a person reads them, and its reason."""
    for one in failed[:FAILED_SHOWN]:
        attempt = f"attempt {one.attempt}, " if one.attempt > 1 else ""
        kind = f"{attempt}{one.reason}, {'may pass' if one.transient else 'permanent'}"
        _line(f"FAILED {one.asset.to_user_string()}: {one.why} ({kind})")
    if len(failed) > FAILED_SHOWN:
        _line(f"and {len(failed) - FAILED_SHOWN:,} more; --json has all of them")


def print_pruned(report: PruneReport) -> None:
    """What was removed of a dataset, or would be, and why the rest stays."""
    title = f"{report.dataset}: {'would be removed' if report.dry_run else 'removed'}"
    table = _table(title, "stage", "archives", "bytes")
    for name, count in report.archives.items():
        table.add_row(name, f"{count:,}", f"{report.bytes[name]:,}")
    table.add_row("together", "", f"{sum(report.bytes.values()):,}")
    console().print(table)
    for why, archives in report.kept_back_groups().items():
        _line(f"{report.dataset}: not pruned, {why}: {len(archives):,} archives ({first_of(archives)})")


def print_verdicts(verdicts: Iterable[tuple[str, str, Verdict]]) -> int:
    """A line for each failed check, given as (stage, archive, verdict), and a summary; returns how many failed."""
    shown, passed, failed = console(), 0, 0
    for stage, archive, verdict in verdicts:
        if verdict.passed:
            passed += 1
        else:
            failed += 1
            _line(f"FAILED {stage} {archive} {verdict.check}: {verdict.what}")
    shown.print(f"{passed} checks passed, {failed} failed", highlight=False)
    return failed


def _line(text: str) -> None:
    """A line as it is: paths and names may hold what rich takes for markup."""
    console().print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


def _setting(value: Any) -> str:
    return "absent" if value is None else str(value)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_text = column in ("archive", "stage", "reasons")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "reasons")
    return table


def _reasons(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(rejected.items()))
