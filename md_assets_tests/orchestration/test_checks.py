"""Check results as Dagster's events."""

import dagster as dg

from md_assets.core.verdict import CHECKS_OF_STAGE
from md_assets.datasets.jdb import SPEC
from md_assets.orchestration.checks import check_specs, evaluate
from md_assets.orchestration.partitions import archive_partitions
from md_assets_tests.orchestration.conftest import Platform

RAW = dg.AssetKey(["jdb", "raw"])


def test_specs_are_partitioned_and_say_what_they_check() -> None:
    partitions = archive_partitions(SPEC)
    for stage, checks in CHECKS_OF_STAGE.items():
        specs = check_specs(dg.AssetKey(["jdb", stage]), stage, partitions)
        assert [spec.name for spec in specs] == [*checks, *(["audited"] if stage != "raw" else [])]
        assert all(spec.partitions_def == partitions and spec.description for spec in specs)


def test_a_damaged_tar_is_red_and_says_so(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000").success
    stage_dir = platform.dir("raw")
    tar = stage_dir.data("train/000")
    damaged = bytearray(tar.read_bytes())
    damaged[1000] ^= 1
    tar.write_bytes(damaged)

    found = {e.check_name: e for e in evaluate(RAW, stage_dir, None, "train/000", read_all=True)}

    assert found["counts_balance"].passed
    assert not found["tar_intact"].passed
    assert all(e.partition == "train/000" and e.asset_key == RAW for e in found.values())
    by_size = {e.check_name: e.passed for e in evaluate(RAW, stage_dir, None, "train/000", read_all=False)}
    assert by_size == {"counts_balance": True, "tar_intact": True}  # the size is right: only reading all tells


def test_a_missing_file_is_found_without_reading(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000").success
    stage_dir = platform.dir("raw")
    stage_dir.data("train/000").unlink()

    found = {e.check_name: e for e in evaluate(RAW, stage_dir, None, "train/000", read_all=False)}

    assert not found["tar_intact"].passed
    assert "is missing" in (found["tar_intact"].description or "")
