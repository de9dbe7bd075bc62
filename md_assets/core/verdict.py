"""The checks of each stage and what a check finds.

Here: names and results. Not here: the checks themselves, see `stages.verify`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from md_assets.core.paths import Stage

CHECKS_OF_STAGE: Mapping[Stage, Mapping[str, str]] = {
    "raw": {
        "counts_balance": "Every sample of the upstream archive was kept or rejected with a reason; some were kept.",
        "tar_intact": "The published tar has the size and hash of its ledger.",
    },
    "mds": {
        "counts_balance": "Every sample that raw kept was kept here or rejected with a reason; some were kept.",
        "shards_intact": "Every shard is there with the size, rows and hash of its index.",
    },
    "latents": {
        "counts_balance": "Every sample that mds kept was read here and has latents; there are some.",
        "shards_intact": "Every shard is there with the size, rows and hash of its index.",
        "latents_valid": "As many rows as promised; a sample of them has the promised shapes and finite values; "
        "computed again, the states of a few captions are the same. PSNR of a few decoded latents is reported.",
    },
}
"""Stage -> check -> what it says, in the order in which they run."""

AUDITED = "audited"
"""The check that is no stage's own, see `stages.audit`."""

AUDITED_ARCHIVE = (
    "What is on disk, read again by the sensor `audit` after the run: ledgers of all stages agree, the index is the "
    "ledger's, files have their sizes and hashes, every 100th row can be decoded."
)
AUDITED_INDEX = (
    "The merged index lists every archive that was published when it was merged, with the shards of its ledger; read "
    "again by the sensor `audit`."
)

STAGE_FACT, BEGIN_FACT, DIRECTORY_FACT = "stage_at_fault", "begin_at", "directory"
"""What a failed audit tells programs: the asset in which the fault lies, without its dataset; the one from which on the
archive is to be made again; and the directory of the stage in which the fault lies."""

_SUBSET_COUNTS = "Every sample of the whole was read and kept, or rejected as not in the subset; there may be none."


def checks_of(stage: Stage, subset: str = "") -> Mapping[str, str]:
    """The checks of a stage, or of the same stage of a subset: check -> what it says, in order."""
    checks = CHECKS_OF_STAGE[stage]
    return {**checks, "counts_balance": _SUBSET_COUNTS} if subset else checks


@dataclass(frozen=True)
class Verdict:
    """The result of one check on one archive.

    Attributes:
        check: its name.
        passed: whether it holds.
        what: one sentence: what was found.
        facts: numbers worth showing.
    """

    check: str
    passed: bool
    what: str
    facts: Mapping[str, Any] = field(default_factory=dict)
