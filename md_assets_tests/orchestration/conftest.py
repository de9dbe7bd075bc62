"""A platform to materialize assets on: a loopback Hub with a small miniature, a data root, a Dagster instance."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, StageDir
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.walkthrough import Sandbox, failure_of, materialize
from md_assets.stages.once import published

SAMPLES, SIZE_PX = 12, 320
"""Of each archive of the miniature; 5 of 12 are rejected by raw and 1 by mds, so 6 have latents."""

QUICK: Mapping[str, Mapping[str, Any]] = {
    "images": {"num_workers": 0},
    "encoders": {"image_resolutions": [32, 64], "num_processes": 1, "batch_size": 4},
    "hub": {"first_delay_s": 0.01, "attempts": 2},
}


@dataclass
class Platform:
    """Runs assets in this process and looks at what came of it."""

    sandbox: Sandbox
    hub: LoopbackHub
    instance: dg.DagsterInstance

    def run(self, asset: str, *partitions: str, **resources: Mapping[str, Any]) -> dg.ExecuteInProcessResult:
        """Materialize an asset: without partitions, of one, or of a range given by its first and last."""
        merged = {name: {**QUICK.get(name, {}), **resources.get(name, {})} for name in {*QUICK, *resources}}
        used = {"raw": ("hub", "images"), "mds": ("images",), "annotations": ("hub",), "mds_index": ("images",)}
        used |= {"raw_test": ("hub", "images"), "mds_minres512": ("images",), "mds_minres512_index": ("images",)}
        needed = used.get(asset.partition("/")[2], tuple(merged))
        partition_range = (partitions[0], partitions[-1]) if partitions else None
        return materialize(self.instance, asset, partition_range, {name: merged[name] for name in needed})

    def up_to(self, stage: str, *partitions: str) -> None:
        """Materialize everything that `stage` of these partitions needs, and the stage."""
        for asset in ("annotations", "raw", "mds", "latents"):
            result = self.run(f"jdb/{asset}", *(() if asset == "annotations" else partitions))
            assert result.success, failure_of(result)
            if asset == stage:
                return

    def dir(self, stage: str) -> StageDir:
        root: DataRoot = self.sandbox.data
        return root.latents("jdb", "sdxl1_dfnclipH14") if stage == "latents" else getattr(root, stage)("jdb")

    def ledger(self, stage: str, archive: str) -> Ledger | None:
        return published(self.dir(stage), archive)

    def materialized(self, asset: str) -> set[str]:
        return set(self.instance.get_materialized_partitions(dg.AssetKey(asset.split("/"))))


@pytest.fixture(scope="session")
def small_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """Sources and encoders, written once and copied by `platform`; not to be changed."""
    sandbox = Sandbox(tmp_path_factory.mktemp("small"))
    sandbox.prepare(SAMPLES, SIZE_PX, datasets=["jdb"])
    return sandbox


@pytest.fixture
def platform(small_sandbox: Sandbox, copy_sandbox: Callable[[Sandbox], Sandbox], monkeypatch) -> Iterator[Platform]:
    sandbox = copy_sandbox(small_sandbox)
    with LoopbackHub(sandbox.hub_root) as hub:
        for name, value in sandbox.environment(hub.endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with dg.DagsterInstance.get() as instance:
            yield Platform(sandbox, hub, instance)


@pytest.fixture
def copy_sandbox(tmp_path: Path) -> Callable[[Sandbox], Sandbox]:
    """A function that gives a sandbox of one's own with the sources and encoders of another."""

    def copy(sandbox: Sandbox) -> Sandbox:
        import shutil

        target = tmp_path / "sandbox"
        shutil.copytree(sandbox.path, target, ignore=shutil.ignore_patterns("datadir"))
        return Sandbox(target)

    return copy
