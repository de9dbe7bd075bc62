"""Where everything lies below the data root. The one place that spells a path of the contract.

Here: names only. Not here: creating, publishing or reading anything, see `storage.publish`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from md_assets.core.errors import SettingsError

DATA_ROOT_VARIABLE = "MD_ASSETS_DATA"
DEFAULT_DATA_ROOT = "./datadir"

Stage = Literal["annotations", "raw", "mds", "latents"]
ARCHIVE_STAGES: tuple[Stage, ...] = ("raw", "mds", "latents")
"""The stages that every archive goes through, in order."""

_FILE_SUFFIX: dict[Stage, str] = {"annotations": ".parquet", "raw": ".tar"}
"""Of stages whose data are one file; the others publish a directory of shards."""


@dataclass(frozen=True)
class StageDir:
    """The directory of one stage of one dataset, e.g. `datadir/jdb/mds`.

    Attributes:
        dataset: slug.
        stage: what lies there.
        path: the directory.
        subset: of a stage of a subset (`core.spec.Subset`), its name; empty for the whole dataset.
    """

    dataset: str
    stage: Stage
    path: Path
    subset: str = ""

    @property
    def asset(self) -> str:
        """The last part of the asset's key, e.g. `mds` or `mds_minres512`."""
        return f"{self.stage}_{self.subset}" if self.subset else self.stage

    def ledger(self, archive: str) -> Path:
        """The ledger of `archive`; where it is absent the archive's data do not exist for any reader."""
        return self.path / f"{checked_archive_id(archive)}.json"

    def data(self, archive: str) -> Path:
        """The published data: a file for annotations and raw, a directory of shards for mds and latents."""
        return self.path / f"{checked_archive_id(archive)}{_FILE_SUFFIX.get(self.stage, '')}"

    def index(self, split: str) -> Path:
        """The merged `index.json`; `split` is empty for a dataset without splits."""
        return self.path / split / "index.json"


@dataclass(frozen=True)
class DataRoot:
    """The directory that holds all datasets."""

    path: Path

    @classmethod
    def from_environment(cls) -> DataRoot:
        """`$MD_ASSETS_DATA`, or `./datadir` where it is unset."""
        return cls(Path(os.environ.get(DATA_ROOT_VARIABLE) or DEFAULT_DATA_ROOT).absolute())

    def raw(self, dataset: str) -> StageDir:
        return StageDir(dataset, "raw", self.path / dataset / "raw")

    def mds(self, dataset: str, subset: str = "") -> StageDir:
        """`<ds>/mds`, of a subset `<ds>/mds_<subset>`."""
        return StageDir(dataset, "mds", self.path / dataset / _mds_name(subset), subset)

    def latents(self, dataset: str, encoder_tag: str, subset: str = "") -> StageDir:
        """`<ds>/mds_latents_<encoder_tag>`, of a subset `<ds>/mds_<subset>_latents_<encoder_tag>`.

        `encoder_tag`: see `core.encoder_tag`; `sdxl1_dfnclipH14` for the default pair.
        """
        return StageDir(dataset, "latents", self.path / dataset / f"{_mds_name(subset)}_latents_{encoder_tag}", subset)

    def annotations(self, dataset: str) -> StageDir:
        """Caption indexes; an annotations source's name takes the place of an archive's ID."""
        return StageDir(dataset, "annotations", self.path / dataset / "annotations")

    def kept_archive(self, dataset: str, archive: str, suffix: str) -> Path:
        """Where a fetched archive goes when `keep_archives` is on."""
        return self.path / dataset / "archives" / f"{checked_archive_id(archive)}{suffix}"


def _mds_name(subset: str) -> str:
    return f"mds_{subset}" if subset else "mds"


def checked_archive_id(archive: str) -> str:
    """`archive` itself, if it stays inside the directory it is joined to.

    Raises:
        SettingsError: for an empty ID and one with `..`, a leading `/`, a hidden or an empty part.
    """
    parts = archive.split("/")
    if any(not part or part.startswith(".") or "\\" in part or "\0" in part for part in parts):
        raise SettingsError(f"archive ID {archive!r} is no relative path", "Use an ID of the dataset's partitions.")
    return archive
