"""What Dagster is told of links that expire: in the observation, and by the check ahead."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot
from md_assets.core.source import HubFile, LinkedFile
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.loopback_web import LoopbackWeb, write_link_list
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration.assets import dataset_assets
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.orchestration.source_checks import links_checks
from md_assets.storage.publish import publish, scratch, workspace

REPOSITORY = Path(__file__).resolve().parents[2]
LIST, MIRROR = "MD_ASSETS_SA1B_LINKS", "org/mirror"
ARCHIVES = tuple(f"sa_{number:06}" for number in range(4))
SPEC = replace(
    JDB,
    slug="linked",
    archives=ARCHIVES,
    small=(),
    splits=(),
    annotations=(),
    raw_only=(),
    locate=lambda archive: LinkedFile(f"{archive}.tar", LIST, HubFile(MIRROR, f"*{archive}.tar")),
)
KEY = dg.AssetKey(["linked", "archive"])
DAY_S = 24 * 3600


@dataclass
class World:
    """A dataset whose archives have links, as a code location of its own."""

    hub: LoopbackHub
    web: LoopbackWeb
    root: DataRoot
    instance: dg.DagsterInstance

    def write_list(self, **expires_in_s: float) -> None:
        """Links of `sa_000000.tar` and so on; the other rows are no archives."""
        now_s = time.time()
        due_s = {f"{archive}.tar": now_s + lasts_s for archive, lasts_s in expires_in_s.items()}
        due_s |= {"sa_images_ids.txt": now_s + 20 * DAY_S}
        write_link_list(self.web.root / "l.tsv", due_s, lambda name: f"https://h/{name}?oe={int(due_s[name]):x}&sig=x")

    def publish(self, archive: str) -> None:
        stage_dir = self.root.raw("linked")
        with workspace(stage_dir.ledger(archive)) as own:
            tar = scratch(own, "out") / "x.tar"
            tar.touch()
            publish(stage_dir, tar, Ledger("linked", archive, "raw", 0, 0, {}, 0, 0, 0.0, {}, {}, {}, {}, ()))

    def run(self, **selection: Any) -> dg.ExecuteInProcessResult:
        resources = {"hub": HubResource(attempts=1), "images": ImagesResource(), "encoders": EncodersResource()}
        defs = dg.Definitions(dataset_assets(SPEC), resources=resources, executor=dg.in_process_executor)
        job = defs.resolve_implicit_global_asset_job_def().get_subset(**selection)
        config = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        return job.execute_in_process(instance=self.instance, run_config=config, raise_on_error=False)

    def check(self) -> dg.AssetCheckEvaluation:
        name = dg.AssetCheckKey(KEY, "links_valid")
        result = self.run(asset_selection=set(), asset_check_selection={name})
        assert result.success, failure_of(result)
        (evaluation,) = result.get_asset_check_evaluations()
        assert evaluation.severity == dg.AssetCheckSeverity.WARN
        assert "sig=" not in f"{evaluation.description}{evaluation.metadata}"
        return evaluation


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "web").mkdir()
    mirrored = tmp_path / "hub" / "datasets" / MIRROR / "deep" / "sa_000001.tar"
    mirrored.parent.mkdir(parents=True)
    mirrored.write_bytes(b"1")
    monkeypatch.setenv("MD_ASSETS_DATA", str(tmp_path / "data"))
    with (
        LoopbackWeb(tmp_path / "web") as web,
        LoopbackHub(tmp_path / "hub") as hub,
        dg.DagsterInstance.ephemeral() as instance,
    ):
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv(LIST, f"{web.base_url}/l.tsv")
        yield World(hub, web, DataRoot(tmp_path / "data"), instance)


def test_only_archives_with_links_are_checked_for_them() -> None:
    (check,) = links_checks(SPEC, KEY)
    assert check.check_keys == {dg.AssetCheckKey(KEY, "links_valid")}
    assert links_checks(JDB, dg.AssetKey(["jdb", "archive"])) == []


def test_an_observation_tells_names_and_expiries_from_one_request(world: World) -> None:
    world.write_list(sa_000000=-60, sa_000002=5 * DAY_S, sa_000003=9 * DAY_S)
    result = world.run(asset_selection={KEY}, asset_check_selection=set())
    assert result.success, failure_of(result)
    observed = [record.asset_observation for record in world.instance.fetch_observations(KEY, limit=10).records]
    versions = {o.partition: o.tags["dagster/data_version"] for o in observed if o.partition}
    assert versions == {archive: f"{archive}.tar" for archive in ("sa_000000", "sa_000002", "sa_000003")}
    (facts,) = [o.metadata for o in observed if not o.partition]
    assert facts[f"{LIST} links"].value == 4 and facts[f"{LIST} expired"].value == 1
    span_s = facts[f"{LIST} latest expiry"].value - facts[f"{LIST} earliest expiry"].value
    assert span_s == pytest.approx(20 * DAY_S + 60, abs=2)
    assert world.web.requests == {"get": 1} and world.hub.requests == {}


def test_without_a_list_the_mirror_is_observed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIST)
    result = world.run(asset_selection={KEY})
    assert result.success, failure_of(result)
    observations = [record.asset_observation for record in world.instance.fetch_observations(KEY, limit=10).records]
    (observed,) = [o for o in observations if o.partition]
    assert observed.partition == "sa_000001" and len(observed.tags["dagster/data_version"]) == 64
    (evaluation,) = result.get_asset_check_evaluations()  # an observation runs the check too
    assert evaluation.passed
    assert evaluation.description == f"no link list is set ({LIST}); the mirror is used"
    assert world.hub.requests == {"listing": 1} and world.web.requests == {}


def test_links_that_expire_within_three_days_are_warned_of_while_they_are_needed(world: World) -> None:
    world.write_list(sa_000000=-60, sa_000001=2.9 * DAY_S, sa_000002=3.1 * DAY_S, sa_000003=9 * DAY_S)
    found = world.check()
    assert not found.passed and found.metadata["archives"].value == "sa_000000, sa_000001"
    assert "1 have expired and 1 will within three days, the earliest at 20" in (found.description or "")
    assert LIST in (found.description or "") and found.metadata[f"{LIST} expired"].value == 1
    world.publish("sa_000000")
    found = world.check()
    assert not found.passed and found.metadata["archives"].value == "sa_000001"
    assert "0 have expired and 1 will" in (found.description or "")
    world.publish("sa_000001")
    assert world.check().passed


def test_a_list_that_is_none_is_warned_of(world: World) -> None:
    (world.web.root / "l.tsv").write_text("nothing\tof the kind\n")
    found = world.check()
    assert not found.passed and "does not name the column file_name" in (found.description or "")
    result = world.run(asset_selection={KEY}, asset_check_selection=set())
    assert not result.success and "does not name the column file_name" in failure_of(result)


def test_loading_the_code_location_asks_nobody(world: World) -> None:
    world.write_list(sa_000000=60)
    variables = {"MD_ASSETS_COCO_URL": world.web.base_url, "PYTHONPATH": str(REPOSITORY)}
    program = "from md_assets.definitions import defs; print(len(defs.resolve_asset_graph().get_all_asset_keys()))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 7
    assert world.web.requests == {} and world.hub.requests == {}
