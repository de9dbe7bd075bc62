"""What a model setting means: the same weights have the same revision wherever they lie, others another one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from md_assets.core.errors import SettingsError, SourceError
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.storage.hub import HubClient
from md_assets.storage.models import subfolder_of, text_encoder_revision, vae_revision
from md_assets.storage.retry import TransferPolicy


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    for name in ("models/org/encoder", "models/org/vae"):
        folder = tmp_path / "hub" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(f'{{"name": "{name}"}}')
    with LoopbackHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def client(hub: LoopbackHub) -> HubClient:
    return HubClient(hub.endpoint, policy=TransferPolicy(attempts=2, first_delay_s=0.01))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "vae" / "model.safetensors").write_bytes(bytes(3_000_000))
    (folder / "README.md").write_text("text")
    return folder


def openclip(folder: Path) -> str:
    return f"openclip:local-dir:{folder}"


def test_a_copy_elsewhere_has_the_same_revision(tmp_path: Path, folder: Path, client: HubClient) -> None:
    copy = shutil.copytree(folder, tmp_path / "other" / "name")
    assert vae_revision(str(copy), client) == vae_revision(str(folder), client)
    assert text_encoder_revision(openclip(copy), client) == text_encoder_revision(openclip(folder), client)


def test_of_a_pipeline_only_the_vae_counts(folder: Path, client: HubClient) -> None:
    whole, bare = vae_revision(str(folder), client), vae_revision(str(folder / "vae"), client)
    assert whole == bare
    (folder / "README.md").write_text("other text")
    assert vae_revision(str(folder), client) == whole


def test_the_order_in_which_files_were_made_does_not_count(tmp_path: Path, client: HubClient) -> None:
    for folder, names in (("one", "abc"), ("other", "cba")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(name)
    assert vae_revision(str(tmp_path / "one"), client) == vae_revision(str(tmp_path / "other"), client)


def test_any_changed_file_is_another_revision(folder: Path, client: HubClient) -> None:
    seen = {vae_revision(str(folder), client)}
    weights = folder / "vae" / "model.safetensors"
    weights.write_bytes(bytes(2_999_999) + b"\1")
    seen.add(vae_revision(str(folder), client))
    weights.rename(folder / "vae" / "renamed.safetensors")
    seen.add(vae_revision(str(folder), client))
    (folder / "vae" / "extra").touch()
    seen.add(vae_revision(str(folder), client))
    assert len(seen) == 4


def test_bytes_cannot_move_from_one_file_to_the_next_unseen(tmp_path: Path, client: HubClient) -> None:
    seen = set()
    for number, contents in enumerate([("12", "3"), ("1", "23"), ("123", "")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in zip("ab", contents, strict=True):
            (folder / name).write_text(content)
        seen.add(vae_revision(str(folder), client))
    assert len(seen) == 3


def test_hidden_files_do_not_count(folder: Path, client: HubClient) -> None:
    """Download tools leave their locks and metadata in such."""
    before = vae_revision(str(folder), client), text_encoder_revision(openclip(folder), client)
    (folder / "vae" / ".cache" / "huggingface").mkdir(parents=True)
    (folder / "vae" / ".cache" / "huggingface" / "x.lock").write_text("1")
    (folder / "vae" / ".gitattributes").write_text("1")
    assert (vae_revision(str(folder), client), text_encoder_revision(openclip(folder), client)) == before


def test_a_folder_below_a_hidden_one_counts(folder: Path, tmp_path: Path, client: HubClient) -> None:
    hidden = shutil.copytree(folder, tmp_path / ".cache" / "model")
    assert vae_revision(str(hidden), client) == vae_revision(str(folder), client)


def test_links_to_files_count_as_what_they_lead_to(folder: Path, tmp_path: Path, client: HubClient) -> None:
    """As in the Hub's own cache, whose snapshots are links to blobs."""
    before = vae_revision(str(folder), client)
    weights = folder / "vae" / "model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    assert vae_revision(str(folder), client) == before


