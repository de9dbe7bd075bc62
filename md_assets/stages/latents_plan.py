"""What a run of the latents stage is to do: a value that travels to its processes, and knows what is done already.

Here: the plan. Not here: carrying it out (`stages.latents`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.settings import EncoderSettings, latents_settings
from md_assets.stages.once import current, upstream_ledger


@dataclass(frozen=True)
class LatentsPlan:
    """What a run of the stage is to do; a value that can be handed to other processes as JSON.

    Attributes:
        data_root: absolute path of the data root.
        dataset: slug.
        archives: IDs, in the order in which they are encoded.
        mds_settings: those that mds must have been made with (`core.settings.mds_settings`).
        encoders: what is computed and stored.
        encoder_tag: of the output's path, see `core.encoder_tag`.
        batch_size: rows that go through the models at once.
        num_workers: processes, for each encoding process, that decode and tokenize; 0 for none.
        device: `auto` (a GPU for each process where there are some), or as torch spells it.
    """

    data_root: str
    dataset: str
    archives: tuple[str, ...]
    mds_settings: Mapping[str, Any]
    encoders: EncoderSettings
    encoder_tag: str
    batch_size: int = 32
    num_workers: int = 4
    device: str = "auto"

    def to_json(self) -> str:
        """The plan as text; reading it back gives an equal plan."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> LatentsPlan:
        """The plan that `to_json` wrote."""
        body = json.loads(text)
        encoders = body.pop("encoders")
        encoders["image_resolutions"] = tuple(encoders["image_resolutions"])
        return cls(**{**body, "archives": tuple(body["archives"]), "encoders": EncoderSettings(**encoders)})

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the rows of an archive."""
        return latents_settings(self.mds_settings, self.encoders)

    @property
    def mds_dir(self) -> StageDir:
        """Where the stage reads."""
        return DataRoot(Path(self.data_root)).mds(self.dataset)

    @property
    def latents_dir(self) -> StageDir:
        """Where the stage publishes."""
        return DataRoot(Path(self.data_root)).latents(self.dataset, self.encoder_tag)

    def upstream(self, archive: str) -> Ledger:
        """The ledger of the archive's mds shards.

        Raises:
            ArchiveError: mds is not published, does not balance, or was made with other image settings.
        """
        return upstream_ledger(self.mds_dir, archive, self.mds_settings)

    def current(self, archive: str) -> Ledger | None:
        """The archive's latents ledger if there is nothing to do, else None.

        Raises:
            ArchiveError: see `upstream`.
        """
        return current(self.latents_dir, archive, self.settings, {"mds": self.upstream(archive).content_id})
