"""Which weights a model setting means, told without loading them.

Here: resolving an encoder setting to a definite content. Not here: the models, see `encoders/`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from md_assets.core.errors import SettingsError
from md_assets.storage.hub import HubClient

OPENCLIP_PREFIX = "openclip:"


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
        return _digest(path / "vae" if (path / "vae").is_dir() else path)
    if vae.startswith(("/", ".", "~")):
        raise SettingsError(f"the VAE folder {vae} does not exist", "Correct `vae` or MD_ASSETS_VAE.")
    return hub.revision(vae, "model")


def text_encoder_revision(text_encoder: str, hub: HubClient) -> str:
    """The commit of a text encoder on the Hub, or the digest of a local one; see `vae_revision`."""
    kind, _, place = text_encoder.removeprefix(OPENCLIP_PREFIX).partition(":")
    if not text_encoder.startswith(OPENCLIP_PREFIX) or kind not in ("hf-hub", "local-dir") or not place:
        raise SettingsError(
            f"text_encoder {text_encoder!r} is not understood",
            "Use openclip:hf-hub:ORG/NAME or openclip:local-dir:PATH.",
        )
    if kind == "hf-hub":
        return hub.revision(place, "model")
    if not Path(place).is_dir():
        raise SettingsError(f"the text encoder's folder {place} does not exist", "Correct MD_ASSETS_TEXT_ENCODER.")
    return _digest(Path(place))


def _digest(folder: Path) -> str:
    """A digest of all files below `folder`: names and contents, so a copy elsewhere has the same one."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not _is_hidden(p, folder))
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
