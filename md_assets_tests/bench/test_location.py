"""The load-time benchmark."""

from md_assets.bench.location import LoadTimes, measure, report


def test_it_loads_both_and_compares_them_pair_by_pair() -> None:
    times = measure(pairs=1)
    assert len(times.ours_s) == len(times.empty_s) == 1
    assert times.ratio == times.ours_s[0] / times.empty_s[0] > 0.5


def test_the_ratio_is_the_median_of_pairs() -> None:
    assert LoadTimes((2.0, 9.0, 3.0), (1.0, 3.0, 2.0)).ratio == 2.0
    assert "2.00 times as long" in report(LoadTimes((2.0,), (1.0,)))
