"""The image benchmark: both ways on the same archives, and what it makes of their times."""

import json
import os
from pathlib import Path

import pytest

from md_assets.bench import images
from md_assets.bench.images import Comparison, Way, compare, held_to_cores, memory_mib, report, report_memory, run
from md_assets.core.errors import SettingsError

WAYS = {
    "ours": Way((1.0, 2.0, 1.0), (0.8, 0.8, 0.9), 100_000, (40.0, 41.0)),
    "reference": Way((4.0, 4.0, 3.0), (4.0, 3.2, 3.6), 50_000, (35.0, 33.0)),
}
MADE_UP = Comparison("jdb", 100, 2, 300_000, **WAYS, same_quality_db=(40.1, 41.2), limit_s=0.01)


def test_ratios_are_medians_round_by_round_and_speeds_are_of_one_core() -> None:
    assert (MADE_UP.ratio, MADE_UP.cpu_ratio) == (3.0, 4.0)
    assert MADE_UP.per_core(MADE_UP.ours) == 50.0 and MADE_UP.per_core(MADE_UP.reference) == 12.5
    text = report(MADE_UP)
    assert "ratio 3.00 by the clock, 4.00 by processor time (target 3.5)" in text
    assert "50% of the limit of 100 images/s" in text and "PSNR 40.50 dB, worst 40.00" in text


@pytest.mark.slow
def test_both_ways_keep_the_same_images_and_ours_keeps_them_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MEMORY_IMAGES", 1000)
    (document,) = run("jdb", images=6, workers=1, rounds=1, memory=True, json=True)
    figures = json.loads(document)
    (result,) = figures["datasets"]
    assert (result["dataset"], result["images"], result["target"]) == ("jdb", 6, 3.5)
    assert len(result["ours"]["wall_s"]) == len(result["reference"]["cpu_s"]) == 1
    ours, theirs = result["ours"]["psnr_db"], result["reference"]["psnr_db"]
    assert len(ours) == 6
    for our_db, their_db, limit_db in zip(ours, theirs, result["same_quality_db"], strict=True):
        assert their_db < our_db and limit_db - 0.3 < our_db
    assert 0 < result["limit_s"] < 1
    assert [done for done, _ in figures["memory_mib"]] == [1000]


@pytest.mark.slow
def test_memory_of_the_pool_stays_flat() -> None:
    looks = memory_mib(images=600, workers=1, every=100)
    assert [done for done, _ in looks] == [100, 200, 300, 400, 500, 600]
    assert looks[-1][1] - looks[1][1] < 8
    assert report_memory([(100, 40), (200, 41)]) == "memory of pool and parent, MiB: 40 after 100, 41 after 200"


def test_everything_is_held_to_the_cores_that_it_is_measured_on() -> None:
    cores = os.sched_getaffinity(0)
    with held_to_cores(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == cores
    with pytest.raises(SettingsError, match="0 workers"), held_to_cores(0):
        pass


def test_a_dataset_without_synthesized_archives_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"textcaps has no image bench.*jdb"):
        compare("textcaps", images=1, workers=1, rounds=1)


def test_processor_time_counts_this_process(tmp_path: Path) -> None:
    def work() -> None:
        tmp_path.mkdir()
        sum(i * i for i in range(2_000_000))

    wall_s, cpu_s = images._timed(work, tmp_path)
    assert 0 < cpu_s < wall_s + 0.05 and not tmp_path.exists()
