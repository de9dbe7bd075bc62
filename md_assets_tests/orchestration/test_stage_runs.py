"""What a run of each asset does beyond calling its stage."""

from md_assets.demo.walkthrough import failure_of
from md_assets.storage.mds import read_index
from md_assets_tests.orchestration.conftest import Platform


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
    assert "| train | 1 | 6 | 1 | 1 | 198 | 0 |" in event.materialization.metadata["archives"].value
    (shard,) = read_index(platform.dir("mds").path / "train")
    assert shard.path.parent.name == "000"


def test_encoders_that_do_not_exist_are_one_clear_sentence(platform: Platform) -> None:
    platform.up_to("mds", "train/000")

    result = platform.run("jdb/latents", "train/000", encoders={"vae": "/does/not/exist"})

    assert not result.success
    assert "the VAE folder /does/not/exist does not exist. Correct `vae` or MD_ASSETS_VAE" in failure_of(result)
