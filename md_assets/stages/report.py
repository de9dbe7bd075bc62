"""report: what there is of all datasets, how fast it was encoded, and which archives' latents are unlike the others'.

Told from the ledgers, which takes seconds for 18,000 archives in three stages. Only where a ledger has no statistics of
its latents, as they were encoded before these were kept, some rows are read.

Here: gathering and adding up. Not here: the statistics (`stages.latent_statistics`), the rule for outliers
(`stages.drift`), the picture (`stages.report_plot`), and where it is shown (`orchestration.report`).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import LedgerNumbers
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.spec import DatasetSpec
from md_assets.stages.drift import MIN_ARCHIVES, Outlier, find_outliers
from md_assets.stages.latent_statistics import ENCODED_AT, STATISTICS, named_values, sampled_statistics
from md_assets.stages.status import stages_of, whole_numbers
from md_assets.storage.publish import read_numbers

SAMPLED_ARCHIVES = 100
"""Archives without statistics of which a report reads rows; the others are only counted."""

SAMPLED_ROWS = 32
"""Of each of them: 6 MB of 200 KB each."""

BIN_WIDTHS_S = (60, 300, 900, 3600, 3 * 3600, 6 * 3600, 86400, 7 * 86400, 28 * 86400)

MAX_BINS = 48
"""Of the time axis: the narrowest bins of which there are not more."""


@dataclass
class StageCounts:
    """One stage of one dataset, added up over its published and pruned archives.

    Attributes:
        stage_dir: which one.
        archives: all of the dataset.
        published: those that are counted here.
        read, kept: samples.
        rejected: samples by reason.
        bytes_out: published bytes that are there; without what was pruned.
        seconds: of work, summed over archives.
    """

    stage_dir: StageDir
    archives: int
    published: int = 0
    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    bytes_out: int = 0
    seconds: float = 0.0

    def add(self, numbers: LedgerNumbers) -> None:
        """Add an archive."""
        self.published += 1
        self.read += numbers.read
        self.kept += numbers.kept
        self.rejected.update(numbers.rejected)
        self.bytes_out += 0 if numbers.pruned else numbers.bytes_out
        self.seconds += numbers.seconds


@dataclass(frozen=True)
class EncodedArchive:
    """The latents of one archive.

    Attributes:
        archive: its ID.
        rows: all it has.
        began_s, ended_s: when it was encoded, Unix time.
        rows_measured: of which there are statistics; fewer than `rows` where rows were sampled.
        statistics: see `latent_statistics.named_values`; empty where there are none.
    """

    archive: str
    rows: int
    began_s: float
    ended_s: float
    rows_measured: int = 0
    statistics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LatentsGroup:
    """Archives of a dataset that were encoded with the same settings, in upstream's order.

    Attributes:
        stage_dir: where they are.
        fingerprint: of the settings.
        archives: published ones.
    """

    stage_dir: StageDir
    fingerprint: str
    archives: tuple[EncodedArchive, ...]

    @cached_property
    def measured(self) -> list[EncodedArchive]:
        """Those with statistics."""
        return [archive for archive in self.archives if archive.statistics]

    @property
    def sampled(self) -> int:
        """Archives of which only some rows are measured."""
        return sum(archive.rows_measured < archive.rows for archive in self.measured)

    @property
    def unmeasured(self) -> list[str]:
        """IDs of archives that have rows and no statistics."""
        return [archive.archive for archive in self.archives if archive.rows and not archive.statistics]

    @property
    def judged(self) -> bool:
        """Whether there are enough archives to tell outliers."""
        return len(self.measured) >= MIN_ARCHIVES

    @cached_property
    def names(self) -> list[str]:
        """Of the statistics."""
        return list(dict.fromkeys(name for archive in self.measured for name in archive.statistics))


@dataclass(frozen=True)
class Span:
    """A bin of the time axis.

    Attributes:
        begin_s, end_s: Unix time.
        rows: encoded meanwhile; an archive's rows are spread evenly over the time that it took.
        busy_s: for how long at least one archive was in work.
    """

    begin_s: float
    end_s: float
    rows: float
    busy_s: float

    @property
    def rows_per_s(self) -> float:
        """Rows encoded per second of work, by all processes together; 0 where nothing was encoded."""
        return self.rows / self.busy_s if self.busy_s else 0.0


@dataclass(frozen=True)
class Report:
    """What was gathered.

    Attributes:
        counts: of every stage that has a published archive, by dataset and in the order in which stages follow.
        groups: latents of whole datasets; those of subsets are the same rows.
    """

    counts: tuple[StageCounts, ...]
    groups: tuple[LatentsGroup, ...]

    @property
    def tests(self) -> int:
        """Statistics of archives that are compared with those of others."""
        return sum(len(group.measured) * len(group.names) for group in self.groups if group.judged)

    @cached_property
    def outliers(self) -> list[tuple[LatentsGroup, Outlier]]:
        """All outliers with their groups, the furthest first."""
        found = []
        for group in filter(lambda group: group.judged, self.groups):
            of = group.measured
            archives, rows = [one.archive for one in of], [one.rows_measured for one in of]
            outliers = find_outliers(archives, rows, [one.statistics for one in of], self.tests)
            found += [(group, outlier) for outlier in outliers]
        return sorted(found, key=lambda pair: -abs(pair[1].score))

    @cached_property
    def throughput(self) -> list[Span]:
        """Encoding over time, from the first archive to the last."""
        return spans([archive for group in self.groups for archive in group.archives if archive.rows])

    def label(self, group: LatentsGroup) -> str:
        """What to call a group: its dataset, with the encoders where the dataset has latents of several, and with the
        fingerprint where these were made with different settings."""
        alike = [other for other in self.groups if other.stage_dir.dataset == group.stage_dir.dataset]
        label = group.stage_dir.dataset
        if any(other.stage_dir != group.stage_dir for other in alike):
            label += f" {group.stage_dir.path.name.removeprefix('mds_latents_')}"
        if sum(other.stage_dir == group.stage_dir for other in alike) > 1:
            label += f" @{group.fingerprint[:6]}"
        return label


def gather(
    specs: Iterable[DatasetSpec],
    root: DataRoot,
    *,
    sampled_archives: int = SAMPLED_ARCHIVES,
    sampled_rows: int = SAMPLED_ROWS,
) -> Report:
    """Read the ledgers of all stages of all datasets.

    Args:
        specs: the datasets.
        root: where they are.
        sampled_archives: archives without statistics of which rows are read, spread evenly over all of them.
        sampled_rows: how many rows of each.

    What has no ledger, or one that cannot be read, is not there.
    """
    counts: list[StageCounts] = []
    groups: list[LatentsGroup] = []
    for spec in specs:
        for stage_dir, _ in stages_of(root, spec) if (root.path / spec.slug).is_dir() else ():
            count = StageCounts(stage_dir, len(spec.archives))
            encoded: dict[str, list[EncodedArchive]] = {}
            for archive in spec.archives:
                if numbers := whole_numbers(stage_dir, archive):
                    count.add(numbers)
                    if stage_dir.stage == "latents" and not stage_dir.subset:
                        encoded.setdefault(numbers.fingerprint, []).append(_encoded(stage_dir, numbers))
            counts += [count] if count.published else []
            groups += [LatentsGroup(stage_dir, fingerprint, tuple(of)) for fingerprint, of in encoded.items()]
    return Report(tuple(counts), tuple(_with_samples(groups, sampled_archives, sampled_rows)))


def _encoded(stage_dir: StageDir, numbers: LedgerNumbers) -> EncodedArchive:
    statistics = numbers.details.get(STATISTICS, {})
    try:
        ended_s = datetime.fromisoformat(numbers.details[ENCODED_AT]).timestamp()
    except (KeyError, ValueError):  # of before it was recorded: nothing writes a latents ledger again
        ended_s = stage_dir.ledger(numbers.archive).stat().st_mtime
    return EncodedArchive(
        archive=numbers.archive,
        rows=numbers.kept,
        began_s=ended_s - numbers.seconds,
        ended_s=ended_s,
        rows_measured=statistics.get("rows", 0),
        statistics=named_values(statistics),
    )


def _with_samples(groups: Sequence[LatentsGroup], archives: int, rows: int) -> Iterator[LatentsGroup]:
    """The groups; of some archives without statistics, `rows` rows are read for that."""
    missing = [(group.stage_dir, archive) for group in groups for archive in group.unmeasured]
    count = min(len(missing), archives)
    chosen = {missing[number * len(missing) // count] for number in range(count)}
    for group in groups:
        with_samples = [
            _sampled(group.stage_dir, one, rows) if (group.stage_dir, one.archive) in chosen else one
            for one in group.archives
        ]
        yield replace(group, archives=tuple(with_samples))


def _sampled(stage_dir: StageDir, one: EncodedArchive, rows: int) -> EncodedArchive:
    """With what reading some rows tells; unchanged where they are damaged, which checks are there to find."""
    try:
        ledger = read_numbers(stage_dir.ledger(one.archive))
        statistics = sampled_statistics(stage_dir.data(one.archive), ledger.details if ledger else {}, rows)
    except (MdAssetsError, OSError, KeyError, TypeError, ValueError, struct.error):
        return one
    return replace(one, rows_measured=statistics["rows"], statistics=named_values(statistics))


def spans(archives: Sequence[EncodedArchive]) -> list[Span]:
    """Encoding over time, in bins that begin at round times of UTC."""
    if not archives:
        return []
    times = np.array([(one.began_s, one.ended_s, one.rows) for one in archives])
    began, ended, rows = times.T
    began = np.minimum(began, ended - 1e-3)  # what took no time at all still happened
    whole_s = ended.max() - began.min()
    width_s = next((width for width in BIN_WIDTHS_S if whole_s <= width * (MAX_BINS - 1)), BIN_WIDTHS_S[-1])
    edges = np.arange(began.min() // width_s, ended.max() // width_s + 2) * width_s
    merged = np.array(list(_merged(began, ended)))
    rows_until = [float((rows * np.clip((edge - began) / (ended - began), 0, 1)).sum()) for edge in edges]
    busy_until = [float(np.clip(edge - merged[:, 0], 0, merged[:, 1] - merged[:, 0]).sum()) for edge in edges]
    ends = list(zip(edges.tolist(), rows_until, busy_until, strict=True))
    return [
        Span(begin_s, end_s, rows_then - rows_before, busy_then - busy_before)
        for (begin_s, rows_before, busy_before), (end_s, rows_then, busy_then) in pairwise(ends)
    ]


def _merged(began: npt.NDArray[np.float64], ended: npt.NDArray[np.float64]) -> Iterator[tuple[float, float]]:
    """The times in which at least one archive was in work, without overlaps."""
    order = np.argsort(began)
    begin, end = began[order[0]], ended[order[0]]
    for at in order[1:]:
        if began[at] > end:
            yield begin, end
            begin, end = began[at], ended[at]
        end = max(end, ended[at])
    yield begin, end
