"""The report's numbers, from ledgers on disk and from made ones."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from md_assets.core.ledger import Ledger, Pruned
from md_assets.core.paths import DataRoot, StageDir
from md_assets.datasets import all_specs
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages.latent_statistics import ENCODED_AT, STATISTICS, named_values, sampled_statistics
from md_assets.stages.report import EncodedArchive, LatentsGroup, Report, Span, StageCounts, gather, spans
from md_assets_tests.stages.conftest import LAYOUT
from md_assets_tests.stages.made_chain import SIZES, TAG, ledger_of, publish_chain
from md_assets_tests.stages.made_report import CAPTION, latents_dir, made_group

KEPT = len(SIZES)
CC = "cc12m-train-0000"
FOUND = {
    "rows": 4,
    "latents_32": {"mean": [0.1, 0.2], "std": [1.0, 2.0]},
    "caption_norm": {"mean": 3.0, "std": 0.5},
}

Publish = Callable[..., Ledger]


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    return DataRoot(tmp_path)


def rewrite(stage_dir: StageDir, archive: str, **changes: object) -> None:
    stage_dir.ledger(archive).write_text(replace(ledger_of(stage_dir, archive), **changes).to_json())


def of_jdb(root: DataRoot, **options: int) -> Report:
    return gather([JDB], root, **options)


# Counts


def test_counts_of_every_stage_are_added_up(root: DataRoot) -> None:
    for archive in ("train/000", "valid/000"):
        publish_chain(root, JDB, archive)
    raw, mds, latents = gather(all_specs(), root).counts
    bytes_out = [
        sum(ledger_of(stage_dir, archive).bytes_out for archive in ("train/000", "valid/000"))
        for stage_dir in (root.raw("jdb"), root.mds("jdb"), root.latents("jdb", TAG))
    ]
    rejected = Counter({"too_small": 4})
    read = 2 * KEPT + 4
    assert raw == StageCounts(root.raw("jdb"), 400, 2, read, 2 * KEPT, rejected, bytes_out[0], 2.0)
    assert mds == StageCounts(root.mds("jdb"), 400, 2, 2 * KEPT, 2 * KEPT, Counter(), bytes_out[1], 2.0)
    assert latents == StageCounts(root.latents("jdb", TAG), 400, 2, 2 * KEPT, 2 * KEPT, Counter(), bytes_out[2], 2.0)


def test_nothing_is_there(root: DataRoot) -> None:
    (root.path / "jdb" / "raw").mkdir(parents=True)
    report = gather(all_specs(), root)
    assert (report.counts, report.groups, report.throughput, report.outliers) == ((), (), [], [])


def test_a_subset_is_counted_and_its_latents_are_not_compared(root: DataRoot) -> None:
    publish_chain(root, CC12M, CC)
    report = gather([CC12M], root)
    stages = ["raw", "mds", "mds_minres512", f"mds_latents_{TAG}", f"mds_minres512_latents_{TAG}"]
    assert [count.stage_dir.path.name for count in report.counts] == stages
    assert report.counts[2].rejected == {"not_in_subset": 2}
    assert [group.stage_dir for group in report.groups] == [root.latents("cc12m", TAG)]


def test_what_was_pruned_keeps_its_samples_and_has_no_bytes(root: DataRoot) -> None:
    publish_chain(root, JDB, "train/000")
    rewrite(root.raw("jdb"), "train/000", pruned=Pruned("2026-01-01T00:00:00+00:00", 10))
    raw = of_jdb(root).counts[0]
    assert (raw.kept, raw.published, raw.bytes_out) == (KEPT, 1, 0)


def test_an_archive_whose_data_or_ledger_is_damaged_is_not_there(root: DataRoot) -> None:
    publish_chain(root, JDB, "train/000")
    root.raw("jdb").ledger("train/000").write_text("{")
    next(root.mds("jdb").data("train/000").glob("*.mds")).unlink()
    assert [count.stage_dir.stage for count in of_jdb(root).counts] == ["latents"]


# Latents


def test_each_pair_of_encoders_and_each_setting_is_a_group_of_its_own(root: DataRoot, publish_latents: Publish) -> None:
    for tag, archive, settings in (
        ("one", "train/000", {"seed": 0}),
        ("one", "train/001", {"seed": 1}),
        ("two", "train/000", {"seed": 0}),
    ):
        publish_latents(root.latents("jdb", tag), archive, settings=settings)
    report = of_jdb(root)
    first, second = (ledger_of(root.latents("jdb", "one"), f"train/00{n}").fingerprint[:6] for n in (0, 1))
    assert [report.label(group) for group in report.groups] == [f"jdb one @{first}", f"jdb one @{second}", "jdb two"]
    assert [[one.archive for one in group.archives] for group in report.groups] == [
        ["train/000"],
        ["train/001"],
        ["train/000"],
    ]


def test_one_pair_is_called_by_the_dataset() -> None:
    group = made_group(1)
    assert Report((), (group,)).label(group) == "jdb"


def test_statistics_come_from_the_ledger(root: DataRoot, publish_latents: Publish) -> None:
    details = {**LAYOUT, STATISTICS: FOUND, ENCODED_AT: "2026-01-02T00:00:10+00:00"}
    publish_latents(root.latents("jdb", TAG), "train/000", 4, details=details, seconds=10.0)
    (group,) = of_jdb(root, sampled_archives=0).groups
    end_s = 1767312010.0
    assert group.archives == (EncodedArchive("train/000", 4, end_s - 10, end_s, 4, named_values(FOUND)),)
    assert (group.sampled, group.unmeasured) == (0, [])


def test_of_some_archives_without_statistics_rows_are_read(root: DataRoot, publish_latents: Publish) -> None:
    stage_dir = root.latents("jdb", TAG)
    for number in range(4):
        publish_latents(stage_dir, f"train/{number:03}", 6)
    publish_latents(stage_dir, "train/004", 0)
    (group,) = of_jdb(root, sampled_archives=2, sampled_rows=3).groups
    assert [one.archive for one in group.measured] == ["train/000", "train/002"]
    assert (group.sampled, group.unmeasured) == (2, ["train/001", "train/003"])  # and one has no rows
    read = sampled_statistics(stage_dir.data("train/002"), LAYOUT, 3)
    assert (group.archives[2].rows_measured, group.archives[2].statistics) == (3, named_values(read))


def test_damaged_latents_have_no_statistics(root: DataRoot, publish_latents: Publish) -> None:
    stage_dir = root.latents("jdb", TAG)
    publish_latents(stage_dir, "train/000", details={})
    publish_latents(stage_dir, "train/001", 2)
    shard = next(stage_dir.data("train/001").glob("*.mds"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    (group,) = of_jdb(root).groups
    assert (group.measured, group.unmeasured) == ([], ["train/000", "train/001"])


def test_a_ledger_without_a_time_is_as_old_as_its_file(root: DataRoot, publish_latents: Publish) -> None:
    stage_dir = root.latents("jdb", TAG)
    publish_latents(stage_dir, "train/000", seconds=2.5)
    os.utime(stage_dir.ledger("train/000"), (1000, 1000))
    (group,) = of_jdb(root).groups
    assert (group.archives[0].began_s, group.archives[0].ended_s) == (997.5, 1000)


# Outliers


def test_outliers_are_told_of_each_group_by_itself() -> None:
    """A dataset whose latents are different as a whole is no outlier."""
    other = made_group(40, "sa1b", changes={number: {CAPTION: 5.0} for number in range(40)})
    jdb = made_group(30, changes={7: {CAPTION: 5.0}, 9: {"latents_64 std of channel 2": -9.0}})
    report = Report((), (jdb, other, made_group(10, "cc12m", changes={3: {CAPTION: 5.0}})))
    found = [(group, outlier.archive, outlier.statistic) for group, outlier in report.outliers]
    assert found == [(jdb, "train/009", "latents_64 std of channel 2"), (jdb, "train/007", CAPTION)]
    assert [group.judged for group in report.groups] == [True, True, False]


# Throughput


def encoded(began_s: float, ended_s: float, rows: int) -> EncodedArchive:
    return EncodedArchive("train/000", rows, began_s, ended_s)


def test_rows_are_spread_over_the_time_that_they_took() -> None:
    assert spans([encoded(30, 90, 600)]) == [Span(0, 60, 300, 30), Span(60, 120, 300, 30)]


def test_time_in_which_two_are_in_work_counts_once() -> None:
    (span,) = spans([encoded(0, 30, 300), encoded(10, 40, 300), encoded(45, 50, 100)])
    assert (span.rows, span.busy_s, span.rows_per_s) == (700, 45, 700 / 45)


def test_a_pause_is_a_span_without_rows() -> None:
    found = spans([encoded(0, 60, 60), encoded(120, 180, 120)])
    assert [span.rows_per_s for span in found] == [1, 0, 2, 0]


def test_what_took_no_time_is_not_lost() -> None:
    assert sum(span.rows for span in spans([encoded(50, 50, 7)])) == pytest.approx(7)


@pytest.mark.parametrize(("days", "width_s"), [(1, 3600), (30, 86400), (300, 7 * 86400), (10_000, 28 * 86400)])
def test_spans_grow_with_the_time_that_is_told(days: int, width_s: int) -> None:
    found = spans([encoded(0, 60, 1), encoded(days * 86400 - 60, days * 86400, 1)])
    assert {span.end_s - span.begin_s for span in found} == {width_s}
    assert sum(span.rows for span in found) == pytest.approx(2)


def test_groups_of_all_datasets_make_the_throughput() -> None:
    jdb, other = made_group(3), LatentsGroup(latents_dir("sa1b"), "f", (encoded(0, 20, 50),))
    report = Report((), (jdb, other))
    assert report.throughput == [Span(0, 60, 350, 30)]
