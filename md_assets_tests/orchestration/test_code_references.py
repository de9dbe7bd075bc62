"""Code references lead to the code."""

from pathlib import Path

import dagster as dg
import pytest

from md_assets.datasets import all_specs
from md_assets.definitions import defs
from md_assets.orchestration.code_references import METADATA_KEY

STAGES = {
    "annotations": ("index_captions", "annotations"),
    "raw": ("fetch_archives", "raw"),
    "mds": ("convert_archives", "mds"),
    "latents": ("encode_archives", "latents"),
    "mds_index": ("merge_mds", "index"),
    "latents_index": ("merge_latents", "index"),
    "mds_minres512": ("select_mds", "subset"),
    "latents_minres512": ("select_latents", "subset"),
    "mds_minres512_index": ("merge_mds", "index"),
    "latents_minres512_index": ("merge_latents", "index"),
    "raw_test": ("fetch_beside", "raw_only"),
    "archive": ("observe_archives", ""),
}


def references(asset: dg.AssetSpec) -> dict[str, dg.LocalFileCodeReference]:
    return {reference.label: reference for reference in asset.metadata[METADATA_KEY].code_references}


@pytest.mark.parametrize("spec", all_specs(), ids=lambda spec: spec.slug)
def test_an_asset_leads_to_its_dataset_its_run_and_its_stage(spec) -> None:
    found = [asset for asset in defs.resolve_all_asset_specs() if asset.key.path[0] == spec.slug]
    assert found
    for asset in found:
        run, stage = STAGES[asset.key.path[-1]]
        labels = references(asset)
        assert set(labels) == {"dataset", "run", *(["stage"] if stage else [])}
        assert Path(labels["dataset"].file_path).name == f"{spec.slug}.py"
        line = Path(labels["run"].file_path).read_text().splitlines()[labels["run"].line_number - 1]
        assert line.startswith(f"def {run}(")
        if stage:
            assert Path(labels["stage"].file_path).parts[-2:] == ("stages", f"{stage}.py")


def test_the_report_has_no_dataset() -> None:
    (report,) = [asset for asset in defs.resolve_all_asset_specs() if asset.key.path == ["latents_report"]]
    assert Path(references(report)["run"].file_path).parts[-2:] == ("orchestration", "report.py")
    assert Path(references(report)["stage"].file_path).parts[-2:] == ("stages", "report.py")
    assert "dataset" not in references(report)