def test_a_repository_has_its_commit(hub: LoopbackHub, client: HubClient) -> None:
    encoder, vae = text_encoder_revision("openclip:hf-hub:org/encoder", client), vae_revision("org/vae", client)
    assert len(encoder) == len(vae) == 40 and encoder != vae
    changed = hub.repositories.root / "models" / "org" / "vae" / "config.json"
    changed.write_text('{"other": 1}')
    later = HubClient(hub.endpoint)
    assert vae_revision("org/vae", later) != vae
    assert text_encoder_revision("openclip:hf-hub:org/encoder", later) == encoder


@pytest.mark.parametrize(
    "text_encoder",
    [
        "",
        "openclip:",
        "openclip:hf-hub",
        "openclip:hf-hub:",
        "openclip:local-dir:",
        "openclip:other:x",
        "hf-hub:org/encoder",
        "ViT-H-14",
    ],
)
def test_a_text_encoder_that_is_not_understood(text_encoder: str, client: HubClient) -> None:
    with pytest.raises(SettingsError, match=r"is not understood.*openclip:hf-hub:ORG/NAME.*CLIP or T5"):
        text_encoder_revision(text_encoder, client)


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "~/none", "../none"])
def test_a_folder_that_does_not_exist_is_not_looked_for_on_the_hub(
    path: str, client: HubClient, hub: LoopbackHub
) -> None:
    with pytest.raises(SettingsError, match=r"VAE folder .* does not exist"):
        vae_revision(path, client)
    with pytest.raises(SettingsError, match=r"folder .* does not exist"):
        text_encoder_revision(f"openclip:local-dir:{path}", client)
    with pytest.raises(SettingsError, match=r"folder .* does not exist"):
        text_encoder_revision(path, client)
    assert not hub.requests


def test_of_a_pipeline_only_text_encoder_and_tokenizer_count(tmp_path: Path, client: HubClient) -> None:
    for part in ("text_encoder", "tokenizer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(part)
    seen = [text_encoder_revision(str(tmp_path), client)]
    for part in ("vae", "tokenizer", "text_encoder"):
        (tmp_path / part / "config.json").write_text("other")
        seen.append(text_encoder_revision(str(tmp_path), client))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_a_text_encoder_of_transformers_has_its_revision(hub: LoopbackHub, folder: Path, client: HubClient) -> None:
    on_hub = text_encoder_revision("org/encoder", client)
    assert on_hub == text_encoder_revision("openclip:hf-hub:org/encoder", client)
    assert text_encoder_revision(str(folder), client) == text_encoder_revision(openclip(folder), client)


def test_a_part_lies_in_its_subfolder_or_the_model_is_the_part(
    folder: Path, hub: LoopbackHub, client: HubClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert subfolder_of(str(folder), "vae", "") == "vae"
    assert subfolder_of(str(folder / "vae"), "vae", "") == ""
    for file in folder.rglob("*"):
        if file.is_file():
            target = hub.repositories.root / "models" / "org" / "pipeline" / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert subfolder_of("org/pipeline", "vae", vae_revision("org/pipeline", client)) == "vae"
    assert subfolder_of("org/encoder", "vae", vae_revision("org/encoder", client)) == ""


def test_a_repository_that_does_not_exist_is_named(client: HubClient) -> None:
    with pytest.raises(SourceError, match="org/none") as caught:
        vae_revision("org/none", client)
    assert caught.value.reason == "not_found"


def test_an_empty_folder_is_no_model(tmp_path: Path, client: HubClient) -> None:
    (tmp_path / "vae" / ".cache").mkdir(parents=True)
    with pytest.raises(SettingsError, match="is empty"):
        vae_revision(str(tmp_path), client)
    with pytest.raises(SettingsError, match="is empty"):
        text_encoder_revision(openclip(tmp_path / "vae"), client)
