"""The name of an encoder pair in paths: `mds_latents_<tag>`.

Here: how a tag follows from the two settings. Not here: loading models, or their revisions, which are
in every ledger and not in the path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

KNOWN_VAES: Mapping[str, str] = {"stabilityai/stable-diffusion-xl-base-1.0": "sdxl1"}
KNOWN_TEXT_ENCODERS: Mapping[str, str] = {"apple/DFN5B-CLIP-ViT-H-14-378": "dfnclipH14"}
"""Tags that training configs of the reference codebase already name."""


def encoder_tag(vae: str, text_encoder: str) -> str:
    """The tag of a pair, `<vae>_<text encoder>`: `sdxl1_dfnclipH14` for the default one.

    Args:
        vae: the `vae` setting: a repository or a local folder.
        text_encoder: the `text_encoder` setting, e.g. `openclip:hf-hub:ORG/NAME`.

    A local copy whose path ends in a known repository's `org/name` is that repository's mirror and gets
    its tag. Any other model is called by the last part of its repository or path, reduced to letters and
    digits, so the tag is the same on every machine that names the model alike.
    """
    vae_tag = _tag(vae.rstrip("/").removesuffix("/vae"), KNOWN_VAES)
    return f"{vae_tag}_{_tag(text_encoder.rpartition(':')[2], KNOWN_TEXT_ENCODERS)}"


def _tag(model: str, known: Mapping[str, str]) -> str:
    model = model.rstrip("/")
    for repo, tag in known.items():
        if model == repo or model.endswith(f"/{repo}"):
            return tag
    return re.sub(r"[^A-Za-z0-9]+", "", model.rpartition("/")[2]) or "model"
