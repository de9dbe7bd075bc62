"""transformers' text encoders: what their own classes give, called plainly."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from md_assets.core.errors import SettingsError
from md_assets.encoders.transformers_text import T5_LENGTH, TransformersText

CPU = torch.device("cpu")
CAPTIONS = ["a photo of a cat", "", "portrait of a woman with 12 birds, watercolor", "the lazy dog " * 60]


def loaded(folder: Path, dtype: torch.dtype = torch.float32, revision: str = "") -> TransformersText:
    return TransformersText.load(str(folder), revision, CPU, dtype)


@pytest.fixture(scope="module")
def clip(tiny_clip: Path) -> TransformersText:
    return loaded(tiny_clip)


@pytest.fixture(scope="module")
def t5(tiny_t5: Path) -> TransformersText:
    return loaded(tiny_t5)


def test_clips_states_are_those_that_the_model_itself_gives(clip: TransformersText, tiny_clip: Path) -> None:
    tokens = clip.tokenize(CAPTIONS)
    model = CLIPTextModel.from_pretrained(tiny_clip / "text_encoder").eval()
    with torch.no_grad():
        plain_BLD = model(tokens.ids_BL).last_hidden_state
    torch.testing.assert_close(clip.encode(tokens), plain_BLD, rtol=1e-4, atol=1e-4)
    norm = plain_BLD.var(dim=-1, correction=0)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=1e-3, atol=1e-3)  # after final_layer_norm


def test_clips_tokens_are_those_of_clips_own_tokenizer(clip: TransformersText) -> None:
    """open_clip's copy of it pads with 0, transformers' with the end token."""
    captions = [*CAPTIONS, "It’s a “Quick”  FOX &amp; 😀\n"]
    ours, plain = clip.tokenize(captions).ids_BL, open_clip.tokenize(captions)
    ended = plain.cummax(dim=1).values == 49407
    assert torch.equal(ours, torch.where(ended, 49407, plain))


def test_stable_diffusion_2_pads_with_another_token_than_the_end(tiny_clip: Path, tmp_path: Path) -> None:
    """Its tokenizer pads with "!", its encoder has GELU: both as its repository says."""
    shutil.copytree(tiny_clip, tmp_path, dirs_exist_ok=True)
    CLIPTokenizer.from_pretrained(tiny_clip / "tokenizer", pad_token="!").save_pretrained(tmp_path / "tokenizer")
    config = CLIPTextConfig.from_pretrained(tiny_clip / "text_encoder", hidden_act="gelu")
    CLIPTextModel(config).save_pretrained(tmp_path / "text_encoder")
    text = loaded(tmp_path)
    tokens = text.tokenize(["wow!!", "a cat"])
    assert [ids[-1].item() for ids in tokens.ids_BL] == [0, 0]
    assert tokens.own_B.tolist() == [5, 4]  # what pads is a token of the first caption too, twice
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    assert model.config.hidden_act == "gelu"
    with torch.no_grad():
        plain_BLD = model(tokens.ids_BL).last_hidden_state
    torch.testing.assert_close(text.encode(tokens), plain_BLD, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "t5"])
def test_a_realistically_sized_model_gives_its_own_states(
    clip: TransformersText, t5: TransformersText, tiny_clip: Path, tiny_t5: Path, family: str
) -> None:
    """Stable Diffusion 1's CLIP, half of T5 v1.1 base's layers, with random weights and the tiny ones' tokenizers."""
    if family == "clip":
        wide = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        plain, tokens = CLIPTextModel(CLIPTextConfig(**wide)).eval(), clip.tokenize(CAPTIONS)
        tokenizer, mask_BL = CLIPTokenizer.from_pretrained(tiny_clip / "tokenizer"), None
    else:
        wide = {"d_model": 768, "d_ff": 2048, "num_layers": 6, "num_heads": 12, "vocab_size": 256}
        plain, tokens = T5EncoderModel(T5Config(**wide, feed_forward_proj="gated-gelu")).eval(), t5.tokenize(CAPTIONS)
        tokenizer = T5Tokenizer(str(tiny_t5 / "spiece.model"), extra_ids=0, legacy=True)
        mask_BL = (torch.arange(T5_LENGTH) < tokens.own_B[:, None]).long()
    with torch.no_grad():
        plain_BLD = plain(tokens.ids_BL, attention_mask=mask_BL).last_hidden_state
    text = TransformersText(plain, tokenizer, CPU)
    assert (text.length, text.width) == ({"clip": 77, "t5": T5_LENGTH}[family], 768)
    torch.testing.assert_close(text.encode(text.tokenize(CAPTIONS)), plain_BLD, rtol=1e-4, atol=1e-4)


