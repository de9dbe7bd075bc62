"""What a run of each asset does beyond calling its stage."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from md_assets.core.verdict import CHECKS_OF_STAGE
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.demo.journeydb import TEST_IMAGES
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration.failures import all_failed
from md_assets.orchestration.resources import EncodersResource, HubResource
from md_assets.storage.mds import iter_rows, read_index
from md_assets_tests.orchestration.conftest import Platform
from md_assets_tests.stages.made_chain import publish_chain


def test_annotations_report_their_rows(platform: Platform) -> None:
    result = platform.run("jdb/annotations")

    assert result.success, failure_of(result)
    (event,) = result.get_asset_materialization_events()
    metadata = event.materialization.metadata
    # Of 12 files of an archive 2 are no files of their own and 1 has no caption; 1 caption has no image.
    assert metadata["train_rows"].value == metadata["valid_rows"].value == 2 * (12 - 2 - 1 + 1)
    assert metadata["train_source"].value.startswith("JourneyDB/JourneyDB:data/train/train_anno_realease_repath")


def test_annotations_of_a_missing_file_name_it(platform: Platform) -> None:
    missing = "data/valid/valid_anno_repath.jsonl.tgz"
    (platform.sandbox.hub_root / "datasets/JourneyDB/JourneyDB" / missing).unlink()

    result = platform.run("jdb/annotations")

    assert not result.success
    assert missing in failure_of(result)


def test_no_process_is_started_when_all_latents_are_published(platform: Platform, monkeypatch) -> None:
    platform.up_to("latents", "train/000")

    def refuse(*arguments: object) -> None:
        raise AssertionError("an encoding process was started")

    monkeypatch.setattr("md_assets.orchestration.latents_launch.encode", refuse)
    assert platform.run("jdb/latents", "train/000").success


def test_stale_archives_are_left_out_of_the_index_and_counted(platform: Platform) -> None:
    platform.up_to("mds", "train/000", "train/001")
    other = {"max_image_size": 300, "num_workers": 0}
    assert platform.run("jdb/raw", "train/001", images=other).success
    assert platform.run("jdb/mds", "train/001", images=other).success

    result = platform.run("jdb/mds_index")

    assert result.success, failure_of(result)
    (event,) = result.get_asset_materialization_events()
    assert "| train | 1 | 6 | 1 | 1 | 198 | 0 | 0 |" in event.materialization.metadata["archives"].value
    (shard,) = read_index(platform.dir("mds").path / "train")
    assert shard.path.parent.name == "000"


def test_encoders_that_do_not_exist_are_one_clear_sentence(platform: Platform) -> None:
    platform.up_to("mds", "train/000")

    result = platform.run("jdb/latents", "train/000", encoders={"vae": "/does/not/exist"})

    assert not result.success
    assert "the VAE folder /does/not/exist does not exist. Correct `vae` or MD_ASSETS_VAE" in failure_of(result)


CC = "cc12m-train-0000"
QUICK_ENCODERS = {"image_resolutions": [32]}
"""Those of `made_chain`."""


def publish_cc12m(platform: Platform) -> None:
    """An archive of cc12m in raw, mds and latents, as the platform's own encoders would have made it."""
    encoders = EncodersResource(**QUICK_ENCODERS)
    settings = encoders.settings(HubResource().client())
    publish_chain(platform.sandbox.data, CC12M, CC, tag=encoders.tag(), encoders=settings, subsets=False)


