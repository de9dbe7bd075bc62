"""Samples that cannot be encoded: an image that cannot be decoded is rejected alone, a number that is none fails."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from md_assets.core.paths import DataRoot
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.storage.publish import read_ledger
from md_assets_tests.stages.test_latents import kinds, rows, run, unpublished


@pytest.fixture
def plan(latents_plan) -> LatentsPlan:
    """Two archives of mds, ready to be encoded."""
    return latents_plan({"train/000": 5, "train/002": 7}, batch_size=3)


@pytest.fixture
def unicorns(plan: LatentsPlan, tiny_encoders, tmp_path: Path, mds_rows, publish_mds) -> Callable[..., LatentsPlan]:
    """A function (captions) that publishes train/003 with them, and plans with an encoder that makes a NaN of the word
    unicorn: in the weights of its token's embedding, so that no other caption is reached."""
    import open_clip

    folder = tmp_path / "nan"
    shutil.copytree(tiny_encoders.open_clip, folder)
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["token_embedding.weight"][open_clip.tokenize("unicorn")[0, 1]] = torch.nan
    save_file(weights, folder / "open_clip_model.safetensors")

    def make(captions: Sequence[str]) -> LatentsPlan:
        samples = [{**row, "caption": caption} for row, caption in zip(mds_rows("train/003", 9), captions, strict=True)]
        publish_mds(DataRoot(tmp_path), "jdb", "train/003", samples)
        encoders = replace(plan.encoders, text_encoder=f"openclip:local-dir:{folder}")
        return replace(plan, encoders=encoders, archives=("train/000", "train/003", "train/002"))

    return make


@pytest.mark.parametrize("count", [1, 9], ids=["one", "all"])
def test_a_sample_that_is_not_finite_fails_its_archive_alone(unicorns: Callable[..., LatentsPlan], count: int) -> None:
    plan = unicorns(["a unicorn"] * count + ["a horse"] * (9 - count))
    events = run(plan)
    assert kinds(events) == {"train/000": "published", "train/002": "published", "train/003": "failed"}
    named = ", ".join(f"train/003/{number:04}" for number in range(min(count, 3)))
    assert events["train/003"]["error"].startswith(
        f"jdb train/003: latents of {named} are not finite numbers in float16"
    )
    assert events["train/003"]["reason"] == "not_finite"
    assert unpublished(plan, "train/003")


def test_an_image_that_cannot_be_decoded_is_rejected_alone(plan: LatentsPlan, mds_rows, publish_mds) -> None:
    """It is as mds wrote it, so no other attempt will bring it."""
    samples = mds_rows("train/000", 5)
    samples[1]["jpg"] = samples[1]["jpg"][:500]
    run(replace(plan, encoder_tag="whole"), ["train/000"])
    publish_mds(DataRoot(Path(plan.data_root)), "jdb", "train/000", samples)
    assert kinds(run(plan, ["train/000"])) == {"train/000": "published"}
    ledger = read_ledger(plan.latents_dir.ledger("train/000"))
    assert ledger is not None and ledger.balances
    assert ledger.rejected == {"undecodable": ["train/000/0001"]}
    assert ledger.details["statistics"]["rows"] == 4
    assert ledger.details["round_trip"]["keys"] == ["train/000/0000", "train/000/0004"]
    assert max(ledger.details["round_trip"]["caption_error"]) < 1e-3
    whole = rows(replace(plan, encoder_tag="whole"), "train/000")
    assert rows(plan, "train/000") == [whole[0], *whole[2:]]


def test_images_of_which_many_cannot_be_decoded_fail_their_archive(plan: LatentsPlan, mds_rows, publish_mds) -> None:
    publish_mds(
        DataRoot(Path(plan.data_root)), "jdb", "train/000", [{**r, "jpg": b"x"} for r in mds_rows("train/000", 5)]
    )
    event = run(plan)["train/000"]
    assert (event["event"], event["reason"]) == ("failed", "undecodable")
    assert "cannot be decoded. Materialize jdb/raw and mds of it again" in event["error"]