def test_t5s_states_are_those_that_the_model_itself_gives(t5: TransformersText, tiny_t5: Path) -> None:
    plain = T5Tokenizer(str(tiny_t5 / "spiece.model"), extra_ids=0, legacy=True)(
        CAPTIONS, padding="max_length", truncation=True, max_length=T5_LENGTH, return_tensors="pt"
    )
    tokens = t5.tokenize(CAPTIONS)
    assert torch.equal(tokens.ids_BL, plain["input_ids"])
    assert torch.equal(tokens.own_B, plain["attention_mask"].sum(1))
    model = T5EncoderModel.from_pretrained(tiny_t5).eval()
    with torch.no_grad():
        plain_BLD = model(**plain).last_hidden_state
    torch.testing.assert_close(t5.encode(tokens), plain_BLD, rtol=1e-4, atol=1e-4)


def test_t5_sees_no_padding(t5: TransformersText, tiny_t5: Path) -> None:
    tokens = t5.tokenize(["a cat"])
    count = int(tokens.own_B[0])
    model = T5EncoderModel.from_pretrained(tiny_t5).eval()
    with torch.no_grad():
        unpadded_BLD = model(tokens.ids_BL[:, :count]).last_hidden_state
        unmasked_BLD = model(tokens.ids_BL).last_hidden_state[:, :count]
    masked_BLD = t5.encode(tokens)[:, :count]
    torch.testing.assert_close(masked_BLD, unpadded_BLD, rtol=1e-4, atol=1e-4)
    assert (masked_BLD - unmasked_BLD).abs().max() > 1e-2


def test_a_pipeline_and_its_parts_in_one_folder_are_the_same(clip: TransformersText, tiny_clip, tmp_path) -> None:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_clip / part, tmp_path, dirs_exist_ok=True)
    bare = loaded(tmp_path)
    assert torch.equal(bare.encode(bare.tokenize(CAPTIONS)), clip.encode(clip.tokenize(CAPTIONS)))


def test_bfloat16_is_near_float32(t5: TransformersText, tiny_t5: Path) -> None:
    half, tokens = loaded(tiny_t5, torch.bfloat16), t5.tokenize(CAPTIONS)
    assert half.encode(tokens).dtype == torch.bfloat16
    full_BLD = t5.encode(tokens)
    assert 0 < (half.encode(tokens).float() - full_BLD).norm() / full_BLD.norm() < 0.03


def test_the_text_encoder_of_a_whole_clip_will_do(clip: TransformersText, tiny_clip: Path, tmp_path: Path) -> None:
    """As in openai/clip-vit-large-patch14, whose weights include the vision tower."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_config = CLIPTextConfig.from_pretrained(tiny_clip / "text_encoder").to_dict()
    whole = CLIPModel(CLIPConfig(text_config=text_config, vision_config={**small, "image_size": 32, "patch_size": 16}))
    whole.text_model.load_state_dict(CLIPTextModel.from_pretrained(tiny_clip / "text_encoder").text_model.state_dict())
    whole.save_pretrained(tmp_path)
    shutil.copytree(tiny_clip / "tokenizer", tmp_path, dirs_exist_ok=True)
    tokens = clip.tokenize(CAPTIONS)
    assert torch.equal(loaded(tmp_path).encode(tokens), clip.encode(tokens))


def test_missing_weights_are_no_random_weights(tiny_t5: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_t5, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.block.0.layer.0.SelfAttention.q.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match=r"lacks weights, e\.g\. encoder\.block\.0"):
        loaded(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SettingsError, match=r"cannot be loaded.*'bert', neither CLIP nor T5.*MD_ASSETS_TEXT_ENCODER"):
        loaded(tmp_path)


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "model alone"])
def test_a_repository_is_read_at_its_commit(
    clip: TransformersText, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: bool
) -> None:
    """Offline, from a Hub cache with two commits, of which `main` is the wrong one."""
    commit, repo = "1" * 40, tmp_path / "models--org--name"
    right = repo / "snapshots" / commit
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_clip / part, right / part if pipeline else right, dirs_exist_ok=True)
    (repo / "snapshots" / ("2" * 40)).mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("2" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True)
    pinned = TransformersText.load("org/name", commit, CPU, torch.float32)
    tokens = pinned.tokenize(CAPTIONS)
    assert torch.equal(pinned.encode(tokens), clip.encode(clip.tokenize(CAPTIONS)))
