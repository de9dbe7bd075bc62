"""The asset `latents_report`: what people see of it, its warning, and that nothing starts it but somebody who asks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DATA_ROOT_VARIABLE, DataRoot
from md_assets.datasets import all_specs
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.definitions import defs
from md_assets.orchestration.alerts import failed_check_alerts
from md_assets.orchestration.report import (
    NO_DRIFT,
    OUTLIERS_LISTED,
    REPORT,
    drift_result,
    outliers_table,
    rejects_table,
    report_asset,
    samples_table,
    statistics_table,
    throughput_table,
)
from md_assets.stages.latent_statistics import STATISTICS
from md_assets.stages.report import Report
from md_assets_tests.stages.conftest import LAYOUT, publish_latents  # noqa: F401 (a fixture)
from md_assets_tests.stages.made_report import CAPTION, made_counts, made_group

Publish = Callable[..., Ledger]

ARCHIVES = 22


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataRoot:
    monkeypatch.setenv(DATA_ROOT_VARIABLE, str(tmp_path))
    return DataRoot(tmp_path)


def materialize(instance: dg.DagsterInstance) -> tuple[dict[str, Any], dg.AssetCheckEvaluation]:
    """Metadata by name, and the check's result."""
    result = dg.materialize([report_asset(all_specs())], instance=instance)
    (materialization,) = result.asset_materializations_for_node("latents_report")
    (evaluation,) = result.get_asset_check_evaluations()
    return {name: value.value for name, value in materialization.metadata.items()}, evaluation


def publish_archives(publish: Publish, root: DataRoot, off: int | None = None) -> None:
    """Latents of jdb with statistics in their ledgers, those of one archive far from the others'."""
    for number in range(ARCHIVES):
        mean = 0.5 if number == off else 0.1 + number / 1e4
        statistics = {
            "rows": 1,
            "latents_32": {"mean": [mean], "std": [1.0]},
            "caption_norm": {"mean": 3.0, "std": 0.1},
        }
        details = {**LAYOUT, STATISTICS: statistics}
        publish(root.latents("jdb", "tiny"), f"train/{number:03}", 1, details=details)


def test_it_works_before_anything_is_there(root: DataRoot) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        metadata, evaluation = materialize(instance)
    assert metadata == {
        "outliers": "None.",
        "samples_raw": 0,
        "samples_mds": 0,
        "samples_latents": 0,
        "bytes": 0,
        "archives_encoded": 0,
        "archives_unlike_the_others": 0,
        "archives_without_statistics": 0,
    }
    assert evaluation.passed and evaluation.description == "No dataset has enough archives with latents to compare them"


def test_one_materialization_tells_it_all(root: DataRoot, publish_latents: Publish) -> None:  # noqa: F811
    publish_archives(publish_latents, root)
    with dg.DagsterInstance.ephemeral() as instance:
        metadata, evaluation = materialize(instance)
    assert (metadata["samples_latents"], metadata["archives_encoded"]) == (ARCHIVES, ARCHIVES)
    for name in ("samples_plot", "latents_plot"):
        assert metadata[name].startswith("![") and "](data:image/png;base64," in metadata[name]
    assert (
        metadata["samples"].splitlines()[2].startswith(f"| jdb | `mds_latents_tiny` | {ARCHIVES} of 400 | {ARCHIVES} |")
    )
    assert metadata["outliers"] == "None."
    assert evaluation.passed and evaluation.description == f"{ARCHIVES} archives are like the others of their datasets"
    assert evaluation.metadata["archives_judged"].value == ARCHIVES


