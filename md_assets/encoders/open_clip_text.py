"""open_clip's text towers.

The states are taken by a hook on the last normalisation while open_clip's own `encode_text` runs. So whatever
layout an open_clip version uses inside (batch-first since 3.0, sequence-first before), the states are those
that its own pooling and projection see.

Shapes: B batch, L tokens (77 for CLIP), D width of the text tower (1024 for the default encoder).

Here: text encoders of the settings `openclip:…`. Not here: those of transformers, see `encoders.transformers_text`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import snapshot_download
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.tokenizer import SimpleTokenizer

from md_assets.core.errors import SettingsError
from md_assets.encoders.text import Tokens
from md_assets.storage.models import OPENCLIP_PREFIX

SMALL_FILES = ("*.json", "*.txt", "*.model")
"""Config and tokenizer files of an open_clip repository, as `open_clip.push_to_hf_hub` writes them."""


class OpenClipText:
    """The text tower of an open_clip model, see `encoders.text.TextEncoder`.

    Args:
        model: a `CLIP` or `CustomTextCLIP`; its visual tower is dropped.
        tokenizer: captions -> ids_BL, the one that belongs to it.
        name: what to call it in errors.
        device: where it runs.
        dtype: of its weights and activations.

    Raises:
        SettingsError: the model's last normalisation does not give one state per token.
    """

    masks_padding = False

    def __init__(
        self,
        model: Any,
        tokenizer: Callable[[Sequence[str]], torch.Tensor],
        name: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        del model.visual
        self.tokenize = _Tokenizer(tokenizer)
        self.tells_end = self.tokenize.end is not None
        self._model = model.to(device, dtype).eval().requires_grad_(False)
        self._device = device
        self._seen: list[torch.Tensor] = []
        norm = getattr(getattr(model, "text", model), "ln_final", None)
        if norm is not None:
            norm.register_forward_hook(lambda module, inputs, output: self._seen.append(output))
        tokens = self.tokenize(["a", "b"])
        seen = self._run(tokens)
        shape = tuple(seen[-1].shape) if seen else ()
        if len(shape) != 3 or shape[:2] != tuple(tokens.ids_BL.shape):
            raise SettingsError(
                f"the text encoder {name} gives no hidden state per token (ln_final saw shape {list(shape)} "
                f"for tokens {list(tokens.ids_BL.shape)})",
                "Choose an open_clip model with a plain CLIP text tower.",
            )
        self.length, self.width = int(shape[1]), int(shape[2])

    @classmethod
    def load(cls, text_encoder: str, revision: str, device: torch.device, dtype: torch.dtype) -> OpenClipText:
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
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, transformers, huggingface_hub and torch each raise their own
            raise SettingsError(
                f"the text encoder {text_encoder} cannot be loaded: {error}",
                "Correct `text_encoder` or MD_ASSETS_TEXT_ENCODER, or its files.",
            ) from error
        return cls(model, tokenizer, text_encoder, device, dtype)

    def encode(self, tokens: Tokens) -> torch.Tensor:
        """hidden_BLD, see `encoders.text.TextEncoder`."""
        return self._run(tokens)[-1]

    @torch.inference_mode()
    def _run(self, tokens: Tokens) -> list[torch.Tensor]:
        """Run open_clip's forward; returns what its last normalisation gave out meanwhile."""
        self._seen = []  # what a forward that failed left there
        self._model.encode_text(tokens.ids_BL.to(self._device, non_blocking=True))
        seen, self._seen = self._seen, []
        return seen


class _Tokenizer:
    """A tokenizer of open_clip.

    Attributes:
        end: number of the end-of-text token; None for tokenizers of other models than CLIP, which open_clip wraps.
    """

    def __init__(self, tokenizer: Callable[[Sequence[str]], torch.Tensor]) -> None:
        self._tokenizer = tokenizer
        self.end: int | None = tokenizer.eot_token_id if isinstance(tokenizer, SimpleTokenizer) else None

    def __call__(self, captions: Sequence[str]) -> Tokens:
        ids_BL = self._tokenizer(captions)
        length = ids_BL.shape[1]
        if self.end is None:
            return Tokens(ids_BL, torch.full((len(ids_BL),), length))
        # The last one: a caption may spell the token out. Padding is 0, which is a token of captions too ("!").
        return Tokens(ids_BL, length - (ids_BL == self.end).flip(1).int().argmax(1))


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
