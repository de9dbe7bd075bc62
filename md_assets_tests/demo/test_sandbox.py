"""The demo's sandbox: nothing outside it is named, and its servers answer."""

import os
from pathlib import Path

import pytest
import requests

from md_assets.core.encoder_tag import encoder_tag
from md_assets.demo.sandbox import MINIATURES, Sandbox, environment_variables
from md_assets.storage.links import parse_links


def test_nothing_outside_the_sandbox_is_named_in_its_environment(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    environment = sandbox.environment("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert environment.pop("HF_ENDPOINT") == "http://127.0.0.1:1"
    assert environment.pop("MD_ASSETS_COCO_URL") == "http://127.0.0.1:2/coco"
    assert environment.pop("HF_HUB_DISABLE_TELEMETRY") == "1"
    assert all(str(tmp_path) in value for value in environment.values())
    assert set(environment) >= {"MD_ASSETS_DATA", "MD_ASSETS_SA1B_LINKS", "DAGSTER_HOME", "HF_HOME"}


def test_its_encoders_have_the_tag_of_the_models_they_stand_for(tmp_path: Path) -> None:
    environment = Sandbox(tmp_path).environment("")
    assert encoder_tag(environment["MD_ASSETS_VAE"], environment["MD_ASSETS_TEXT_ENCODER"]) == "sdxl1_dfnclipH14"


def test_variables_are_set_for_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MD_ASSETS_TEST_KEPT", "before")
    monkeypatch.delenv("MD_ASSETS_TEST_NEW", raising=False)
    with environment_variables({"MD_ASSETS_TEST_KEPT": "inside", "MD_ASSETS_TEST_NEW": "inside"}):
        assert os.environ["MD_ASSETS_TEST_KEPT"] == os.environ["MD_ASSETS_TEST_NEW"] == "inside"
    assert os.environ["MD_ASSETS_TEST_KEPT"] == "before"
    assert "MD_ASSETS_TEST_NEW" not in os.environ


def test_only_the_sources_that_are_asked_for_are_written(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    sandbox.prepare(12, 64, datasets=["cc12m", "coco2014"])
    assert [path.name for path in (sandbox.hub_root / "datasets").iterdir()] == ["pixparse"]
    assert [path.name for path in sandbox.web_root.iterdir()] == ["coco"]


def test_its_servers_answer_and_only_signed_links_open_sa1bs_archives(tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path)
    for slug in ("sa1b", "coco2014", "cc12m"):
        miniature = MINIATURES[slug]
        miniature.write(sandbox.hub_root, sandbox.web_root, miniature.samples, 64)
    with sandbox.served() as environment:
        links = parse_links(Path(environment["MD_ASSETS_SA1B_LINKS"]).read_bytes(), "links")
        link = links["sa_000000.tar"]
        assert link.expires_s is not None
        assert requests.get(link.url, timeout=10).content == (sandbox.web_root / "sa1b/sa_000000.tar").read_bytes()
        assert requests.get(link.url.partition("?")[0], timeout=10).status_code == 403
        zips = f"{environment['MD_ASSETS_COCO_URL']}/zips"
        assert requests.head(f"{zips}/val2014.zip", timeout=10).status_code == 200
        hub = f"{environment['HF_ENDPOINT']}/datasets/pixparse/cc12m-wds/resolve/main"
        assert requests.head(f"{hub}/cc12m-train-0000.tar", timeout=10).status_code in (200, 302, 307)
