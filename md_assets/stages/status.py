"""status: what is published, told from the ledgers on disk.

Here: reading. Not here: showing it (`terminal`), nor judging whether an archive is stale, which takes settings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.spec import DatasetSpec
from md_assets.stages.once import published

LATENTS_PREFIX = "mds_latents_"


@dataclass(frozen=True)
class StageTotals:
    """Sums over the published archives of one stage of one dataset.

    Attributes:
        stage: the stage's directory below the dataset's, e.g. `mds_latents_sdxl1_dfnclipH14`.
        archives: published ones.
        read, kept: samples.
        rejected: samples by reason.
        bytes_out: published bytes.
        seconds: of work.
    """

    stage: str
    archives: int = 0
    read: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    bytes_out: int = 0
    seconds: float = 0.0


def stage_dirs(root: DataRoot, dataset: str) -> list[StageDir]:
    """The stages of a dataset, in order; latents once for each encoder pair that has a directory."""
    folder = root.path / dataset
    tags = sorted(p.name.removeprefix(LATENTS_PREFIX) for p in folder.glob(f"{LATENTS_PREFIX}*") if p.is_dir())
    return [root.raw(dataset), root.mds(dataset), *(root.latents(dataset, tag) for tag in tags)]


def published_ledgers(spec: DatasetSpec, stage_dir: StageDir) -> Iterator[Ledger]:
    """The ledgers of a stage's published archives, in upstream's order."""
    for archive in spec.archives:
        ledger = published(stage_dir, archive)
        if ledger is not None:
            yield ledger


def totals(spec: DatasetSpec, stage_dir: StageDir) -> StageTotals:
    """Sums over a stage's published archives."""
    ledgers = list(published_ledgers(spec, stage_dir))
    rejected: Counter[str] = Counter()
    for ledger in ledgers:
        rejected.update({reason: len(keys) for reason, keys in ledger.rejected.items()})
    return StageTotals(
        stage=stage_dir.path.name,
        archives=len(ledgers),
        read=sum(ledger.read for ledger in ledgers),
        kept=sum(ledger.kept for ledger in ledgers),
        rejected=rejected,
        bytes_out=sum(ledger.bytes_out for ledger in ledgers),
        seconds=sum(ledger.seconds for ledger in ledgers),
    )
