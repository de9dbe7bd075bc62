"""Assets on a real instance: the way from a Hub archive to a merged index, and what the launchpad can change."""

from dataclasses import replace

import dagster as dg
import numpy as np
import pytest

from md_assets.core.errors import SettingsError
from md_assets.core.spec import Subset
from md_assets.datasets.jdb import SPEC
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration.assets import (
    ARCHIVES_PER_RUN,
    PER_RUN_VARIABLE,
    SUBSET_ARCHIVES_PER_RUN,
    archives_per_run,
    dataset_assets,
)
from md_assets.storage.mds import iter_rows
from md_assets_tests.orchestration.conftest import Platform


def test_a_dataset_has_annotations_only_where_captions_are_outside_its_archives() -> None:
    names = {definition.key.to_user_string() for definition in dataset_assets(SPEC)}
    assert {"jdb/annotations", "jdb/raw_test"} < names and len(names) == 8
    without = {definition.key.to_user_string() for definition in dataset_assets(replace(SPEC, annotations=()))}
    assert names - without == {"jdb/annotations"}
    assert set(ARCHIVES_PER_RUN) == {"raw", "mds", "latents"}


def test_every_subset_has_four_assets_of_its_own() -> None:
    parts = (Subset("large", 512), Subset("huge", 1024))
    names = {definition.key.to_user_string() for definition in dataset_assets(replace(SPEC, subsets=parts))}
    assert names - {definition.key.to_user_string() for definition in dataset_assets(SPEC)} == {
        f"jdb/{stage}_{part}{index}"
        for stage in ("mds", "latents")
        for part in ("large", "huge")
        for index in ("", "_index")
    }
    sizes = [*ARCHIVES_PER_RUN.values(), *SUBSET_ARCHIVES_PER_RUN.values()]
    assert len(set(sizes)) == len(sizes)


def test_sizes_of_runs_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PER_RUN_VARIABLE, "raw=20, latents=100")
    made = [asset for asset in dataset_assets(SPEC) if isinstance(asset, dg.AssetsDefinition)]
    policies = {asset.key.path[-1]: asset.backfill_policy for asset in made if asset.is_materializable}
    sizes = {name: policy.max_partitions_per_run for name, policy in policies.items() if policy}
    assert {name: sizes[name] for name in ("raw", "mds", "latents")} == {"raw": 20, "mds": 16, "latents": 100}


@pytest.mark.parametrize("text", ["raw", "raw=0", "raw=x", "images=3", "raw=16", "mds=32"])
def test_sizes_of_runs_that_make_no_sense_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(PER_RUN_VARIABLE, text)
    with pytest.raises(SettingsError, match=PER_RUN_VARIABLE):
        archives_per_run()


def test_archives_are_observed_from_one_listing(platform: Platform) -> None:
    result = platform.run("jdb/archive")

    assert result.success, failure_of(result)
    observations = platform.instance.fetch_observations(dg.AssetKey(["jdb", "archive"]), limit=100).records
    observed = [record.asset_observation for record in observations]
    versions = {o.partition: o.tags["dagster/data_version"] for o in observed if o.partition}
    assert set(versions) == {"train/000", "train/001", "valid/000", "valid/001"}
    assert platform.hub.requests["listing"] == 1
    assert platform.run("jdb/raw", "train/000").success
    ledger = platform.ledger("raw", "train/000")
    assert ledger is not None and ledger.source["content_id"] == versions["train/000"]


def test_an_archive_becomes_latents_in_both_merged_indexes(platform: Platform) -> None:
    platform.up_to("latents", "train/001", "train/001")
    platform.up_to("mds", "valid/000")

    for asset in ("jdb/mds_index", "jdb/latents_index"):
        result = platform.run(asset)
        assert result.success, failure_of(result)

    mds = list(iter_rows(platform.dir("mds").path / "train"))
    latents = list(iter_rows(platform.dir("latents").path / "train"))
    assert [row["key"] for row in latents] == [row["key"] for row in mds]
    assert [row["caption"] for row in latents] == [row["caption"] for row in mds]
    assert len(list(iter_rows(platform.dir("mds").path / "valid"))) == len(mds)
    assert not (platform.dir("latents").path / "valid" / "index.json").exists()
    assert np.frombuffer(latents[0]["latents_32"], np.float16).shape == (4 * 4 * 4,)


def test_an_index_without_archives_is_refused(platform: Platform) -> None:
    result = platform.run("jdb/mds_index")

    assert not result.success
    assert "no archive is published with these settings" in failure_of(result)


def test_settings_of_the_launchpad_reach_the_stages(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000", images={"min_image_size": 10}).success

    ledger = platform.ledger("raw", "train/000")
    assert ledger is not None
    assert "too_small" not in ledger.rejected
    assert ledger.settings["images"]["min_image_size"] == 10


def test_a_gated_repository_fails_with_the_page_where_terms_are_accepted(platform: Platform) -> None:
    platform.hub.gated = frozenset({"JourneyDB/JourneyDB"})

    result = platform.run("jdb/raw", "train/000")

    assert not result.success
    assert f"{platform.hub.endpoint}/datasets/JourneyDB/JourneyDB" in failure_of(result)
    assert platform.ledger("raw", "train/000") is None


def test_kept_archives_are_below_the_data_root(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000", hub={"keep_archives": True}).success

    kept = platform.sandbox.data.kept_archive("jdb", "train/000", ".tgz")
    assert (
        kept.read_bytes()
        == (platform.sandbox.hub_root / "datasets/JourneyDB/JourneyDB/data/train/imgs/000.tgz").read_bytes()
    )
