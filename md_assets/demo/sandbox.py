"""The demo's own folder: miniature sources, tiny encoders, data and Dagster's records; nothing outside it is written.

Here: the folder, what is in it, and serving its sources. Not here: one source (`demo.miniatures` and the modules called
like datasets), what is run on them (`demo.walkthrough`).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from md_assets.core.paths import DATA_ROOT_VARIABLE, DataRoot
from md_assets.core.settings import DEFAULT_TEXT_ENCODER, DEFAULT_VAE
from md_assets.datasets.coco2014 import BASE_VARIABLE
from md_assets.datasets.sa1b import LINKS_VARIABLE
from md_assets.demo import conceptual12m, diffusiondb, journeydb, mscoco, segment_anything, textcaps
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.loopback_web import LoopbackWeb, write_link_list
from md_assets.demo.miniatures import Miniature

MINIATURES: Mapping[str, Miniature] = {
    module.MINIATURE.slug: module.MINIATURE
    for module in (journeydb, diffusiondb, conceptual12m, segment_anything, textcaps, mscoco)
}
"""All of them by slug, in the order in which the demo takes them."""

LINKS_LAST_S = 30 * 24 * 3600
"""For so long the real links last, about."""


@dataclass(frozen=True)
class Sandbox:
    """The folder.

    Attributes:
        path: absolute.
    """

    path: Path

    @property
    def hub_root(self) -> Path:
        return self.path / "hub"

    @property
    def web_root(self) -> Path:
        return self.path / "web"

    @property
    def links(self) -> Path:
        """The list of signed links to sa1b's archives, written when its server starts."""
        return self.path / "sa1b_links.tsv"

    @property
    def data(self) -> DataRoot:
        return DataRoot(self.path / "datadir")

    @property
    def dagster_home(self) -> Path:
        return self.path / "dagster_home"

    @property
    def _vae(self) -> Path:
        # Folders called like the real repositories: a mirror, so its latents lie where training configs look.
        return self.path / "models" / DEFAULT_VAE

    @property
    def _text_encoder(self) -> Path:
        return self.path / "models" / DEFAULT_TEXT_ENCODER.rpartition(":")[2]

    def prepare(
        self, samples: int | None = None, size_px: int | None = None, datasets: Collection[str] = tuple(MINIATURES)
    ) -> None:
        """Write the sources and the encoders, unless they are there.

        Args:
            samples, size_px: of each archive; the miniatures' own by default, which hold every planted fault.
            datasets: slugs of the miniatures that are needed.
        """
        from md_assets.demo.tiny_encoders import write_tiny_open_clip, write_tiny_vae

        self.dagster_home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("dagster.yaml"), self.dagster_home / "dagster.yaml")
        for slug in datasets:
            miniature = MINIATURES[slug]
            miniature.write(self.hub_root, self.web_root, samples or miniature.samples, size_px or miniature.size_px)
        for folder, write in ((self._vae, write_tiny_vae), (self._text_encoder, write_tiny_open_clip)):
            if not folder.exists():
                unfinished = folder.with_name(f".{folder.name}.new")
                shutil.rmtree(unfinished, ignore_errors=True)
                write(unfinished)
                unfinished.rename(folder)

    def environment(self, endpoint: str, web_url: str = "") -> dict[str, str]:
        """What the demo's processes need to find each other.

        Args:
            endpoint: of the Hub.
            web_url: of the web server; empty where only datasets of the Hub are used.
        """
        web = {LINKS_VARIABLE: str(self.links), BASE_VARIABLE: f"{web_url}/{mscoco.WEB_FOLDER}"} if web_url else {}
        return {
            DATA_ROOT_VARIABLE: str(self.data.path),
            "DAGSTER_HOME": str(self.dagster_home),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.path / "hf_home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MD_ASSETS_VAE": str(self._vae),
            "MD_ASSETS_TEXT_ENCODER": f"openclip:local-dir:{self._text_encoder}",
            **web,
        }

    @contextmanager
    def served(self) -> Iterator[dict[str, str]]:
        """Serve the sources until the block ends; gives the environment in which they are found."""
        archives = segment_anything.WEB_FOLDER
        with LoopbackHub(self.hub_root) as hub, LoopbackWeb(self.web_root, signed=[f"{archives}/*"]) as web:
            expires_s = time.time() + LINKS_LAST_S
            write_link_list(
                self.links, segment_anything.LISTED, lambda name: web.signed_url(f"{archives}/{name}", expires_s)
            )
            yield self.environment(hub.endpoint, web.base_url)


@contextmanager
def environment_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
