"""Which weights a model setting means, told without loading them.

Here: resolving an encoder setting to a definite content. Not here: the models, see `encoders/`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from md_assets.core.errors import SettingsError
from md_assets.storage.hub import HubClient

OPENCLIP_PREFIX = "openclip:"

VAE_SUBFOLDER, TEXT_SUBFOLDER, TOKENIZER_SUBFOLDER = "vae", "text_encoder", "tokenizer"
"""Where a pipeline keeps its parts, as `DiffusionPipeline.save_pretrained` writes them."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def vae_revision(vae: str, hub: HubClient) -> str:
    """The commit of a VAE on the Hub, or the digest of a local one.

    Args:
        vae: the `vae` setting.
        hub: asked only when `vae` is no local folder.

    Raises:
        SettingsError: a path that does not exist, or has no files.
        SourceError: the Hub does not have it or does not give it.
    """
    path = Path(vae)
    if path.is_dir():
        return _digest(path / VAE_SUBFOLDER if (path / VAE_SUBFOLDER).is_dir() else path)
    if _is_path(vae):
        raise SettingsError(f"the VAE folder {vae} does not exist", "Correct `vae` or MD_ASSETS_VAE.")
    return hub.revision(vae, "model")


def text_encoder_revision(text_encoder: str, hub: HubClient) -> str:
    """The commit of a text encoder on the Hub, or the digest of a local one; see `vae_revision`."""
    if text_encoder.startswith(OPENCLIP_PREFIX):
        kind, _, place = text_encoder.removeprefix(OPENCLIP_PREFIX).partition(":")
    else:
        is_local = Path(text_encoder).is_dir() or _is_path(text_encoder)
        kind, place = "local-dir" if is_local else "hf-hub", text_encoder
    if not place or not (kind == "local-dir" or (kind == "hf-hub" and _REPOSITORY.fullmatch(place))):
        raise SettingsError(
            f"text_encoder {text_encoder!r} is not understood",
            "Use openclip:hf-hub:ORG/NAME or openclip:local-dir:PATH, or ORG/NAME or a path of a CLIP or T5 encoder "
            "of transformers.",
        )
    if kind == "hf-hub":
        return hub.revision(place, "model")
    folder = Path(place)
    if not folder.is_dir():
        raise SettingsError(f"the text encoder's folder {place} does not exist", "Correct MD_ASSETS_TEXT_ENCODER.")
    if text_encoder == place and (folder / TEXT_SUBFOLDER).is_dir():
        return _digest(folder, (TEXT_SUBFOLDER, TOKENIZER_SUBFOLDER))
    return _digest(folder)


def subfolder_of(model: str, subfolder: str, revision: str) -> str:
    """`subfolder` where `model` is a pipeline that has its part there, empty where it is that part alone.

    Args:
        model: a local folder, or a repository of the Hub (or its cache).
        subfolder: see `VAE_SUBFOLDER`.
        revision: the commit, for a repository.
    """
    if Path(model).is_dir():
        return subfolder if (Path(model) / subfolder).is_dir() else ""
    from huggingface_hub import hf_hub_download  # a tenth of a second that the code location does without
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(model, f"{subfolder}/config.json", revision=revision)
    except EntryNotFoundError:  # also where the Hub does not answer; then loading says so
        return ""
    return subfolder


def _is_path(model: str) -> bool:
    return model.startswith(("/", ".", "~"))


def _digest(folder: Path, parts: Sequence[str] = ("",)) -> str:
    """A digest of all files in `parts` of `folder`: names and contents, so a copy elsewhere has the same one."""
    found = (path for part in parts for path in (folder / part).rglob("*"))
    files = sorted(path for path in found if path.is_file() and not _is_hidden(path, folder))
    if not files:
        raise SettingsError(f"the model folder {folder} is empty", "Put the model's files there.")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
