"""The report as pictures: what became of the samples, how fast they were encoded, how latents differ by archive.

Here: drawing, with matplotlib, which is imported when something is drawn. Not here: the numbers (`stages.report`).
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from md_assets.stages.drift import MIN_ARCHIVES
from md_assets.stages.latent_statistics import CAPTION_NORM
from md_assets.stages.report import LatentsGroup, Report, StageCounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_PX, DPI = 540, 100
"""The UI's dialog shows a picture of this width without scaling it; 8 pt are 11 px then."""

HEADING_INCHES, TITLE_INCHES, ROW_INCHES, FOOT_INCHES = 0.2, 0.22, 1.0, 0.2
"""Of the picture of latents: above it, above each row, for each row with its title, below it."""

COLORS = 32
"""Of the PNG's palette: it makes the picture three times smaller, and nobody sees it."""

STYLE: Any = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "text.color": "#333333",
    "axes.labelcolor": "#333333",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.borderpad": 0,
    "figure.constrained_layout.h_pad": 0.08,
}

DONE_COLORS = {"latents": "#1b7f79", "mds, not encoded": "#7cc4bd", "raw, not in mds": "#cfe8e5"}
REJECT_COLORS = ("#d1495b", "#edae49", "#8d6a9f", "#c98b6b")
OTHER_COLOR = "#9a9a9a"
OUTLIER_COLOR = "#d40000"
LINE_COLOR = "#1b7f79"
CHANNEL_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
"""Of Okabe and Ito's palette, which people with colour blindness tell apart."""

REASONS_SHOWN = len(REJECT_COLORS)
GROUPS_SHOWN = 12
DOTS = 120
"""Archives of which each gets a place of its own; of more, the lowest, median and highest of neighbours are drawn."""


def samples_picture(report: Report) -> str | None:
    """A data URI: of each dataset's samples, how many are where and why others were rejected; images encoded per second
    over time. None where nothing is published."""
    rows = fates(report)
    return _drawn(_draw_samples, rows, report) if rows else None


def latents_picture(report: Report) -> str | None:
    """A data URI: mean and std of each channel of the largest image latents, and the captions' norm, by archive, with
    outliers in red. None where there are no statistics."""
    groups = [group for group in report.groups if group.measured][:GROUPS_SHOWN]
    return _drawn(_draw_groups, groups, report) if groups else None


def fates(report: Report) -> list[tuple[str, Counter[str]]]:
    """What became of the samples of each dataset, once for each of its latents: `latents`, `mds, not encoded`,
    `raw, not in mds`, and `rejected: ` with a reason -> samples."""
    rows = []
    for dataset in dict.fromkeys(count.stage_dir.dataset for count in report.counts):
        of = [c for c in report.counts if c.stage_dir.dataset == dataset and not c.stage_dir.subset]
        raw, mds = ([c for c in of if c.stage_dir.stage == stage] for stage in ("raw", "mds"))
        latents: Sequence[StageCounts | None] = [c for c in of if c.stage_dir.stage == "latents"] or [None]
        for one in latents:
            tag = one.stage_dir.path.name.removeprefix("mds_latents_") if one and len(latents) > 1 else ""
            kept = _sum(c.kept for c in mds)
            encoded = one.kept if one else 0
            fate = Counter({"latents": encoded, "mds, not encoded": max(kept - encoded, 0)})
            fate["raw, not in mds"] = max(_sum(c.kept for c in raw) - _sum(c.read for c in mds), 0)
            for count in (*raw, *mds):
                for reason, samples in count.rejected.items():
                    fate[f"rejected: {reason}"] += samples
            rows.append((f"{dataset} {tag}".strip(), fate))
    return rows


def _sum(numbers: Iterable[int]) -> int:
    return sum(numbers)


def _draw_samples(rows: Sequence[tuple[str, Counter[str]]], report: Report) -> Figure:
    heights = [0.22 * len(rows) + 0.95, *([1.25] if report.throughput else [])]
    figure = _figure(sum(heights))
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_fates(axes[0], rows)
    if report.throughput:
        _draw_throughput(axes[1], report)
    return figure


def _draw_groups(groups: Sequence[LatentsGroup], report: Report) -> Figure:
    height = HEADING_INCHES + ROW_INCHES * len(groups) + FOOT_INCHES
    figure = _figure(height, layout=None)  # rows of the same height, whatever is at their sides
    place = {"top": 1 - (HEADING_INCHES + TITLE_INCHES) / height, "bottom": FOOT_INCHES / height, "hspace": 0.45}
    place |= {"left": 0.075, "right": 0.99, "wspace": 0.34}
    grid = figure.subplots(len(groups), 3, squeeze=False, gridspec_kw=place)
    for axes, group in zip(grid, groups, strict=True):
        outliers = [outlier for of, outlier in report.outliers if of is group]
        flagged = {(outlier.statistic, outlier.archive) for outlier in outliers}
        largest = [name.partition(" ")[0] for name in group.names if name.startswith("latents_")][-1:]
        beginnings = [f"{column} {kind} of" for column in largest for kind in ("mean", "std")]
        for panel, beginning in zip(axes, [*beginnings, f"{CAPTION_NORM} mean"], strict=True):
            names = [name for name in group.names if name.startswith(beginning)]
            _draw_statistics(panel, group, names, flagged)
        unlike = f"{len({one.archive for one in outliers}):,} unlike the others" if group.judged else "too few to judge"
        archives = f"{len(group.measured):,} archive{'s' if len(group.measured) > 1 else ''}"
        axes[0].set_title(f"{report.label(group)}: {archives}, {unlike}", fontweight="bold")
    for panel, heading in zip(
        grid[0], ("mean of each channel", "std of each channel", "norm of captions"), strict=True
    ):
        panel.annotate(heading, (0, 1), (0, 22), "axes fraction", textcoords="offset points")
    grid[-1, 0].set_xlabel("archives in upstream's order", loc="left")
    return figure


