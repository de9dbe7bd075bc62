"""What a text encoder is: captions to the hidden states of all their tokens.

Shapes: B batch, L tokens, D width of the text tower.

Here: the protocol that every family of text encoders keeps, and which family a setting means. Not here: the families
(`encoders.open_clip_text`, `encoders.transformers_text`), and cleaning captions, which is done when mds is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch


class Tokens(NamedTuple):
    """Captions as a text encoder reads them.

    Attributes:
        ids_BL: int64.
        own_B: int64; leading positions of each caption that are its own, up to and including its end-of-text token.
            Behind them is padding. All L where the tokenizer does not tell.
    """

    ids_BL: torch.Tensor
    own_B: torch.Tensor


Tokenize = Callable[[Sequence[str]], Tokens]
"""Captions -> their tokens, cut and padded to L; may be called in any process."""


class TextEncoder(Protocol):
    """A text encoder, ready to run on one device.

    Attributes:
        tokenize: the tokenizer that belongs to it.
        length, width: L and D.
        masks_padding: whether the model masks padding, so that whoever reads the states must do so too.
        tells_end: whether the tokenizer tells where a caption ends.
    """

    tokenize: Tokenize
    length: int
    width: int
    masks_padding: bool
    tells_end: bool

    def encode(self, tokens: Tokens) -> torch.Tensor:
        """Tokens (on any device) to hidden_BLD after the last normalisation, in the model's dtype on its device."""
