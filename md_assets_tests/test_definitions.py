"""The code location: which assets there are, and that each tells people what they need."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from md_assets.datasets.jdb import SPEC
from md_assets.definitions import defs

REPOSITORY = Path(__file__).resolve().parent.parent

ARCHIVE_STAGES = ("raw", "mds", "latents")


def specs() -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}


def test_the_assets_of_jdb_are_those_of_the_contract() -> None:
    assert set(specs()) == {
        "jdb/archive",
        "jdb/annotations",
        "jdb/raw",
        "jdb/mds",
        "jdb/latents",
        "jdb/mds_index",
        "jdb/latents_index",
    }


def test_dependencies() -> None:
    upstream = {key: {dep.asset_key.to_user_string() for dep in spec.deps} for key, spec in specs().items()}
    assert upstream == {
        "jdb/archive": set(),
        "jdb/annotations": set(),
        "jdb/raw": {"jdb/archive"},
        "jdb/mds": {"jdb/raw", "jdb/annotations"},
        "jdb/latents": {"jdb/mds"},
        "jdb/mds_index": {"jdb/mds"},
        "jdb/latents_index": {"jdb/latents"},
    }


@pytest.mark.parametrize("name", ["archive", *ARCHIVE_STAGES])
def test_archives_are_the_partitions(name: str) -> None:
    partitions = specs()[f"jdb/{name}"].partitions_def
    assert partitions is not None
    assert tuple(partitions.get_partition_keys()) == SPEC.archives


@pytest.mark.parametrize("name", ["annotations", "mds_index", "latents_index"])
def test_the_others_have_no_partitions(name: str) -> None:
    assert specs()[f"jdb/{name}"].partitions_def is None


def test_every_asset_has_group_kinds_and_description_and_what_we_make_an_owner() -> None:
    for key, spec in specs().items():
        assert spec.group_name == key.partition("/")[0]
        assert spec.kinds, key
        assert spec.description and len(spec.description) > 60, key
        assert spec.owners or key.endswith("/archive"), key  # Dagster's observable sources take no owner


def test_the_datasheet_is_what_the_ui_shows() -> None:
    for name in ("archive", "raw"):
        assert SPEC.datasheet.strip().splitlines()[0] in (specs()[f"jdb/{name}"].description or "")


def test_backfill_policies_differ_so_that_stages_are_not_fused_into_one_run() -> None:
    graph = defs.resolve_asset_graph()
    sizes = [graph.get(dg.AssetKey(["jdb", stage])).backfill_policy.max_partitions_per_run for stage in ARCHIVE_STAGES]
    assert len(set(sizes)) == len(sizes)
    assert all(size and size > 1 for size in sizes)


def test_checks_by_stage() -> None:
    checks = {key.to_user_string() for key in defs.resolve_asset_graph().asset_check_keys}
    assert checks == {
        "jdb/raw:counts_balance",
        "jdb/raw:tar_intact",
        "jdb/mds:counts_balance",
        "jdb/mds:shards_intact",
        "jdb/latents:counts_balance",
        "jdb/latents:shards_intact",
        "jdb/latents:latents_valid",
    }


def test_pools() -> None:
    graph = defs.resolve_asset_graph()
    pools = {key.to_user_string(): graph.get(key).pools for key in graph.get_all_asset_keys()}
    assert pools["jdb/raw"] == pools["jdb/annotations"] == {"hub"}
    assert pools["jdb/latents"] == {"gpu"}
    assert pools["jdb/mds"] == set()


def test_every_resource_field_is_described() -> None:
    for name, resource in (defs.resources or {}).items():
        for field_name, field in type(resource).model_fields.items():
            assert field.description, f"{name}.{field_name}"


def test_nothing_starts_by_itself() -> None:
    repository = defs.get_repository_def()
    assert not repository.schedule_defs
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
