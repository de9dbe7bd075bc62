"""Settings: what is refused, and a fingerprint that follows from the values alone."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md_assets.core.errors import SettingsError
from md_assets.core.settings import (
    DEFAULT_TEXT_ENCODER,
    DEFAULT_VAE,
    EncoderSettings,
    ImageSettings,
    fingerprint,
    latents_settings,
    mds_settings,
    raw_settings,
    subset_settings,
)
from md_assets.core.source import HubFile
from md_assets.core.spec import AnnotationSource, Caption, DatasetSpec, Subset

PLAIN = DatasetSpec("plain", "Plain", "", ("a",), "tar", lambda a: HubFile("o/n", a), lambda a, m: iter(()))
SCORED = dataclasses.replace(
    PLAIN,
    annotations=(AnnotationSource("all", HubFile("o/n", "x"), (), lambda row: Caption("a", "k", ""), scored=True),),
)
IMAGES = ImageSettings()
MDS = mds_settings(PLAIN, IMAGES)
ENCODERS = EncoderSettings(DEFAULT_VAE, DEFAULT_TEXT_ENCODER, "a" * 40, "b" * 40)

NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)
SETTINGS = st.dictionaries(st.text(), NESTED, max_size=5)


def turned_around(value: Any) -> Any:
    """The same value with the keys of every mapping in reverse order."""
    if isinstance(value, dict):
        return {key: turned_around(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [turned_around(item) for item in value]
    return value


@given(SETTINGS)
def test_fingerprint_does_not_know_the_order_of_keys(settings: dict[str, Any]) -> None:
    assert fingerprint(turned_around(settings)) == fingerprint(settings)


@given(SETTINGS, SETTINGS)
def test_different_settings_have_different_fingerprints(one: dict[str, Any], other: dict[str, Any]) -> None:
    # repr, because Python takes True for 1 and they are different settings
    if repr(one) != repr(other) and one != other:
        assert fingerprint(one) != fingerprint(other)


def test_fingerprint_stays_what_ledgers_on_disk_say() -> None:
    """Another value here makes every archive that anyone has made stale: raise FORMAT_VERSION knowingly instead."""
    assert fingerprint({}) == "44136fa355b3678a"
    assert fingerprint({"b": [1, "é"], "a": {"x": None}}) == fingerprint({"a": {"x": None}, "b": [1, "é"]})


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(ImageSettings) if field.name != "safety_threshold"]
)
def test_every_setting_of_pixels_is_in_every_stages_fingerprint(field: str) -> None:
    changed = dataclasses.replace(IMAGES, **{field: getattr(IMAGES, field) - 1})
    assert fingerprint(raw_settings(changed)) != fingerprint(raw_settings(IMAGES))
    mds = mds_settings(PLAIN, changed)
    assert fingerprint(mds) != fingerprint(MDS)
    assert fingerprint(latents_settings(mds, ENCODERS)) != fingerprint(latents_settings(MDS, ENCODERS))


def test_the_safety_threshold_makes_stale_only_what_it_decides() -> None:
    stricter = dataclasses.replace(IMAGES, safety_threshold=0.1)
    assert raw_settings(stricter) == raw_settings(IMAGES)
    assert mds_settings(PLAIN, stricter) == MDS
    assert fingerprint(mds_settings(SCORED, stricter)) != fingerprint(mds_settings(SCORED, IMAGES))


def test_the_way_of_cleaning_captions_is_in_the_fingerprint_of_shards() -> None:
    cleaned = dataclasses.replace(PLAIN, caption_cleaning="deepfloyd")
    assert fingerprint(mds_settings(cleaned, IMAGES)) != fingerprint(MDS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vae_revision", "c" * 40),
        ("text_encoder_revision", "c" * 40),
        ("image_resolutions", (256,)),
        ("save_dtype", "float32"),
        ("latent_mode", "moments"),
        ("text_storage", "trimmed"),
        ("model_dtype", "float32"),
        ("seed", 1),
        ("save_images", True),
    ],
)
def test_what_decides_the_latents_is_in_their_fingerprint(field: str, value: object) -> None:
    changed = dataclasses.replace(ENCODERS, **{field: value})
    assert fingerprint(latents_settings(MDS, changed)) != fingerprint(latents_settings(MDS, ENCODERS))


def test_a_mirror_of_the_same_weights_makes_nothing_stale() -> None:
    moved = dataclasses.replace(ENCODERS, vae="/models/vae", text_encoder="openclip:local-dir:/models/clip")
    assert fingerprint(latents_settings(MDS, moved)) == fingerprint(latents_settings(MDS, ENCODERS))


def test_every_encoder_setting_is_fingerprinted_or_a_place() -> None:
    fields = {field.name for field in dataclasses.fields(EncoderSettings)}
    changed = dataclasses.replace(ENCODERS, text_storage="trimmed")
    assert fields - set(changed.as_fingerprinted()) == {"vae", "text_encoder"}


def test_latents_made_before_captions_could_be_trimmed_stay_current() -> None:
    before = {
        "vae_revision": ENCODERS.vae_revision,
        "text_encoder_revision": ENCODERS.text_encoder_revision,
        "image_resolutions": [256, 512],
        "model_dtype": "auto",
        "save_dtype": "float16",
        "latent_mode": "sample",
        "seed": 0,
        "save_images": False,
    }
    assert ENCODERS.as_fingerprinted() == before


def test_settings_come_back_from_json_as_they_are() -> None:
    """Ledgers are compared after a trip through JSON, which knows no tuples."""
    settings = latents_settings(MDS, ENCODERS)
    assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize(
    "changes",
    [
        {"min_image_size": 0},
        {"min_image_size": -1},
        {"min_image_size": 513},
        {"max_image_size": 255},
        {"jpeg_quality": 0},
        {"jpeg_quality": 101},
        {"safety_threshold": -0.1},
        {"safety_threshold": float("nan")},
        {"max_image_pixels": 0},
        {"max_member_bytes": 0},
    ],
)
def test_image_settings_out_of_range_are_refused_with_a_remedy(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        ImageSettings(**changes)
    assert next(iter(changes)) in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    "changes",
    [
        {"min_image_size": 512},
        {"min_image_size": 1},
        {"jpeg_quality": 1},
        {"jpeg_quality": 100},
        {"max_image_size": 256},
    ],
)
def test_the_ends_of_the_ranges_are_in_them(changes: dict[str, int]) -> None:
    assert dataclasses.asdict(ImageSettings(**changes)).items() >= changes.items()


@pytest.mark.parametrize(
    "changes",
    [
        {"image_resolutions": ()},
        {"image_resolutions": (0,)},
        {"image_resolutions": (-256,)},
        {"image_resolutions": (250,)},
        {"image_resolutions": (512, 256)},
        {"image_resolutions": (256, 256)},
        {"save_dtype": "bfloat16"},
        {"model_dtype": "fp8"},
        {"latent_mode": "median"},
        {"text_storage": "some"},
        {"save_dtype": ""},
    ],
)
def test_encoder_settings_out_of_range_are_refused_with_a_remedy(changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as caught:
        dataclasses.replace(ENCODERS, **changes)
    assert next(iter(changes)) in caught.value.what
    assert caught.value.remedy


def test_defaults_of_the_contract() -> None:
    assert (IMAGES.min_image_size, IMAGES.max_image_size) == (256, 512)
    assert IMAGES.jpeg_quality >= 90
    assert IMAGES.safety_threshold == 0.2
    assert (ENCODERS.image_resolutions, ENCODERS.save_dtype) == ((256, 512), "float16")
    assert not ENCODERS.save_images


def test_a_subsets_settings_are_the_wholes_and_its_own() -> None:
    subset = Subset("minres512", 512)
    for whole in (MDS, latents_settings(MDS, ENCODERS)):
        settings = subset_settings(whole, subset)
        assert settings == {**whole, "subset": {"name": "minres512", "min_edge_px": 512}}
        others = [whole, subset_settings(whole, Subset("minres512", 500)), subset_settings(whole, Subset("x", 512))]
        assert fingerprint(settings) not in map(fingerprint, others)


def test_a_subset_of_larger_images_than_are_stored_is_refused() -> None:
    assert subset_settings(mds_settings(PLAIN, ImageSettings(max_image_size=512)), Subset("a", 512))
    with pytest.raises(
        SettingsError, match=r"max_image_size 511 .* 512 px .* subset a have\. Choose max_image_size >="
    ):
        subset_settings(mds_settings(PLAIN, ImageSettings(max_image_size=511)), Subset("a", 512))
