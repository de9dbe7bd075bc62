"""The asset `latents_report`: one page over all datasets, and the check `no_drift`.

It is made when somebody asks for it, or weekly once its schedule is turned on; never because an archive was encoded.

Here: the asset, its check, its tables, its schedule. Not here: the numbers (`stages.report`), which archives are
outliers (`stages.drift`), the pictures (`stages.report_plot`).
No `from __future__ import annotations`: Dagster reads the annotations of asset functions.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from statistics import median
from typing import TYPE_CHECKING, Any

import dagster as dg

from md_assets.core.names import first_of
from md_assets.core.paths import DataRoot
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.code_references import code_references

if TYPE_CHECKING:
    from md_assets.stages.report import LatentsGroup, Report

REPORT = dg.AssetKey("latents_report")
NO_DRIFT = "no_drift"

OUTLIERS_LISTED = 100
"""In the table; the others are counted."""


def report_asset(specs: Sequence[DatasetSpec]) -> Any:
    """The asset over `specs`."""

    @dg.asset(
        key=REPORT,
        deps=[dg.AssetKey([spec.slug, "latents"]) for spec in specs],
        group_name="report",
        owners=["team:data-platform"],
        kinds={"python", "markdown"},
        metadata=code_references(report_metadata, "report"),
        check_specs=[
            dg.AssetCheckSpec(
                NO_DRIFT,
                asset=REPORT,
                description="No archive's latents are unlike those of its dataset's others: means and standard "
                "deviations of channels, norms of captions, by a modified z-score. Fails as a warning.",
            )
        ],
        description="What there is of all datasets, from the ledgers on disk: samples by dataset and stage, rejects by "
        "reason, bytes, images encoded per second over time, and the latents' statistics by archive with outliers. "
        "Materialize it whenever you want to look.",
    )
    def latents_report() -> dg.MaterializeResult:
        from md_assets.stages.report import gather

        report = gather(specs, DataRoot.from_environment())
        return dg.MaterializeResult(metadata=report_metadata(report), check_results=[drift_result(report)])

    return latents_report


def report_schedule() -> dg.ScheduleDefinition:
    """The report once a week, after the refreshes; off until somebody turns it on."""
    return dg.ScheduleDefinition(
        name="weekly_latents_report",
        job=dg.define_asset_job(
            "make_latents_report", selection=[REPORT], description="Makes the report over all datasets."
        ),
        cron_schedule="0 6 * * 1",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Makes the report over all datasets every Monday.",
    )


def report_metadata(report: "Report") -> dict[str, Any]:
    """Tables, pictures, and numbers that Dagster draws over time."""
    from md_assets.stages.report_plot import latents_picture, samples_picture

    whole = [count for count in report.counts if not count.stage_dir.subset]
    pictures = {
        "samples_plot": _picture("what became of the samples", samples_picture(report)),
        "latents_plot": _picture("latents by archive", latents_picture(report)),
    }
    tables = {
        "samples": samples_table(report),
        "rejects": rejects_table(report),
        "throughput": throughput_table(report),
        "statistics": statistics_table(report),
        "outliers": outliers_table(report),
    }
    numbers = {
        **{f"samples_{stage}": sum(c.kept for c in whole if c.stage_dir.stage == stage) for stage in ("raw", "mds")},
        "samples_latents": sum(archive.rows for group in report.groups for archive in group.archives),
        "bytes": sum(count.bytes_out for count in report.counts),
        "archives_encoded": sum(len(group.archives) for group in report.groups),
        "archives_unlike_the_others": len({(group.stage_dir, one.archive) for group, one in report.outliers}),
        "archives_without_statistics": sum(len(group.unmeasured) for group in report.groups),
    }
    texts = {name: dg.MetadataValue.md(text) for name, text in (pictures | tables).items() if text}
    return {**texts, **numbers}


def drift_result(report: "Report") -> dg.AssetCheckResult:
    """The result of the check `no_drift`: it fails, as a warning, if there are outliers."""
    judged = sum(len(group.measured) for group in report.groups if group.judged)
    sampled = sum(group.sampled for group in report.groups)
    unlike = list(dict.fromkeys(f"{report.label(group)} {one.archive}" for group, one in report.outliers))
    if unlike:
        are = "is" if len(unlike) == 1 else "are"
        said = f"{len(unlike):,} of {judged:,} archives {are} unlike the others: {first_of(unlike)}"
    elif judged:
        said = f"{judged:,} archives are like the others of their datasets"
    else:
        said = "No dataset has enough archives with latents to compare them"
    return dg.AssetCheckResult(
        check_name=NO_DRIFT,
        passed=not unlike,
        severity=dg.AssetCheckSeverity.WARN,
        description=said,
        metadata={
            "archives_judged": judged,
            "archives_sampled": sampled,
            "statistics_compared": report.tests,
            "outliers": dg.MetadataValue.md(outliers_table(report)),
        },
    )


def samples_table(report: "Report") -> str:
    """Markdown: a row for each dataset and stage."""
    rows = []
    for count in report.counts:
        archives = f"{count.published:,} of {count.archives:,}"
        numbers = [f"{number:,}" for number in (count.read, count.kept, count.rejected.total(), count.bytes_out)]
        rows.append((count.stage_dir.dataset, f"`{count.stage_dir.path.name}`", archives, *numbers))
    return _table(("dataset", "stage"), ("archives", "read", "kept", "rejected", "bytes"), rows)


def rejects_table(report: "Report") -> str:
    """Markdown: a row for each dataset, stage and reason. Narrow, as the UI cuts short tables off."""
    rows = []
    for count in report.counts:
        where = f"{count.stage_dir.dataset} {count.stage_dir.asset}"
        for reason, samples in count.rejected.most_common():
            rows.append((where, reason, f"{samples:,}", f"{samples / count.read:.2%}"))
    return _table(("by", "reason"), ("samples", "of read"), rows)


def throughput_table(report: "Report") -> str:
    """Markdown: a row for each span of time in which something was encoded."""
    rows = [
        (
            f"{datetime.fromtimestamp(span.begin_s, timezone.utc):%Y-%m-%d %H:%M}",
            f"{span.rows_per_s:,.1f}",
            f"{span.rows:,.0f}",
            f"{span.busy_s:,.0f}",
        )
        for span in report.throughput
        if span.busy_s
    ]
    return _table(("from (UTC)",), ("images/s", "images", "seconds of work"), rows)


def statistics_table(report: "Report") -> str:
    """Markdown: of each statistic, the median, lowest and highest archive of each dataset."""
    rows = []
    for group in report.groups:
        for name in group.names:
            found = {one.archive: one.statistics[name] for one in group.measured if name in one.statistics}
            low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
            ends = (f"{found[end]:.5g} ({end})" for end in (low, high))
            rows.append((report.label(group), name, f"{median(found.values()):.5g}", *ends))
    text = _table(("dataset", "statistic"), ("median of archives", "lowest", "highest"), rows)
    return "\n\n".join(filter(None, (text, *(_without_statistics(report, group) for group in report.groups))))


def _without_statistics(report: "Report", group: "LatentsGroup") -> str:
    lines = []
    if group.sampled:
        lines.append(f"{report.label(group)}: some rows of {group.sampled:,} archives were read for this, since their")
        lines.append("ledgers have no statistics.")
    if missing := group.unmeasured:
        lines.append(f"{report.label(group)}: no statistics of {len(missing):,} archives ({first_of(missing)}).")
    return " ".join(lines)


def outliers_table(report: "Report") -> str:
    """Markdown: a row for each statistic of an archive that is an outlier, the furthest first."""
    rows = [
        (
            f"{report.label(group)} {one.archive}",
            f"{one.value:.5g}",
            f"{one.median:.5g}",
            f"{one.score:+.1f}",
            one.statistic,
        )
        for group, one in report.outliers[:OUTLIERS_LISTED]
    ]
    table = _table(("archive",), ("value", "median of archives", "modified z-score", "statistic"), rows)
    more = len(report.outliers) - len(rows)
    few = [report.label(group) for group in report.groups if not group.judged]
    lines = [table or "None."] + ([f"And {more:,} more."] if more else [])
    return "\n\n".join(lines + ([f"Too few archives to judge: {', '.join(few)}."] if few else []))


def _picture(what: str, uri: str | None) -> str:
    return f"![{what}]({uri})" if uri else ""


def _table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, columns of numbers aligned to the right; empty without rows."""
    lines = [" | ".join((*words, *numbers)), " | ".join(("---",) * len(words) + ("---:",) * len(numbers))]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) if len(lines) > 2 else ""
