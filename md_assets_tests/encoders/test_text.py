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
    assert tokens.ids_BL.dtype == tokens.own_B.dtype == torch.int64
    hidden_BLD = text.encode(tokens)
    assert hidden_BLD.shape == (3, text.length, text.width)
    assert hidden_BLD.isfinite().all()
    assert tokens.own_B[2] == text.length


def test_a_caption_ends_with_its_end_of_text_token(text: TextEncoder) -> None:
    """Also where padding is that token once more, or 0, which is a token of captions too."""
    assert text.tells_end
    captions = ["a cat", "a cat on a red chair!!", "", "the quick brown fox " * 100]
    tokens = text.tokenize(captions)
    a_cat, chair, empty, long = tokens.own_B.tolist()
    assert (0 < empty < a_cat < chair) and long == text.length
    (end,) = {int(ids_L[own - 1]) for ids_L, own in zip(tokens.ids_BL, tokens.own_B, strict=True)}
    assert not any(end in ids_L[: own - 1].tolist() for ids_L, own in zip(tokens.ids_BL, tokens.own_B, strict=True))


def test_a_captions_own_states_do_not_depend_on_what_is_behind_its_end(text: TextEncoder) -> None:
    """To the bit: so trimmed captions are what full ones begin with. Those of padding are all different."""
    tokens = text.tokenize(["a cat", "two dogs play with a ball under an old bridge"])
    behind_BL = torch.arange(text.length) >= tokens.own_B[:, None]
    other = tokens._replace(ids_BL=torch.where(behind_BL, 5, tokens.ids_BL))
    one_BLD, other_BLD = text.encode(tokens), text.encode(other)
    assert torch.equal(one_BLD[~behind_BL], other_BLD[~behind_BL])
    assert not torch.equal(one_BLD, other_BLD)
    if not text.masks_padding:
        pads_PD = torch.cat([one_BLD[behind_BL], one_BLD[:1, :1].squeeze(0)]).half()
        assert len(pads_PD.unique(dim=0)) == len(pads_PD)  # no padding's state stands for another's


def test_a_batch_does_not_move_a_caption(text: TextEncoder) -> None:
    captions = ["a cat", "two dogs play with a ball under an old bridge", ""]
    alone = torch.cat([text.encode(text.tokenize([caption])) for caption in captions])
    torch.testing.assert_close(text.encode(text.tokenize(captions)), alone, rtol=1e-4, atol=1e-5)
