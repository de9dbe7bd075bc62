"""drift: which archives' latents are unlike those of the others.

As long as nothing is wrong with data or encoders, a statistic of one archive is like those of its dataset's others. It
is compared with their median by the modified z-score of Iglewicz and Hoaglin ("How to Detect and Handle Outliers", ASQC
1993; also section 1.3.5.17 of the NIST/SEMATECH e-Handbook of Statistical Methods), which a few archives that are far
off hardly move.

Here: the rule. Not here: the statistics (`stages.latent_statistics`), and gathering them (`stages.report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

MIN_ARCHIVES = 20
"""With fewer nothing is judged: the cutoff would have to be so high that little would be found."""

MAD_TO_SIGMA = 0.6745
"""Median absolute deviation of a normal distribution, in its standard deviations."""

MEAN_AD_TO_SIGMA = 1.253314
"""Standard deviations of a normal distribution in one mean absolute deviation, which takes the place of the median one
where that is 0 (as more than half of the values are equal)."""

MIN_CUTOFF = 3.5
"""Of Iglewicz and Hoaglin, for one sample that somebody looks at."""

FALSE_ALARMS = 0.01
"""Reports that may flag something though all values are normal; there are many archives and statistics in one."""

FEW_ARCHIVES = 15
"""By so many parts in the number of archives the cutoff is raised, as the median absolute deviation of few archives is
uncertain itself. Simulated with normal values, of 20, 30, 50, 100 and 200 archives, it would have to be 16, 16, 14, 12
and 15; without it, every second report on 20 archives would flag one."""


@dataclass(frozen=True)
class Outlier:
    """One statistic of one archive that is far from those of the others.

    Attributes:
        archive: its ID.
        statistic: which one, see `latent_statistics.named_values`.
        value: of the archive.
        median: of all archives.
        score: modified z-score; negative below the median.
    """

    archive: str
    statistic: str
    value: float
    median: float
    score: float


def modified_z_scores(
    values: npt.NDArray[np.float64], rows: npt.NDArray[np.float64]
) -> tuple[float, npt.NDArray[np.float64]]:
    """The median of values, and how many robust standard deviations each is away from it.

    Args:
        values: a statistic of each archive.
        rows: of each archive. A mean of fewer rows scatters more, by the root of their number: scores of archives with
            fewer rows than most are made smaller by that.
    """
    median = float(np.median(values))
    deviations = values - median
    sigma = float(np.median(np.abs(deviations))) / MAD_TO_SIGMA or float(np.abs(deviations).mean()) * MEAN_AD_TO_SIGMA
    if not sigma:
        return median, np.zeros_like(values)
    return median, deviations / sigma * np.sqrt(np.minimum(rows / np.median(rows), 1))


def cutoff(tests: int, archives: int) -> float:
    """The score from which on a statistic of one of so many archives is flagged, where so many scores are looked at."""
    normal = NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * max(tests, 1)))
    return max(MIN_CUTOFF, normal) * (1 + FEW_ARCHIVES / archives)


def find_outliers(
    archives: Sequence[str], rows: Sequence[int], statistics: Sequence[Mapping[str, float]], tests: int
) -> list[Outlier]:
    """The outliers among archives that were encoded alike, the furthest first; none where there are too few archives.

    Args:
        archives: IDs.
        rows: samples that each archive's statistics are of.
        statistics: of each archive, see `latent_statistics.named_values`.
        tests: scores that are looked at together, in other datasets too.
    """
    found: list[Outlier] = []
    for name in dict.fromkeys(name for of_archive in statistics for name in of_archive):
        having = [number for number, of_archive in enumerate(statistics) if name in of_archive and rows[number] > 0]
        if len(having) < MIN_ARCHIVES:
            continue
        values = np.array([statistics[number][name] for number in having])
        median, scores = modified_z_scores(values, np.array([rows[number] for number in having], np.float64))
        for at in np.flatnonzero(np.abs(scores) > cutoff(tests, len(having))):
            found.append(Outlier(archives[having[at]], name, float(values[at]), median, float(scores[at])))
    return sorted(found, key=lambda outlier: -abs(outlier.score))
