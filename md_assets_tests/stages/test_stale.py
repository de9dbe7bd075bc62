"""In what archives differ from what is wanted."""

from typing import Any

import pytest

from md_assets.core.paths import DataRoot
from md_assets.core.settings import EncoderSettings, ImageSettings, latents_settings, mds_settings, raw_settings
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages.stale import Difference, WantedSettings, changed_inputs, differing_settings
from md_assets_tests.stages.made_chain import ENCODERS

RAW = raw_settings(ImageSettings())


@pytest.fixture
def root(tmp_path: Any) -> DataRoot:
    return DataRoot(tmp_path)


def test_equal_settings_do_not_differ() -> None:
    assert differing_settings(RAW, raw_settings(ImageSettings())) == ()


def test_each_setting_that_differs_is_named_with_both_values() -> None:
    found = raw_settings(ImageSettings(jpeg_quality=90, min_image_size=1))
    assert differing_settings(found, RAW) == (
        Difference("images.jpeg_quality", 90, 95),
        Difference("images.min_image_size", 1, 256),
    )


def test_settings_that_only_one_side_has() -> None:
    cleaned = mds_settings(CC12M, ImageSettings())
    assert differing_settings(RAW, cleaned) == (Difference("caption_cleaning", None, "deepfloyd"),)
    assert differing_settings(cleaned, RAW) == (Difference("caption_cleaning", "deepfloyd", None),)


def test_revisions_that_nobody_knows_are_not_compared() -> None:
    def settings(**changes: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {"vae": "", "text_encoder": "", "vae_revision": "a", "text_encoder_revision": "b"}
        return latents_settings(RAW, EncoderSettings(**{**fields, **changes}))

    other = settings(vae_revision="c", seed=1)
    assert [d.what for d in differing_settings(settings(), other)] == ["encoders.seed", "encoders.vae_revision"]
    unknown = settings(vae_revision="", text_encoder_revision="", seed=1)
    assert [d.what for d in differing_settings(settings(), unknown)] == ["encoders.seed"]


def test_inputs_that_are_known_are_compared() -> None:
    inputs = {"raw": "a", "annotations": "b"}
    assert changed_inputs(inputs, {"raw": "a"}) == changed_inputs(inputs, {}) == ()
    assert changed_inputs(inputs, {"raw": "a", "annotations": "c"}) == (Difference("input annotations"),)
    assert changed_inputs(inputs, {"raw": "x"})[0].is_input


def test_what_a_run_would_use_for_each_stage(root: DataRoot) -> None:
    images = ImageSettings(jpeg_quality=90)
    wanted = WantedSettings(images, ENCODERS, "tiny")
    assert wanted.of(JDB, root.raw("jdb")) == raw_settings(images)
    mds = mds_settings(CC12M, images)
    latents = latents_settings(mds, ENCODERS)
    subset = {"subset": {"name": "minres512", "min_edge_px": 512}}
    assert wanted.of(CC12M, root.mds("cc12m")) == mds
    assert wanted.of(CC12M, root.mds("cc12m", "minres512")) == {**mds, **subset}
    assert wanted.of(CC12M, root.latents("cc12m", "tiny")) == latents
    assert wanted.of(CC12M, root.latents("cc12m", "tiny", "minres512")) == {**latents, **subset}


def test_revisions_of_another_pair_are_not_compared(root: DataRoot) -> None:
    wanted = WantedSettings(encoders=ENCODERS, encoder_tag="tiny").of(JDB, root.latents("jdb", "not_tiny"))
    assert (wanted["encoders"]["vae_revision"], wanted["encoders"]["text_encoder_revision"]) == ("", "")
    assert wanted["encoders"]["image_resolutions"] == [32]


def test_a_subset_that_cannot_be_made_differs_in_what_keeps_it_from_being_made(root: DataRoot) -> None:
    small = WantedSettings(ImageSettings(max_image_size=300)).of(CC12M, root.mds("cc12m", "minres512"))
    normal = WantedSettings().of(CC12M, root.mds("cc12m", "minres512"))
    assert differing_settings(normal, small) == (Difference("images.max_image_size", 512, 300),)
