"""Reports without data on disk."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from md_assets.core.paths import DataRoot, StageDir
from md_assets.stages.report import EncodedArchive, LatentsGroup, StageCounts

NAMES = tuple(f"latents_{px} {kind} of channel {c}" for px in (32, 64) for kind in ("mean", "std") for c in range(4))
CAPTION = "caption_norm mean"
ROOT = DataRoot(Path("nowhere"))


def latents_dir(dataset: str = "jdb", tag: str = "tiny") -> StageDir:
    return ROOT.latents(dataset, tag)


def made_group(
    archives: int,
    dataset: str = "jdb",
    tag: str = "tiny",
    changes: Mapping[int, Mapping[str, float]] | None = None,
    fingerprint: str = "f" * 16,
) -> LatentsGroup:
    """Archives of 100 rows each, encoded in 10 s one after the other, with statistics that scatter by 0.01; `changes`
    are added to those of some, by their number."""
    random = np.random.default_rng(archives)
    made = []
    for number in range(archives):
        values = {name: at / 10 + 0.01 * random.standard_normal() for at, name in enumerate((*NAMES, CAPTION))}
        for name, change in ((changes or {}).get(number) or {}).items():
            values[name] += change
        made.append(EncodedArchive(f"train/{number:03}", 100, 10.0 * number, 10.0 * (number + 1), 100, values))
    return LatentsGroup(latents_dir(dataset, tag), fingerprint, tuple(made))


def made_counts(dataset: str = "jdb", encoded: int = 60) -> list[StageCounts]:
    """Of 100 samples raw rejects 10 and mds 5; 5 are not in mds yet, and `encoded` have latents."""
    raw = StageCounts(ROOT.raw(dataset), 400, 2, 100, 90, Counter(too_small=7, undecodable=3), 1000)
    mds = StageCounts(ROOT.mds(dataset), 400, 1, 85, 80, Counter(no_caption=5), 800)
    return [raw, mds, StageCounts(latents_dir(dataset), 400, 1, encoded, encoded, Counter(), 6000)]
