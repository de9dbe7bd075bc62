"""open_clip's text towers: the states that open_clip itself pools, and those of the formulas written out."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from md_assets.core.errors import SettingsError
from md_assets.encoders.open_clip_text import OpenClipText

CPU = torch.device("cpu")


def captions(count: int) -> list[str]:
    return [" ".join(["a photo of", "cats"][: 1 + i % 2] + [f"and {n}" for n in range(i % 9)]) for i in range(count)]


def model_folder(folder: Path, **changes) -> Path:
    """An open_clip folder with random weights, whose config has `changes` of `text_cfg`; `custom_text` goes on top."""
    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "custom_text": changes.pop("custom_text", False),
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1, **changes},
    }
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(open_clip.create_model(f"local-dir:{folder}").state_dict(), folder / "open_clip_model.safetensors")
    return folder


def loaded(folder: Path) -> OpenClipText:
    return OpenClipText.load(f"openclip:local-dir:{folder}", "", CPU, torch.float32)


@pytest.fixture(scope="module")
def text(tiny_encoders) -> OpenClipText:
    return loaded(tiny_encoders.open_clip)


def plain_forward(
    weights: dict[str, torch.Tensor], tokens_BL: torch.Tensor, layers: int = 2, heads: int = 2
) -> torch.Tensor:
    """CLIP's text transformer written out: pre-norm blocks, causal attention, QuickGELU, ln_final."""

    def norm(name: str, x_BLD: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(
            x_BLD, x_BLD.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"]
        )

    length = tokens_BL.shape[1]
    x_BLD = weights["token_embedding.weight"][tokens_BL] + weights["positional_embedding"][:length]
    hidden_from_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        qkv = norm(f"{block}.ln_1", x_BLD) @ weights[f"{block}.attn.in_proj_weight"].T
        qkv = qkv + weights[f"{block}.attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden_from_LL, float("-inf"))
        attended_BLD = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x_BLD = (
            x_BLD + attended_BLD @ weights[f"{block}.attn.out_proj.weight"].T + weights[f"{block}.attn.out_proj.bias"]
        )
        y = norm(f"{block}.ln_2", x_BLD) @ weights[f"{block}.mlp.c_fc.weight"].T + weights[f"{block}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x_BLD = x_BLD + y @ weights[f"{block}.mlp.c_proj.weight"].T + weights[f"{block}.mlp.c_proj.bias"]
    return norm("ln_final", x_BLD)


# 77 is the batch at which a forward with the axes swapped raises nothing, since batch and length agree.
@pytest.mark.parametrize("count", [1, 5, 77])
def test_hidden_states_are_those_of_a_plain_forward(text: OpenClipText, tiny_encoders, count: int) -> None:
    weights = load_file(tiny_encoders.open_clip / "open_clip_model.safetensors")
    tokens = text.tokenize(captions(count))
    hidden_BLD = text.encode(tokens)
    assert hidden_BLD.shape == (count, 77, 64)
    torch.testing.assert_close(hidden_BLD, plain_forward(weights, tokens.ids_BL), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_realistically_sized_tower_gives_the_states_of_a_plain_forward() -> None:
    """The width and heads of the default encoder's tower and a quarter of its layers, with random weights."""
    towers = {"vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}}
    towers["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 6}
    model = open_clip.CLIP(embed_dim=32, quick_gelu=True, **towers)
    weights = dict(model.state_dict())
    text = OpenClipText(model, open_clip.get_tokenizer("ViT-B-32"), "large", CPU, torch.float32)
    tokens = text.tokenize(captions(3))
    assert (text.length, text.width) == (77, 1024)
    plain_BLD = plain_forward(weights, tokens.ids_BL, layers=6, heads=16)
    torch.testing.assert_close(text.encode(tokens), plain_BLD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("count", [3, 77])
def test_pooled_and_projected_they_are_open_clips_own(tmp_path: Path, custom_text: bool, count: int) -> None:
    folder = model_folder(tmp_path / "model", custom_text=custom_text)
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    assert type(model).__name__ == ("CustomTextCLIP" if custom_text else "CLIP")
    text = loaded(folder)
    tokens = text.tokenize(captions(count))
    end_B = tokens.ids_BL.argmax(dim=1)  # the end token has the highest number
    pooled_BD = text.encode(tokens)[torch.arange(count), end_B]
    projection = (model.text if custom_text else model).text_projection
    with torch.no_grad():
        torch.testing.assert_close(pooled_BD @ projection, model.encode_text(tokens.ids_BL), rtol=1e-4, atol=1e-4)


def test_length_and_width_are_the_models(text: OpenClipText, tmp_path: Path) -> None:
    assert (text.length, text.width) == (77, 64)
    short = loaded(model_folder(tmp_path / "model", context_length=20, width=16))
    assert (short.length, short.width) == (20, 16)
    assert short.encode(short.tokenize(["a"] * 3)).shape == (3, 20, 16)


def test_each_call_gives_its_own_states(text: OpenClipText) -> None:
    one, two = text.encode(text.tokenize(["one"])), text.encode(text.tokenize(["two"]))
    assert not torch.equal(one, two)
    assert torch.equal(text.encode(text.tokenize(["one"])), one)


def test_a_long_caption_is_cut_at_the_end(text: OpenClipText) -> None:
    tokens = text.tokenize(["cat " * 500])
    assert tokens.ids_BL.shape == (1, 77)
    assert text.encode(tokens).isfinite().all()


def test_a_caption_ends_at_its_last_end_token(text: OpenClipText) -> None:
    """CLIP's tokenizer reads the token in a caption that spells it out."""
    plain, spelled = text.tokenize(["a cat", "a <end_of_text> cat!"]).own_B.tolist()
    assert (plain, spelled) == (4, 6)


def test_a_tokenizer_of_another_model_does_not_tell_the_end(tiny_encoders) -> None:
    model = open_clip.create_model(f"local-dir:{tiny_encoders.open_clip}")
    clips = open_clip.get_tokenizer("ViT-B-32")
    text = OpenClipText(model, lambda captions: clips(captions), "tiny", CPU, torch.float32)
    assert not text.tells_end
    assert text.tokenize(["a cat"]).own_B.tolist() == [77]


def test_bfloat16_is_near_float32(text: OpenClipText, tiny_encoders) -> None:
    half = OpenClipText.load(f"openclip:local-dir:{tiny_encoders.open_clip}", "", CPU, torch.bfloat16)
    tokens = text.tokenize(captions(4))
    assert half.encode(tokens).dtype == torch.bfloat16
    full_BLD = text.encode(tokens)
    assert 0 < (half.encode(tokens).float() - full_BLD).norm() / full_BLD.norm() < 0.02


def test_the_visual_tower_is_dropped(tiny_encoders) -> None:
    model = open_clip.create_model(f"local-dir:{tiny_encoders.open_clip}")
    OpenClipText(model, open_clip.get_tokenizer("ViT-B-32"), "tiny", CPU, torch.float32)
    assert not any(name.startswith("visual.") for name, _ in model.named_parameters())


def test_a_model_without_a_state_per_token_is_refused(tmp_path: Path) -> None:
    """CoCa's text tower normalises its class token only."""
    folder = model_folder(tmp_path / "model", custom_text=True, embed_cls=True)
    with pytest.raises(SettingsError, match=r"no hidden state per token \(ln_final saw shape \[2, 32\]"):
        loaded(folder)


def test_missing_weights_are_no_random_weights(tiny_encoders, tmp_path: Path) -> None:
    shutil.copy(tiny_encoders.open_clip / "open_clip_config.json", tmp_path)
    with pytest.raises(SettingsError, match=f"{tmp_path} cannot be loaded.*MD_ASSETS_TEXT_ENCODER"):
        loaded(tmp_path)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_repository_is_read_at_its_commit(
    text: OpenClipText, tiny_encoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """Offline, from a Hub cache with two commits, of which `main` is the wrong one."""
    commit, repo = "1" * 40, tmp_path / "models--org--name"
    right = repo / "snapshots" / commit
    right.mkdir(parents=True)
    shutil.copy(tiny_encoders.open_clip / "open_clip_config.json", right)
    if weights.endswith(".bin"):
        torch.save(load_file(tiny_encoders.open_clip / "open_clip_model.safetensors"), right / weights)
    else:
        shutil.copy(tiny_encoders.open_clip / weights, right)
    model_folder(repo / "snapshots" / ("2" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("2" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    pinned = OpenClipText.load("openclip:hf-hub:org/name", commit, CPU, torch.float32)
    tokens = text.tokenize(captions(2))
    assert torch.equal(pinned.encode(tokens), text.encode(tokens))


def test_a_repository_without_weights_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models--org--name" / "snapshots" / ("1" * 40)).mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match=r"org/name has neither .* nor .* at 1111"):
        OpenClipText.load("openclip:hf-hub:org/name", "1" * 40, CPU, torch.float32)
