"""Stages without work: real runs of the real assets, whose archives stand every check and audit."""

from collections import Counter
from collections.abc import Iterator

import dagster as dg
import pytest

from md_assets.bench.no_op_stages import (
    SAMPLES,
    definitions,
    encode_from_template,
    once_from_template,
    spec_of_scale,
    write_templates,
)
from md_assets.bench.scale import audit_ticks, passed_over_ms
from md_assets.core.paths import ARCHIVE_STAGES, DATA_ROOT_VARIABLE, DataRoot
from md_assets.orchestration import latents_launch
from md_assets.stages import mds, raw
from md_assets.stages.stale import WantedSettings
from md_assets.stages.status import dataset_totals

ARCHIVES = 12


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataRoot, dict[str, str]]:
    root = DataRoot(tmp_path_factory.mktemp("scale") / "datadir")
    return root, write_templates(root, spec_of_scale(ARCHIVES))


@pytest.fixture
def instance(
    templates: tuple[DataRoot, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """An instance on which every archive was taken through every stage, by one run for each stage."""
    root, encoders = templates
    for name, value in {**encoders, DATA_ROOT_VARIABLE: str(root.path)}.items():
        monkeypatch.setenv(name, value)
    for module in (raw, mds):
        monkeypatch.setattr(module, "once", once_from_template)
    monkeypatch.setattr(latents_launch, "encode", encode_from_template)
    spec = spec_of_scale(ARCHIVES)
    job = definitions(spec).resolve_implicit_global_asset_job_def()
    tags = {f"dagster/asset_partition_range_{end}": spec.archives[n] for end, n in (("start", 0), ("end", -1))}
    with dg.DagsterInstance.ephemeral() as instance:
        for stage in ARCHIVE_STAGES:
            asset = dg.AssetKey([spec.slug, stage])
            assert job.get_subset(asset_selection={asset}).execute_in_process(instance=instance, tags=tags).success
        yield instance


@pytest.mark.slow
def test_every_archive_is_published_recorded_checked_and_passed_over(
    instance: dg.DagsterInstance, templates: tuple[DataRoot, dict[str, str]]
) -> None:
    spec, root = spec_of_scale(ARCHIVES), templates[0]
    for stage in ARCHIVE_STAGES:
        assert len(instance.get_materialized_partitions(dg.AssetKey([spec.slug, stage]))) == ARCHIVES
    totals = dataset_totals(spec, root, WantedSettings())
    assert [(stage.archives, stage.done, stage.kept) for stage in totals] == [
        (ARCHIVES, ARCHIVES, ARCHIVES * SAMPLES)
    ] * 3
    graph = definitions(spec).resolve_asset_graph()
    checks = list(graph.get_check_keys_for_assets({dg.AssetKey([spec.slug, stage]) for stage in ARCHIVE_STAGES}))
    results = instance.event_log_storage.get_asset_check_partition_info(checks)
    found = Counter(result.latest_execution_status.value for result in results)
    assert found == {
        "SUCCEEDED": 7 * ARCHIVES,
        "PLANNED": 2 * ARCHIVES,
    }  # two of raw and mds, three of latents; audited

    assert [stored for stored, _ in audit_ticks(instance, spec, root, 2, settle_s=0)] == [2 * ARCHIVES, 0]

    passed_ms = passed_over_ms(spec, root)
    assert [len(ms.values) for ms in passed_ms.values()] == [ARCHIVES] * 3
