"""The text encoder: captions to the hidden states of all their tokens.

The states are taken by a hook on the last normalisation while open_clip's own `encode_text` runs. So whatever
layout an open_clip version uses inside (batch-first since 3.0, sequence-first before), the states are those
that its own pooling and projection see.

Shapes: B batch, L tokens (77 for CLIP), D width of the text tower (1024 for the default encoder).

Here: one text encoder and its tokenizer. Not here: cleaning captions, which is done when mds is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

from md_assets.core.errors import SettingsError
from md_assets.storage.models import OPENCLIP_PREFIX

SMALL_FILES = ("*.json", "*.txt", "*.model")
"""Config and tokenizer files of an open_clip repository, as `open_clip.push_to_hf_hub` writes them."""

Tokenize = Callable[[Sequence[str]], torch.Tensor]
"""Captions -> tokens_BL, int64."""


class TextEncoder:
    """The text tower of an open_clip model, ready to run.

    Args:
        model: a `CLIP` or `CustomTextCLIP`; its visual tower is dropped.
        tokenize: the tokenizer that belongs to it.
        name: what to call it in errors.
        device: where it runs.
        dtype: of its weights and activations.

    Attributes:
        tokenize: for use in any process.
        length, width: L and D, as measured on the model.

    Raises:
        SettingsError: the model's last normalisation does not give one state per token.
    """

    def __init__(self, model: Any, tokenize: Tokenize, name: str, device: torch.device, dtype: torch.dtype) -> None:
        del model.visual
        self.tokenize = tokenize
        self._model = model.to(device, dtype).eval().requires_grad_(False)
        self._device = device
        self._seen: list[torch.Tensor] = []
        norm = getattr(getattr(model, "text", model), "ln_final", None)
        if norm is not None:
            norm.register_forward_hook(lambda module, inputs, output: self._seen.append(output))
        tokens_BL = tokenize(["a", "b"])
        seen = self._run(tokens_BL)
        shape = tuple(seen[-1].shape) if seen else ()
        if len(shape) != 3 or shape[:2] != tuple(tokens_BL.shape):
            raise SettingsError(
                f"the text encoder {name} gives no hidden state per token (ln_final saw shape {list(shape)} "
                f"for tokens {list(tokens_BL.shape)})",
                "Choose an open_clip model with a plain CLIP text tower.",
            )
        self.length, self.width = int(shape[1]), int(shape[2])

    @classmethod
    def load(cls, text_encoder: str, revision: str, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """Load a text encoder from a local folder or, at one commit, from the Hub.

        Args:
            text_encoder: the setting: `openclip:hf-hub:REPO` or `openclip:local-dir:PATH`.
            revision: the commit, for a repository; not looked at for a folder.
            device, dtype: see the class.

        Raises:
            SettingsError: it cannot be loaded or used.
        """
        kind, _, place = text_encoder.removeprefix(OPENCLIP_PREFIX).partition(":")
        try:
            folder = Path(place) if kind == "local-dir" else _fetched(place, revision)
            name = f"local-dir:{folder.absolute()}"
            # without require_pretrained, open_clip only logs that there are no weights, and leaves them random
            model = open_clip.create_model(name, require_pretrained=True)
            tokenize = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, transformers, huggingface_hub and torch each raise their own
            raise SettingsError(
                f"the text encoder {text_encoder} cannot be loaded: {error}",
                "Correct `text_encoder` or MD_ASSETS_TEXT_ENCODER, or its files.",
            ) from error
        return cls(model, tokenize, text_encoder, device, dtype)

    def encode(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Tokens to the hidden states of all positions after the last normalisation.

        Args:
            tokens_BL: int64, of `tokenize`; on any device.

        Returns: hidden_BLD in the model's dtype, on its device.
        """
        return self._run(tokens_BL)[-1]

    @torch.inference_mode()
    def _run(self, tokens_BL: torch.Tensor) -> list[torch.Tensor]:
        """Run open_clip's forward; returns what its last normalisation gave out meanwhile."""
        self._model.encode_text(tokens_BL.to(self._device, non_blocking=True))
        seen, self._seen = self._seen, []
        return seen


def _fetched(repo: str, commit: str) -> Path:
    """The folder of a repository's files at `commit`, fetched where the Hub's cache does not have them.

    open_clip itself has no way to name a commit. Weights are taken as open_clip takes them: safetensors where
    there are some, else a pickle, never both (4 GB each for the default encoder).
    """
    for weights in (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        folder = Path(snapshot_download(repo, revision=commit, allow_patterns=[*SMALL_FILES, weights]))
        if (folder / weights).is_file():
            return folder
    raise FileNotFoundError(f"{repo} has neither {HF_SAFE_WEIGHTS_NAME} nor {HF_WEIGHTS_NAME} at {commit}")
