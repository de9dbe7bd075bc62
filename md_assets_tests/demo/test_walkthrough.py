"""The demo's sandbox; the walk itself is in `end_to_end/test_demo.py`."""

import os
import socket
from pathlib import Path

import pytest

from md_assets.core.encoder_tag import encoder_tag
from md_assets.core.errors import SettingsError
from md_assets.demo.walkthrough import BY_HAND, STEPS, Sandbox, environment_variables, run_ui, ui_command


def test_nothing_outside_the_sandbox_is_named_in_its_environment(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    environment = sandbox.environment("http://127.0.0.1:1")
    assert environment.pop("HF_ENDPOINT") == "http://127.0.0.1:1"
    assert environment.pop("HF_HUB_DISABLE_TELEMETRY") == "1"
    assert all(str(tmp_path) in value for value in environment.values())


def test_its_encoders_have_the_tag_of_the_models_they_stand_for(tmp_path: Path) -> None:
    environment = Sandbox(tmp_path).environment("")
    assert encoder_tag(environment["MD_ASSETS_VAE"], environment["MD_ASSETS_TEXT_ENCODER"]) == "sdxl1_dfnclipH14"


def test_variables_are_set_for_the_block_only(monkeypatch) -> None:
    monkeypatch.setenv("MD_ASSETS_TEST_KEPT", "before")
    monkeypatch.delenv("MD_ASSETS_TEST_NEW", raising=False)
    with environment_variables({"MD_ASSETS_TEST_KEPT": "inside", "MD_ASSETS_TEST_NEW": "inside"}):
        assert os.environ["MD_ASSETS_TEST_KEPT"] == os.environ["MD_ASSETS_TEST_NEW"] == "inside"
    assert os.environ["MD_ASSETS_TEST_KEPT"] == "before"
    assert "MD_ASSETS_TEST_NEW" not in os.environ


def test_one_archive_is_left_for_the_reader() -> None:
    assert all(BY_HAND not in (partition_range or ()) for _, partition_range in STEPS)


def test_the_command_that_opens_the_ui_names_the_folder_only_where_it_must() -> None:
    assert ui_command(Path("demo_data")).endswith("demo --ui")
    assert ui_command(Path("/tmp/elsewhere")).endswith("demo --ui --folder /tmp/elsewhere")


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port} cannot be used"):
            run_ui(tmp_path / "sandbox", port)
    assert not (tmp_path / "sandbox").exists()
