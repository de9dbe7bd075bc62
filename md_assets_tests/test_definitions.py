"""The code location: which assets there are, and that each tells people what they need."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from md_assets.core.spec import DatasetSpec
from md_assets.datasets import all_specs
from md_assets.definitions import defs

REPOSITORY = Path(__file__).resolve().parent.parent

SPECS = all_specs()
each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.slug)

OF_EVERY_DATASET = {"archive", "raw", "mds", "latents", "mds_index", "latents_index"}
FURTHER = {
    "cc12m": {"mds_minres512", "mds_minres512_index", "latents_minres512", "latents_minres512_index"},
    "coco2014": {"annotations"},
    "diffdb": {"annotations"},
    "jdb": {"annotations", "raw_test"},
    "sa1b": {"annotations"},
    "textcaps": set(),
}
"""Assets that the contract names for some datasets only."""

WITHOUT_PARTITIONS = {"annotations", "raw_test"}

OVER_ALL = {"latents_report": "report"}
"""Assets of no dataset, and their groups."""

CHECKS = {
    "raw": {"counts_balance", "tar_intact"},
    "mds": {"counts_balance", "shards_intact", "audited"},
    "latents": {"counts_balance", "shards_intact", "latents_valid", "audited"},
}


def assets() -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}


def stage_names(spec: DatasetSpec) -> list[str]:
    """Names of the assets that are partitioned by archive and made here, each before what follows it."""
    subsets = [f"{stage}_{subset.name}" for subset in spec.subsets for stage in ("mds", "latents")]
    return ["raw", "mds", "latents", *subsets]


def test_the_assets_are_those_of_the_contract() -> None:
    expected = {f"{slug}/{name}" for slug, names in FURTHER.items() for name in OF_EVERY_DATASET | names}
    assert set(assets()) == expected | set(OVER_ALL)
    assert list(FURTHER) == [spec.slug for spec in SPECS]


@each
def test_dependencies(spec: DatasetSpec) -> None:
    upstream = {
        key.partition("/")[2]: {dep.asset_key.to_user_string().removeprefix(f"{spec.slug}/") for dep in asset.deps}
        for key, asset in assets().items()
        if key.startswith(f"{spec.slug}/")
    }
    expected = {
        "archive": set(),
        "raw": {"archive"},
        "mds": {"raw", "annotations"} if spec.annotations else {"raw"},
        "latents": {"mds"},
        **{name: set() for name in FURTHER[spec.slug] & WITHOUT_PARTITIONS},
        **{f"{stage}_{subset.name}": {stage} for subset in spec.subsets for stage in ("mds", "latents")},
    }
    expected |= {f"{name}_index": {name} for name in stage_names(spec) if name != "raw"}
    assert upstream == expected


@each
def test_archives_are_the_partitions(spec: DatasetSpec) -> None:
    for name in ("archive", *stage_names(spec)):
        partitions = assets()[f"{spec.slug}/{name}"].partitions_def
        assert partitions is not None
        assert tuple(partitions.get_partition_keys()) == spec.archives
    for key, asset in assets().items():
        if key.endswith("_index") or key.partition("/")[2] in WITHOUT_PARTITIONS:
            assert asset.partitions_def is None, key


def test_every_asset_has_group_kinds_and_description_and_what_we_make_an_owner() -> None:
    for key, asset in assets().items():
        assert asset.group_name == OVER_ALL.get(key, key.partition("/")[0])
        assert asset.kinds, key
        assert asset.description and len(asset.description) > 60, key
        assert asset.owners or key.endswith("/archive"), key  # Dagster's observable sources take no owner


@each
def test_the_datasheet_is_what_the_ui_shows(spec: DatasetSpec) -> None:
    for name in ("archive", "raw"):
        assert spec.datasheet.strip().splitlines()[0] in (assets()[f"{spec.slug}/{name}"].description or "")


def test_what_is_only_fetched_is_described_piece_by_piece() -> None:
    description = assets()["jdb/raw_test"].description or ""
    (jdb,) = (spec for spec in SPECS if spec.slug == "jdb")
    assert jdb.raw_only and all(f"`{extra.name}`: {extra.what}" in description for extra in jdb.raw_only)


@each
def test_backfill_policies_differ_so_that_stages_are_not_fused_into_one_run(spec: DatasetSpec) -> None:
    graph = defs.resolve_asset_graph()
    policies = [graph.get(dg.AssetKey([spec.slug, name])).backfill_policy for name in stage_names(spec)]
    sizes = [policy.max_partitions_per_run if policy else None for policy in policies]
    assert len(set(sizes)) == len(sizes)
    assert all(size and size > 1 for size in sizes)


def test_checks_by_stage() -> None:
    expected = {
        f"{spec.slug}/{name}:{check}"
        for spec in SPECS
        for name in stage_names(spec)
        for check in CHECKS[name.partition("_")[0]]
    }
    checks = {key.to_user_string() for key in defs.resolve_asset_graph().asset_check_keys}
    indexes = {f"{spec.slug}/{name}_index:audited" for spec in SPECS for name in stage_names(spec)[1:]}
    assert checks == expected | indexes | {"sa1b/archive:links_valid", "latents_report:no_drift"}


def test_pools() -> None:
    graph = defs.resolve_asset_graph()
    pools = {key.to_user_string(): graph.get(key).pools for key in graph.get_all_asset_keys()}
    assert pools["jdb/raw"] == {"hub"}
    assert pools["jdb/annotations"] == {"captions"}
    assert pools["jdb/latents"] == {"gpu"}
    assert pools["jdb/raw_test"] == {"hub"}
    for name in ("jdb/mds", "cc12m/mds_minres512", "cc12m/latents_minres512"):
        assert pools[name] == set()


def test_jobs_are_registered() -> None:
    names = {job.name for job in defs.resolve_all_job_defs()}
    assert "prune" in names


def test_every_resource_field_is_described() -> None:
    for name, resource in (defs.resources or {}).items():
        for field_name, field in type(resource).model_fields.items():
            assert field.description, f"{name}.{field_name}"


def test_nothing_starts_by_itself() -> None:
    repository = defs.get_repository_def()
    assert all(schedule.default_status is dg.DefaultScheduleStatus.STOPPED for schedule in repository.schedule_defs)
    assert all(sensor.default_status is dg.DefaultSensorStatus.STOPPED for sensor in repository.sensor_defs)


def test_the_workspace_file_loads_this_module() -> None:
    workspace = yaml.safe_load((REPOSITORY / "workspace.yaml").read_text())
    (location,) = workspace["load_from"]
    assert location["python_module"]["module_name"] == "md_assets.definitions"


def test_dagster_accepts_the_workspace_file() -> None:
    command = [sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_loading_warns_of_nothing() -> None:
    command = [sys.executable, "-W", "default", "-c", "import md_assets.definitions"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "BetaWarning" not in done.stderr and "PreviewWarning" not in done.stderr