def _draw_fates(axes: Axes, rows: Sequence[tuple[str, Counter[str]]]) -> None:
    reasons: Counter[str] = Counter()
    for _, fate in rows:
        reasons += Counter({name: samples for name, samples in fate.items() if name.startswith("rejected")})
    shown = [reason for reason, _ in reasons.most_common(REASONS_SHOWN)]
    colors = {**DONE_COLORS, **dict(zip(shown, REJECT_COLORS, strict=False))}
    if len(reasons) > len(shown):
        colors["rejected: other"] = OTHER_COLOR
    totals = [max(sum(fate.values()), 1) for _, fate in rows]
    left = np.zeros(len(rows))
    for name, color in colors.items():
        others = [reason for reason in reasons if reason not in shown] if name == "rejected: other" else [name]
        samples = [sum(fate[other] for other in others) for _, fate in rows]
        part = 100 * np.array(samples) / totals
        if part.any():
            axes.barh(range(len(rows)), part, left=left, color=color, label=name, height=0.68)
        left += part
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xticks([0, 50, 100], ["0", "50 %", "100 %"])
    for number, (_, fate) in enumerate(rows):
        axes.text(101, number, short(sum(fate.values())), va="center")
    axes.set_title("Samples read, and what became of them")
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.9 / (len(rows) + 1)), ncols=3, columnspacing=1, handlelength=1)


def _draw_throughput(axes: Axes, report: Report) -> None:
    from matplotlib import dates

    untyped: Any = dates
    spans = report.throughput
    edges: Any = [datetime.fromtimestamp(one.begin_s, timezone.utc) for one in spans]
    edges.append(datetime.fromtimestamp(spans[-1].end_s, timezone.utc))
    axes.stairs([one.rows_per_s for one in spans], edges, fill=True, color=LINE_COLOR, alpha=0.85)
    locator = untyped.AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(untyped.ConciseDateFormatter(locator))
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    axes.set_title("Images encoded per second of work, all processes together (UTC)")


def _draw_statistics(axes: Axes, group: LatentsGroup, names: Sequence[str], flagged: set[tuple[str, str]]) -> None:
    """One line for each of the statistics `names`, over the archives."""
    archives = group.measured
    for number, name in enumerate(names):
        color = CHANNEL_COLORS[number % len(CHANNEL_COLORS)] if len(names) > 1 else LINE_COLOR
        values = np.array([archive.statistics.get(name, np.nan) for archive in archives])
        places, low, middle, high = _condensed(values)
        if len(places) < len(values):
            axes.fill_between(places, low, high, color=color, alpha=0.3, linewidth=0)
            axes.plot(places, middle, color=color, linewidth=0.6)
        else:
            size = 5 if len(values) < MIN_ARCHIVES else 2.5
            axes.plot(places, middle, color=color, linewidth=0.5, marker=".", markersize=size, markeredgewidth=0)
        red = [at for at, archive in enumerate(archives) if (name, archive.archive) in flagged]
        axes.plot(red, values[red], "o", color=OUTLIER_COLOR, markersize=3.2, fillstyle="none", markeredgewidth=0.9)
    axes.set_xticks([])
    axes.margins(x=0.02, y=0.12)
    axes.locator_params(axis="y", nbins=4)


def _condensed(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Places on the axis, lowest, median and highest value of the neighbours at each."""
    parts = np.array_split(np.arange(len(values)), min(len(values), DOTS))
    places = np.array([part.mean() for part in parts])
    return (places, *(np.array([of(values[part]) for part in parts]) for of in (np.nanmin, np.nanmedian, np.nanmax)))


def short(count: float) -> str:
    """A count for a label: 1,234 or 13.8 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if count >= unit:
            return f"{count / (1e3 if unit == 1e4 else unit):.3g}{name}"
    return f"{count:,.0f}"


def _drawn(draw: Callable[..., Figure], *arguments: Any) -> str:
    """What `draw` draws of the arguments, as a data URI."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        drawn, small = io.BytesIO(), io.BytesIO()
        draw(*arguments).savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(small, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


def _figure(height_inches: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_PX / DPI, height_inches), dpi=DPI, layout=layout)
