"""Encoder tags: the reference's names for the default pair, plain and stable ones for any other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md_assets.core.encoder_tag import encoder_tag
from md_assets.core.paths import checked_archive_id
from md_assets.core.settings import DEFAULT_TEXT_ENCODER, DEFAULT_VAE

KNOWN_VAE = "stabilityai/stable-diffusion-xl-base-1.0"
KNOWN_TEXT_ENCODER = "apple/DFN5B-CLIP-ViT-H-14-378"


def test_the_default_pair_has_the_name_that_training_configs_use() -> None:
    assert encoder_tag(DEFAULT_VAE, DEFAULT_TEXT_ENCODER) == "sdxl1_dfnclipH14"


@pytest.mark.parametrize(
    "vae",
    [
        KNOWN_VAE,
        f"/models/{KNOWN_VAE}",
        f"/models/{KNOWN_VAE}/",
        f"/models/{KNOWN_VAE}/vae",
        f"/models/{KNOWN_VAE}/vae/",
    ],
)
@pytest.mark.parametrize(
    "text_encoder",
    [
        f"openclip:hf-hub:{KNOWN_TEXT_ENCODER}",
        f"openclip:local-dir:/models/{KNOWN_TEXT_ENCODER}",
        f"openclip:local-dir:/models/{KNOWN_TEXT_ENCODER}/",
    ],
)
def test_a_mirror_of_the_default_pair_is_the_default_pair(vae: str, text_encoder: str) -> None:
    assert encoder_tag(vae, text_encoder) == "sdxl1_dfnclipH14"


@pytest.mark.parametrize(
    ("vae", "expected"),
    [
        ("black-forest-labs/FLUX.1-dev", "FLUX1dev"),
        ("/models/tiny_vae", "tinyvae"),
        ("stable-diffusion-xl-base-1.0", "stablediffusionxlbase10"),
        (f"not{KNOWN_VAE}", "stablediffusionxlbase10"),
        ("/models/---", "model"),
    ],
)
def test_another_model_is_called_by_the_last_part_of_its_name(vae: str, expected: str) -> None:
    assert encoder_tag(vae, DEFAULT_TEXT_ENCODER) == f"{expected}_dfnclipH14"


@pytest.mark.parametrize(
    ("text_encoder", "expected"),
    [
        ("openai/clip-vit-large-patch14", "clipvitlargepatch14"),
        ("/models/openai/clip-vit-large-patch14/", "clipvitlargepatch14"),
        ("stabilityai/stable-diffusion-2-1", "stablediffusion21"),
        ("DeepFloyd/t5-v1_1-xxl", "t5v11xxl"),
        ("openclip:hf-hub:laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "CLIPViTH14laion2Bs32Bb79K"),
    ],
)
def test_text_encoders_of_every_family_have_tags(text_encoder: str, expected: str) -> None:
    assert encoder_tag(DEFAULT_VAE, text_encoder) == f"sdxl1_{expected}"


def test_one_model_has_one_tag_on_the_hub_and_on_every_disk() -> None:
    names = ["openclip:hf-hub:org/ViT-B-32", "openclip:local-dir:/a/ViT-B-32", "openclip:local-dir:b/ViT-B-32/"]
    assert {encoder_tag(DEFAULT_VAE, name) for name in names} == {"sdxl1_ViTB32"}


@given(st.text(), st.text())
def test_a_tag_is_two_plain_words_that_are_safe_in_a_path(vae: str, text_encoder: str) -> None:
    tag = encoder_tag(vae, f"openclip:local-dir:{text_encoder}")
    assert checked_archive_id(tag) == tag
    assert tag.isascii()
    assert all(word.isalnum() for word in tag.split("_"))
    assert tag.count("_") == 1
