"""Text encoders of transformers: CLIP (as in Stable Diffusion 1 and 2) and T5.

What is stored is what the model's own forward gives as `last_hidden_state`: for CLIP after `final_layer_norm`, for T5
after the encoder's last norm. CLIP is run as Stable Diffusion's pipelines run it, without a mask for padding. T5 is run
with the mask, so that no token sees padding; the states at padded positions are stored as the model gives them, and a
reader masks them by `caption_length`.

Shapes: B batch, L tokens, D width of the text tower.

Here: text encoders named by a repository or folder, without prefix. Not here: open_clip's, see
`encoders.open_clip_text`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

from md_assets.core.errors import SettingsError
from md_assets.encoders.text import Tokens
from md_assets.storage.models import TEXT_SUBFOLDER, TOKENIZER_SUBFOLDER, subfolder_of

T5_LENGTH = 120
"""Tokens of a T5 caption. T5 has no length of its own (its positions are relative); this one is PixArt-α's
(arXiv:2310.00426), which the reference takes too."""


class TransformersText:
    """A CLIP or T5 encoder of transformers, see `encoders.text.TextEncoder`.

    Args:
        model: a `CLIPTextModel` or `T5EncoderModel`, in the dtype in which it is to run.
        tokenizer: the one that belongs to it.
        device: where it runs.
    """

    tells_end = True

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self.masks_padding = isinstance(model, T5EncoderModel)
        longest = T5_LENGTH if self.masks_padding else model.config.max_position_embeddings
        self.length, self.width = min(longest, tokenizer.model_max_length), int(model.config.hidden_size)
        self.tokenize = _Tokenizer(tokenizer, self.length)
        self._device = device
        self._model = model.to(device).eval().requires_grad_(False)

    @classmethod
    def load(cls, text_encoder: str, revision: str, device: torch.device, dtype: torch.dtype) -> TransformersText:
        """Load a text encoder from a local folder or, at one commit, from the Hub.

        Args:
            text_encoder: the setting: a repository or folder, of a pipeline (`text_encoder` and `tokenizer` in it) or
                of a model alone.
            revision: the commit, for a repository; not looked at for a folder.
            device: where it runs.
            dtype: of weights and activations.

        Raises:
            SettingsError: it cannot be loaded, or is neither CLIP nor T5.
        """
        # Rust's threads would be forked with the workers, and there are as many workers as cores anyway.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        remedy = "Correct `text_encoder` or MD_ASSETS_TEXT_ENCODER, or its files."
        try:
            inside = subfolder_of(text_encoder, TEXT_SUBFOLDER, revision)
            at: dict[str, Any] = {"revision": revision or None, "subfolder": inside}
            kind = AutoConfig.from_pretrained(text_encoder, **at).model_type
            if kind not in ("clip", "clip_text_model", "t5"):
                raise ValueError(f"it is of the kind {kind!r}, neither CLIP nor T5")
            model, info = (T5EncoderModel if kind == "t5" else CLIPTextModel).from_pretrained(
                text_encoder, dtype=dtype, output_loading_info=True, **at
            )
            # The pipelines' own class for CLIP: unlike the fast one it mends text (ftfy) before it splits it.
            tokenizer = (AutoTokenizer if kind == "t5" else CLIPTokenizer).from_pretrained(
                text_encoder, **{**at, "subfolder": TOKENIZER_SUBFOLDER if inside else ""}
            )
        except Exception as error:  # transformers, huggingface_hub and safetensors each raise their own
            raise SettingsError(f"the text encoder {text_encoder} cannot be loaded: {error}", remedy) from error
        if info["missing_keys"]:  # transformers only logs these, and leaves them random
            raise SettingsError(
                f"the text encoder {text_encoder} lacks weights, e.g. {sorted(info['missing_keys'])[0]}", remedy
            )
        return cls(model, tokenizer, device)

    @torch.inference_mode()
    def encode(self, tokens: Tokens) -> torch.Tensor:
        """hidden_BLD, see `encoders.text.TextEncoder`."""
        ids_BL = tokens.ids_BL.to(self._device, non_blocking=True)
        mask_BL = None
        if self.masks_padding:
            own_B = tokens.own_B.to(self._device, non_blocking=True)
            mask_BL = (torch.arange(self.length, device=self._device) < own_B[:, None]).long()
        return self._model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state


class _Tokenizer:
    """A tokenizer of transformers, padding at the end."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        tokenizer.padding_side = "right"
        self._tokenizer, self._length = tokenizer, length

    def __call__(self, captions: Sequence[str]) -> Tokens:
        encoded = self._tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        # The mask tells also where padding is the end-of-text token once more, as in Stable Diffusion 1.
        return Tokens(encoded["input_ids"], encoded["attention_mask"].sum(1))
