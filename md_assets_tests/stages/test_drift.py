"""The rule for outliers, on numbers that can be followed by hand."""

from statistics import NormalDist

import numpy as np
import pytest

from md_assets.stages.drift import (
    FALSE_ALARMS,
    MIN_ARCHIVES,
    MIN_CUTOFF,
    Outlier,
    cutoff,
    find_outliers,
    modified_z_scores,
)

ROWS = 1000


def of(values: list[float], rows: list[int] | None = None) -> list[Outlier]:
    """The outliers among archives `0`, `1`, … with one statistic."""
    archives = [str(number) for number in range(len(values))]
    return find_outliers(archives, rows or [ROWS] * len(values), [{"mean": value} for value in values], 1)


def scattered(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).standard_normal(count).tolist()


def test_scores_are_deviations_from_the_median_in_median_absolute_deviations() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 100.0])  # median 3; deviations 2, 1, 0, 1, 97 have the median 1
    median, scores = modified_z_scores(values, np.full(5, ROWS))
    assert median == 3
    assert scores == pytest.approx(0.6745 * (values - 3))


def test_an_archive_that_is_off_is_named_with_its_value_and_the_median() -> None:
    values = [*scattered(30), 9.0]
    (found,) = of(values)
    assert (found.archive, found.statistic, found.value, found.median) == ("30", "mean", 9.0, np.median(values))
    assert found.score > 5


def test_the_furthest_comes_first() -> None:
    assert [outlier.archive for outlier in of([*scattered(30), 9.0, -30.0])] == ["31", "30"]


def test_many_that_are_off_do_not_hide_each_other() -> None:
    """A quarter of all, which would triple a standard deviation."""
    assert {outlier.archive for outlier in of([*scattered(30), *[9.0] * 10])} == {str(n) for n in range(30, 40)}


@pytest.mark.parametrize(("archives", "found"), [(MIN_ARCHIVES - 1, 0), (MIN_ARCHIVES, 1)])
def test_few_archives_are_not_judged(archives: int, found: int) -> None:
    assert len(of([*scattered(archives - 1), 1000.0])) == found


def test_one_among_equal_ones_is_off() -> None:
    assert [outlier.archive for outlier in of([*[0.5] * 40, 0.6])] == ["40"]


def test_equal_values_are_no_outliers() -> None:
    assert of([0.5] * 40) == []


def test_a_mean_of_few_rows_may_scatter_more() -> None:
    values = [*scattered(40), 9.0]
    assert len(of(values)) == 1
    assert of(values, [*[ROWS] * 40, ROWS // 100]) == []  # ten times as wide


def test_archives_without_rows_or_without_the_statistic_do_not_count() -> None:
    archives = [str(number) for number in range(MIN_ARCHIVES + 1)]
    values = [{"mean": value} for value in [*scattered(MIN_ARCHIVES), 1000.0]]
    assert find_outliers(archives, [0, 0, *[ROWS] * (MIN_ARCHIVES - 1)], values, 1) == []
    assert find_outliers(archives, [ROWS] * (MIN_ARCHIVES + 1), [{}, {}, *values[2:]], 1) == []


def test_the_more_is_looked_at_the_further_off_it_must_be() -> None:
    many = 10**9
    assert cutoff(1, many) == pytest.approx(MIN_CUTOFF)
    tests = 14_000 * 17
    assert 2 * tests * (1 - NormalDist().cdf(cutoff(tests, many))) == pytest.approx(FALSE_ALARMS, rel=1e-3)


@pytest.mark.parametrize(("archives", "reports"), [(MIN_ARCHIVES, 100), (60, 50), (2000, 2)])
def test_sound_archives_raise_no_alarm(archives: int, reports: int) -> None:
    """One report in a hundred would."""
    random = np.random.default_rng(1)
    ids, names = [str(number) for number in range(archives)], [f"statistic {number}" for number in range(5)]
    alarms = 0
    for _ in range(reports):
        statistics = [dict(zip(names, row, strict=True)) for row in random.standard_normal((archives, 5)).tolist()]
        alarms += bool(find_outliers(ids, [ROWS] * archives, statistics, archives * 5))
    assert alarms <= reports // 25