def test_subsets_are_selected_checked_and_merged(platform: Platform) -> None:
    publish_cc12m(platform)

    for stage in ("mds", "latents"):
        for asset, *partition in ((f"cc12m/{stage}_minres512", CC), (f"cc12m/{stage}_minres512_index",)):
            result = platform.run(asset, *partition, encoders=QUICK_ENCODERS)
            assert result.success, failure_of(result)
        assert platform.materialized(f"cc12m/{stage}_minres512") == {CC}
        found = [
            entry.dagster_event.asset_check_evaluation_data
            for run in platform.instance.get_runs()
            for entry in platform.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        ]
        found = [e for e in found if e.asset_key.to_user_string() == f"cc12m/{stage}_minres512"]
        assert {e.check_name for e in found} == set(CHECKS_OF_STAGE[stage])
        assert all(e.passed and e.partition == CC for e in found)
    root = platform.sandbox.data
    for stage_dir in (root.mds("cc12m", "minres512"), root.latents("cc12m", "sdxl1_dfnclipH14", "minres512")):
        assert [row["key"] for row in iter_rows(stage_dir.path)] == [f"{CC}/0", f"{CC}/2"]


def test_a_subset_that_cannot_be_told_refuses_the_whole_run(platform: Platform) -> None:
    publish_cc12m(platform)

    result = platform.run("cc12m/mds_minres512", CC, images={"max_image_size": 300})

    assert not result.success
    assert failure_of(result).startswith("max_image_size 300 makes every stored image smaller than the 512 px")


def test_what_jdb_has_beside_its_archives_is_one_asset(platform: Platform) -> None:
    result = platform.run("jdb/raw_test")

    assert result.success, failure_of(result)
    (event,) = result.get_asset_materialization_events()
    metadata = event.materialization.metadata
    lines, images = (extra.name for extra in sorted(JDB.raw_only, key=lambda extra: extra.images))
    assert metadata[f"{lines} kept"].value == metadata[f"{images} kept"].value == TEST_IMAGES
    assert metadata[f"{images} rejected"].value == 0
    assert metadata[f"{lines} details"].value == {"broken_lines": 0, "first_broken_lines": []}
    raw = platform.dir("raw").path
    assert sorted(str(p.relative_to(raw)) for p in raw.rglob("*") if p.is_file()) == sorted(
        f"{name}{suffix}" for name, ending in ((lines, ".jsonl"), (images, ".tar")) for suffix in (ending, ".json")
    )
    assert platform.run("jdb/raw_test").success
    assert all(ledger is not None for ledger in (platform.ledger("raw", images), platform.ledger("raw", lines)))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def other_byte(path: Path) -> None:
    """In the first picture, in front of what a decoder needs."""
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xd8\xff")] = 0
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("stage", "follows", "check"), [("raw", "mds", "tar_intact"), ("mds", "latents", "shards_intact")]
)
@pytest.mark.parametrize(("spoil", "reason"), [(cut, "upstream_missing"), (other_byte, "upstream_damaged")])
def test_damage_that_the_next_stage_meets_is_told_and_mended_where_it_lies(
    platform: Platform, stage: str, follows: str, check: str, spoil: Callable[[Path], None], reason: str
) -> None:
    platform.up_to(stage, "train/000", "train/001")
    data = platform.dir(stage).data("train/000")
    file = data if data.is_file() else next(data.glob("*.mds"))
    whole = file.read_bytes()
    spoil(file)

    assert not platform.run(f"jdb/{follows}", "train/000", "train/001").success

    assert platform.materialized(f"jdb/{follows}") == {"train/001"}
    failed = [
        (one.asset.path[-1], one.archive, one.reason, one.transient) for one in all_failed(platform.instance, JDB)
    ]
    assert failed == [(stage, "train/000", check, True), (follows, "train/000", reason, False)]

    for asset in (stage, follows):
        assert platform.run(f"jdb/{asset}", "train/000").success
    assert file.read_bytes() == whole
    assert all_failed(platform.instance, JDB) == []


def test_what_was_never_made_is_not_called_damaged(platform: Platform) -> None:
    platform.up_to("raw", "train/000")

    assert not platform.run("jdb/latents", "train/000").success

    (failed,) = all_failed(platform.instance, JDB)
    assert (failed.asset.path[-1], failed.reason) == ("latents", "upstream_missing")
