"""The settings that runs would use, as plain values."""

from pathlib import Path

import pytest

from md_assets.core.errors import SettingsError
from md_assets.core.settings import EncoderSettings, ImageSettings
from md_assets.demo.tiny_encoders import write_tiny_open_clip, write_tiny_vae
from md_assets.orchestration.run_config import wanted_settings
from md_assets.stages.stale import WantedSettings


@pytest.fixture(autouse=True)
def local_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is asked for at the Hub."""
    monkeypatch.setenv("MD_ASSETS_VAE", str(tmp_path / "none"))
    monkeypatch.setenv("MD_ASSETS_TEXT_ENCODER", f"openclip:local-dir:{tmp_path / 'none'}")


def test_the_defaults_are_those_of_the_core(tmp_path: Path) -> None:
    """`md-assets status` compares with these without asking Dagster."""
    wanted, problem = wanted_settings(None)
    assert wanted == WantedSettings(ImageSettings(), EncoderSettings("", "", "", ""), "none_none")
    assert f"the VAE folder {tmp_path / 'none'} does not exist" in problem


def test_revisions_come_with_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD_ASSETS_VAE", str(write_tiny_vae(tmp_path / "coder")))
    monkeypatch.setenv("MD_ASSETS_TEXT_ENCODER", f"openclip:local-dir:{write_tiny_open_clip(tmp_path / 'clip')}")
    wanted, problem = wanted_settings(None)
    assert problem == "" and wanted.encoder_tag == "coder_clip"
    assert len(wanted.encoders.vae_revision) == len(wanted.encoders.text_encoder_revision) == 64


def test_a_run_config_replaces_what_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUALITY", "91")
    file = tmp_path / "run.yaml"
    file.write_text(
        "ops: {}\n"
        "resources:\n"
        "  images: {config: {jpeg_quality: {env: QUALITY}, min_image_size: 10, num_workers: 3}}\n"
        "  encoders: {config: {image_resolutions: [256], save_dtype: float32, text_encoder: 'openclip:hf-hub:a/b-c'}}\n"
    )
    wanted, problem = wanted_settings(file)
    assert wanted.images == ImageSettings(jpeg_quality=91, min_image_size=10)
    assert wanted.encoders == EncoderSettings("", "", "", "", (256,), save_dtype="float32")
    assert wanted.encoder_tag == "none_bc" and problem


@pytest.mark.parametrize(
    "text",
    [
        "resources: {images: {config: {jpeg_quality: text}}}",
        "resources: {images: {config: {unknown: 1}}}",
        "resources: [1]",
        "{",
        "resources: {images: {config: {jpeg_quality: {env: NOT_SET}}}}",
    ],
)
def test_a_file_that_is_no_run_config_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"run\.yaml is no run config of Dagster: ") as caught:
        wanted_settings(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml is no run config"):
        wanted_settings(tmp_path / "none.yaml")


def test_values_out_of_range_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("resources: {images: {config: {jpeg_quality: 101}}}")
    with pytest.raises(SettingsError, match="jpeg_quality 101 is out of range"):
        wanted_settings(file)
