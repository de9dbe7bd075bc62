"""Cleaning of captions as DeepFloyd-IF does it, by the cleaner that diffusers carries.

The reference has a copy of the cleaner that trims white space once more in between. So where brackets, addresses or
markup stood at an end of a caption, a dash or a quote may stay there that the reference removes.

Here: calling it safely. Not here: the rules, which are diffusers' own (`IFPipeline._text_preprocessing`), and which
datasets are cleaned (`datasets/`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

CLEANING_PACKAGES = ("beautifulsoup4", "diffusers", "ftfy")
"""What decides the result, by their names in the package index."""

CLEANED_CHARACTERS = 5_000
"""Of a longer caption only so many are cleaned and kept. Several of the cleaner's expressions take time that grows with
the square of the length: 10,000 digits and a letter need 3 seconds, 100,000 would need 5 minutes. No text encoder
reads as far: CLIP has 77 tokens, T5 512."""


def cleaned_caption(text: str) -> str:
    """A caption in lower case without markup, addresses, names of files, shop talk and Chinese characters.

    Cleaned twice over, as diffusers and the reference do it.

    Returns: the caption; empty where nothing is left, or nothing but full stops, and where the markup is so broken that
        the cleaner refuses it. Never with NUL or half a surrogate pair, even where markup spells one: ftfy sees to it.

    The first call imports diffusers, which takes seconds.
    """
    clean, refusals = _cleaner()
    try:
        cleaned = clean(text[:CLEANED_CHARACTERS])
    except refusals:
        return ""
    return cleaned if cleaned.strip(". ") else ""


@functools.cache
def _cleaner() -> tuple[Callable[[str], str], tuple[type[Exception], ...]]:
    """The cleaner, and what it raises on markup that it refuses."""
    import bs4
    import ftfy  # noqa: F401 (without either, diffusers would leave captions uncleaned and only log it)
    from diffusers.pipelines.deepfloyd_if.pipeline_if import IFPipeline

    # Beautiful Soup doubts that an address or the name of a file is markup.
    warnings.filterwarnings("ignore", category=bs4.MarkupResemblesLocatorWarning)
    # Its method needs none of the models that a pipeline is made of.
    pipeline = IFPipeline.__new__(IFPipeline)

    def clean(text: str) -> str:
        (cleaned,) = pipeline._text_preprocessing([text], clean_caption=True)
        return str(cleaned)

    # ValueError: a character reference of more digits than Python converts.
    return clean, (bs4.exceptions.ParserRejectedMarkup, ValueError)
