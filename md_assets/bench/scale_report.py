"""The figures of the scale benchmark, what they are held to, and how they are told.

Here: values and lines of text. Not here: measuring them (`bench.scale`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from md_assets.core.paths import ARCHIVE_STAGES

PER_ARCHIVE_STAGE_LIMIT_S, GROWTH_LIMIT = 0.25, 1.2
PASSED_OVER_LIMIT_MS, PARTITIONS_LIMIT_S, STATUS_LIMIT_S, TICK_LIMIT_S = 10.0, 2.0, 5.0, 30.0
"""What the platform is held to, see `docs/benchmarks.md`."""


@dataclass(frozen=True)
class Range:
    """Values of something that was measured several times."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def worst(self) -> float:
        return max(self.values)


@dataclass(frozen=True)
class Figures:
    """One backfill, and what was measured on its result.

    Attributes:
        storage: see `STORAGES`.
        archives: how many, each in three stages.
        seconds: from launching the backfill to its end, merged indexes with it.
        runs: of each asset, by the last part of its key.
        run_s: of each stage, wall seconds of its runs from their start to their end.
        processor_s: of the runs, each service and PostgreSQL, what they took until the backfill's end.
        memory_mib: service -> resident memory when the backfill began, when it ended, and the most of all time.
        partitions_s: stage -> of its partition statuses in the UI: the first time and the second.
        status_s: of `md-assets status`, process and all.
        ticks: of the audit: results stored, seconds.
        passed_over_ms: stage -> of passing over one archive, without recording that.
        passed_over_in_run_ms: stage -> from one archive to the next in a run that passes over all of its archives.
        records_bytes: of Dagster's records; 0 where a server keeps them.
    """

    storage: str
    archives: int
    seconds: float
    runs: Mapping[str, int]
    run_s: Mapping[str, Range]
    processor_s: Mapping[str, float]
    memory_mib: Mapping[str, tuple[float, float, float]]
    partitions_s: Mapping[str, tuple[float, float]]
    status_s: float
    ticks: tuple[tuple[int, float], ...]
    passed_over_ms: Mapping[str, Range]
    passed_over_in_run_ms: Mapping[str, Range]
    records_bytes: int

    @property
    def per_archive_stage_s(self) -> float:
        """Wall seconds for each archive and stage."""
        return self.seconds / self.archives / len(ARCHIVE_STAGES)

    @property
    def processor_ms(self) -> dict[str, float]:
        """The same of processor time, in ms."""
        return {name: s * 1000 / self.archives / len(ARCHIVE_STAGES) for name, s in self.processor_s.items()}


def report(figures: Figures) -> str:
    """What was measured, in lines, each with what it is held to."""
    f = figures
    memory = ", ".join(f"{name} {a:.0f} → {b:.0f} (most {c:.0f})" for name, (a, b, c) in f.memory_mib.items())
    runs = ", ".join(f"{asset} {count}" for asset, count in f.runs.items())
    stages = ", ".join(
        f"{stage} {f.run_s[stage].median:.1f} s ({sum(f.run_s[stage].values) / f.archives:.3f} s for each archive)"
        for stage in ARCHIVE_STAGES
    )
    passed, in_run = (
        ", ".join(f"{stage} {ms.median:.1f} (worst {ms.worst:.1f})" for stage, ms in of.items())
        for of in (f.passed_over_ms, f.passed_over_in_run_ms)
    )
    processor = ", ".join(f"{name} {ms:.1f}" for name, ms in f.processor_ms.items())
    partitions = ", ".join(
        f"{stage} {first:.2f} s, again {again:.2f}" for stage, (first, again) in f.partitions_s.items()
    )
    ticks = ", ".join(f"{results} results in {seconds:.1f} s" for results, seconds in f.ticks)
    lines = [
        f"{f.archives:,} archives, {f.storage}: backfill of three stages in {f.seconds:,.0f} s, "
        f"{f.per_archive_stage_s:.3f} s for each archive and stage (limit {PER_ARCHIVE_STAGE_LIMIT_S})",
        f"runs: {runs}; medians from start to end: {stages}",
        f"processor time for each archive and stage: {sum(f.processor_ms.values()):.1f} ms: {processor}",
        f"memory, MiB: {memory}",
        f"partition statuses in the UI: {partitions} (limit {PARTITIONS_LIMIT_S:.0f}); "
        f"md-assets status: {f.status_s:.1f} s (limit {STATUS_LIMIT_S:.0f})",
        f"ticks of the audit: {ticks} (limit {TICK_LIMIT_S:.0f} s)",
        f"passing over, ms: {passed} (limit {PASSED_OVER_LIMIT_MS:.0f}); recorded by a run: {in_run}",
    ]
    return "\n  ".join(lines + ([f"Dagster's records: {f.records_bytes / 1e6:,.0f} MB"] if f.records_bytes else []))


def report_growth(figures: Sequence[Figures]) -> str:
    """How the time for an archive and stage grows from the fewest archives of a storage to more, in lines."""
    lines = []
    for storage in dict.fromkeys(f.storage for f in figures):
        first, *others = sorted((f for f in figures if f.storage == storage), key=lambda f: f.archives)
        for more in others:
            wall = more.per_archive_stage_s / first.per_archive_stage_s
            processor = sum(more.processor_ms.values()) / sum(first.processor_ms.values())
            lines.append(
                f"{storage}, {more.archives:,} archives: {wall:.2f} times the time for each of {first.archives:,}, "
                f"{processor:.2f} times the processor time (limit {GROWTH_LIMIT})"
            )
    return "\n".join(lines)
