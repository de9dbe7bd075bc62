"""The command line on a data root in which everything is published: prune, and why archives are stale."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from md_assets.cli import DONE, FAILED, WRONG_USAGE, main
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets_tests.stages.made_chain import JDB_ARCHIVES, TAG, publish_chain, publish_jdb

REPOSITORY = Path(__file__).parents[1]
CC = "cc12m-train-0000"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataRoot:
    """Three archives of jdb in all stages, which the command finds; models that are nowhere."""
    monkeypatch.setenv("MD_ASSETS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MD_ASSETS_VAE", str(tmp_path / "none"))
    monkeypatch.setenv("MD_ASSETS_TEXT_ENCODER", f"openclip:local-dir:{tmp_path / 'none'}")
    publish_jdb(DataRoot(tmp_path / "data"))
    return DataRoot(tmp_path / "data")


def tars(root: DataRoot) -> list[bool]:
    return [root.raw("jdb").data(archive).exists() for archive in JDB_ARCHIVES]


def test_prune_dry_and_then_for_good(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--dry-run", "--encoders", TAG]) == DONE
    dry = capsys.readouterr().out
    assert dry.startswith("jdb: would be removed") and tars(root) == [True] * 3
    assert main(["prune", "jdb", "--encoders", TAG]) == DONE
    done = capsys.readouterr().out
    assert done.startswith("jdb: removed") and tars(root) == [False] * 3
    assert done.splitlines()[1:] == dry.splitlines()[1:]
    assert main(["verify"]) == DONE


def test_prune_takes_the_encoders_of_the_settings(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune"]) == DONE
    assert "not pruned, its latents are not published (mds_latents_none_none): 3 archives" in capsys.readouterr().out
    assert tars(root) == [True] * 3


def test_prune_of_damaged_latents_fails(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    shard = root.latents("jdb", TAG).data("train/000") / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["prune", "--encoders", TAG]) == FAILED
    assert "not pruned, mds_latents_tiny: shards_intact: " in capsys.readouterr().out
    assert tars(root) == [True, False, False]


def test_prune_of_what_there_is_not_is_wrong_usage(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "jbd"]) == WRONG_USAGE
    assert capsys.readouterr().err.startswith("md-assets: there is no dataset 'jbd'")


def test_status_says_in_what_stale_archives_differ(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    publish_chain(root, JDB, "train/001", images=ImageSettings(jpeg_quality=90))
    assert main(["status", "--explain"]) == DONE
    lines = capsys.readouterr().out.splitlines()
    assert "jdb/raw: 1 archives are stale" in lines
    assert lines.count("  images.jpeg_quality: 90 in 1 archives, 95 wanted (train/001)") == 3  # raw, mds, latents
    # The archives' encoders store 32 px only, and their revisions are not compared.
    assert "  encoders.image_resolutions: [32] in 3 archives, [256, 512] wanted (train/000, train/001, valid/000)" in (
        lines
    )
    assert lines[-2].startswith("Revisions of the models are not compared: the VAE folder ")
    assert lines[-1] == "Which archives failed is not told: DAGSTER_HOME is not set"


def test_status_compares_with_a_run_config(root: DataRoot, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "resources: {images: {config: {jpeg_quality: 90}}, encoders: {config: {image_resolutions: [32]}}}"
    )
    assert main(["status", "--config", str(config), "--json"]) == DONE
    (jdb,) = json.loads(capsys.readouterr().out)["datasets"]
    because = {stage["stage"]: stage["stale_because"] for stage in jdb["stages"]}
    difference = {"setting": "images.jpeg_quality", "found": 95, "wanted": 90, "archives": list(JDB_ARCHIVES)}
    assert because == {"raw": [difference], "mds": [difference], f"mds_latents_{TAG}": [difference], "raw_test": []}
    assert main(["status", "--config", str(tmp_path / "absent.yaml")]) == WRONG_USAGE
    assert "absent.yaml is no run config of Dagster" in capsys.readouterr().err


def test_status_for_scripts(root: DataRoot, capsys: pytest.CaptureFixture[str]) -> None:
    publish_chain(root, CC12M, CC)
    assert main(["status", "--json"]) == DONE
    said: Any = json.loads(capsys.readouterr().out)
    assert set(said) == {"data_root", "revisions_unknown", "failures_unknown", "datasets"}
    assert said["data_root"] == str(root.path) and said["revisions_unknown"]
    assert [(one["dataset"], one["archives"]) for one in said["datasets"]] == [("cc12m", 2176), ("jdb", 400)]
    stages = {stage["stage"]: stage for stage in said["datasets"][0]["stages"]}
    assert stages["mds_minres512"]["done"] == 1 and stages["mds_minres512"]["rejected"] == {"not_in_subset": 2}
    assert main(["status", "jdb", "--json"]) == DONE
    assert [one["dataset"] for one in json.loads(capsys.readouterr().out)["datasets"]] == ["jdb"]


def test_pruning_imports_no_models(root: DataRoot) -> None:
    code = (
        f"import sys\nfrom md_assets.cli import main\nmain(['prune', '--encoders', {TAG!r}])\n"
        "heavy = ('torch', 'streaming', 'diffusers', 'transformers', 'open_clip', 'dagster')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and tars(root) == [False] * 3