def test_drift_warns_and_fails_no_run(root: DataRoot, publish_latents: Publish) -> None:  # noqa: F811
    publish_archives(publish_latents, root, off=7)
    with dg.DagsterInstance.ephemeral() as instance:
        _, evaluation = materialize(instance)  # raises where the run fails
        (alert,) = failed_check_alerts(instance, [dg.AssetCheckKey(REPORT, NO_DRIFT)], "0 9e9 0")
    assert (evaluation.passed, evaluation.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert evaluation.description == "1 of 22 archives is unlike the others: jdb train/007"
    assert "jdb train/007" in alert.text
    table = str(evaluation.metadata["outliers"].value)
    assert "| jdb train/007 | 0.5 | 0.10115 | +" in table and "| latents_32 mean of channel 0 |" in table


def test_many_outliers_are_counted_behind_the_first() -> None:
    names = [f"latents_{px} {kind} of channel {c}" for px in (32, 64) for kind in ("mean", "std") for c in range(4)]
    group = made_group(100, changes={number: dict.fromkeys(names, 50.0) for number in range(10)})
    report = Report((), (group,))
    table = outliers_table(report)
    assert len(report.outliers) == 160
    assert len([line for line in table.splitlines() if line.startswith("| jdb")]) == OUTLIERS_LISTED
    assert table.endswith("And 60 more.")
    said = drift_result(report).description or ""
    assert said.startswith("10 of 100 archives are unlike the others: jdb train/00") and said.endswith(" and 7 more")


def test_datasets_with_too_few_archives_are_named() -> None:
    report = Report((), (made_group(3), made_group(3, "sa1b")))
    assert outliers_table(report) == "None.\n\nToo few archives to judge: jdb, sa1b."


def test_tables_of_counts() -> None:
    report = Report(tuple(made_counts()), ())
    assert samples_table(report).splitlines() == [
        "| dataset | stage | archives | read | kept | rejected | bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        "| jdb | `raw` | 2 of 400 | 100 | 90 | 10 | 1,000 |",
        "| jdb | `mds` | 1 of 400 | 85 | 80 | 5 | 800 |",
        "| jdb | `mds_latents_tiny` | 1 of 400 | 60 | 60 | 0 | 6,000 |",
    ]
    assert rejects_table(report).splitlines()[2:] == [
        "| jdb raw | too_small | 7 | 7.00% |",
        "| jdb raw | undecodable | 3 | 3.00% |",
        "| jdb mds | no_caption | 5 | 5.88% |",
    ]


def test_tables_of_latents() -> None:
    group = made_group(2)
    report = Report((), (group,))
    assert throughput_table(report).splitlines()[2:] == ["| 1970-01-01 00:00 | 10.0 | 200 | 20 |"]
    first, second = (archive.statistics[CAPTION] for archive in group.archives)
    low, high = sorted([(first, "train/000"), (second, "train/001")])
    ends = f"{low[0]:.5g} ({low[1]}) | {high[0]:.5g} ({high[1]}) |"
    assert statistics_table(report).splitlines()[-1] == f"| jdb | {CAPTION} | {(first + second) / 2:.5g} | {ends}"


def test_archives_without_statistics_are_listed(root: DataRoot, publish_latents: Publish) -> None:  # noqa: F811
    from md_assets.stages.report import gather

    for number in range(3):
        publish_latents(root.latents("jdb", "tiny"), f"train/00{number}", 3)
    text = statistics_table(gather([JDB], root, sampled_archives=1, sampled_rows=2))
    assert "jdb: some rows of 1 archives were read for this" in text
    assert text.endswith("jdb: no statistics of 2 archives (train/001, train/002).")


def test_it_follows_the_latents_of_all_datasets_and_is_started_by_none() -> None:
    node = defs.resolve_asset_graph().get(REPORT)
    assert node.parent_keys == {dg.AssetKey([spec.slug, "latents"]) for spec in all_specs()}
    assert (node.automation_condition, node.partitions_def, node.pools) == (None, None, set())


def test_its_schedule_asks_for_it_alone() -> None:
    job = defs.resolve_job_def("make_latents_report")
    assert job.asset_layer.selected_asset_keys == {REPORT}
    schedule = defs.resolve_schedule_def("weekly_latents_report")
    assert (schedule.cron_schedule, schedule.default_status) == ("0 6 * * 1", dg.DefaultScheduleStatus.STOPPED)
