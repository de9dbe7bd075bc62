"""What all families of text encoders keep, whatever model is behind it."""

from pathlib import Path

import pytest
import torch

from md_assets.encoders.open_clip_text import OpenClipText
from md_assets.encoders.text import TextEncoder
from md_assets.encoders.transformers_text import TransformersText

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["open_clip", "clip", "t5"])
def text(request: pytest.FixtureRequest, tiny_encoders, tiny_clip: Path, tiny_t5: Path) -> TextEncoder:
    if request.param == "open_clip":
        return OpenClipText.load(f"openclip:local-dir:{tiny_encoders.open_clip}", "", CPU, torch.float32)
    return TransformersText.load(str({"clip": tiny_clip, "t5": tiny_t5}[request.param]), "", CPU, torch.float32)


def test_length_and_width_are_those_of_what_comes_out(text: TextEncoder) -> None:
    tokens = text.tokenize(["a cat", "", "the quick brown fox " * 100])
    assert tokens.ids_BL.shape == (3, text.length)
    assert tokens.ids_BL.dtype == tokens.attended_B.dtype == torch.int64
    hidden_BLD = text.encode(tokens)
    assert hidden_BLD.shape == (3, text.length, text.width)
    assert hidden_BLD.isfinite().all()
    assert tokens.attended_B[2] == text.length


def test_how_many_tokens_a_caption_has_is_told_where_padding_is_masked(text: TextEncoder) -> None:
    short, long = text.tokenize(["a cat", "a cat on a red chair"]).attended_B.tolist()
    assert (0 < short < long < text.length) if text.masks_padding else (short == long == text.length)


def test_a_batch_does_not_move_a_caption(text: TextEncoder) -> None:
    captions = ["a cat", "two dogs play with a ball under an old bridge", ""]
    alone = torch.cat([text.encode(text.tokenize([caption])) for caption in captions])
    torch.testing.assert_close(text.encode(text.tokenize(captions)), alone, rtol=1e-4, atol=1e-5)
