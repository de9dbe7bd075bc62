"""Resource fields become the plain settings of the stages."""

from pathlib import Path

import pytest

from md_assets.core.settings import DEFAULT_TEXT_ENCODER, DEFAULT_VAE, ImageSettings
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.storage.hub import HubClient
from md_assets_tests.conftest import TinyEncoders


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MD_ASSETS_VAE", "MD_ASSETS_TEXT_ENCODER", "CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def test_defaults_are_those_of_the_settings() -> None:
    assert ImagesResource().settings() == ImageSettings()
    assert ImagesResource(jpeg_quality=90, min_image_size=128).settings() == ImageSettings(
        jpeg_quality=90, min_image_size=128
    )


def test_the_default_pair_has_the_tag_of_the_training_configs() -> None:
    assert EncodersResource().tag() == "sdxl1_dfnclipH14"
    mirror = EncodersResource(
        vae=f"/models/{DEFAULT_VAE}/vae", text_encoder=f"openclip:local-dir:/m/{DEFAULT_TEXT_ENCODER.split(':')[-1]}"
    )
    assert mirror.tag() == "sdxl1_dfnclipH14"


def test_environment_variables_are_below_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD_ASSETS_VAE", "/a/vae-one")
    monkeypatch.setenv("MD_ASSETS_TEXT_ENCODER", "openclip:local-dir:/a/text-one")
    assert EncodersResource().tag() == "vaeone_textone"
    assert EncodersResource(vae="/b/vae-two").tag() == "vaetwo_textone"


def test_encoder_settings_carry_the_digest_of_local_weights(tiny_encoders: TinyEncoders, tmp_path: Path) -> None:
    resource = EncodersResource(
        vae=str(tiny_encoders.vae),
        text_encoder=f"openclip:local-dir:{tiny_encoders.open_clip}",
        image_resolutions=[64],
        latent_mode="mean",
        text_storage="trimmed",
    )
    settings = resource.settings(HubClient(endpoint="http://127.0.0.1:9"))  # nobody answers there, nobody is asked
    assert len(settings.vae_revision) == len(settings.text_encoder_revision) == 64
    assert settings.vae_revision != settings.text_encoder_revision
    assert (settings.image_resolutions, settings.latent_mode, settings.text_storage) == ((64,), "mean", "trimmed")


@pytest.mark.parametrize(("visible", "count"), [("0", 1), ("0,1,2", 3), ("", 1), ("-1", 1)])
def test_a_process_for_each_visible_gpu(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert EncodersResource().process_count() == count
    assert EncodersResource(num_processes=2).process_count() == 2


def test_the_hub_client_gets_the_fields() -> None:
    client = HubResource(endpoint="http://127.0.0.1:1234", token="hf_secret", attempts=2).client()
    assert client.endpoint == "http://127.0.0.1:1234"
    assert "hf_secret" not in repr(client)


def test_other_processes_are_led_to_the_same_hub() -> None:
    assert HubResource().environment() == {}
    set_by_hand = HubResource(endpoint="http://127.0.0.1:1234", token="hf_secret").environment()
    assert set_by_hand == {"HF_ENDPOINT": "http://127.0.0.1:1234", "HF_TOKEN": "hf_secret"}
