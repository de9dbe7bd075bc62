"""The asset checks of each stage, stored for each archive.

Here: their declarations and events. Not here: what they look at, see `stages.verify`.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from md_assets.core.paths import Stage, StageDir
from md_assets.core.verdict import AUDITED, AUDITED_ARCHIVE, AUDITED_INDEX, checks_of
from md_assets.stages.status import INDEXED_STAGES


def check_specs(
    key: dg.AssetKey, stage: Stage, partitions_def: dg.PartitionsDefinition[str], subset: str = ""
) -> list[dg.AssetCheckSpec]:
    """The checks of a stage, stored by partition; `subset` is the name of the subset that the asset is of.

    `audited` is among them, which no run evaluates: a run plans it, and the sensor `audit` fills it in.
    """
    checks = {**checks_of(stage, subset), **({AUDITED: AUDITED_ARCHIVE} if stage in INDEXED_STAGES else {})}
    return [
        dg.AssetCheckSpec(name, asset=key, description=description, partitions_def=partitions_def)
        for name, description in checks.items()
    ]


def index_check_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """The checks of a merged index, which the sensor `audit` fills in too."""
    return [dg.AssetCheckSpec(AUDITED, asset=key, description=AUDITED_INDEX)]


def evaluate(
    key: dg.AssetKey, stage_dir: StageDir, upstream: StageDir | None, archive: str, *, read_all: bool
) -> Iterator[dg.AssetCheckEvaluation]:
    """Run the checks of a stage on one published archive.

    Args:
        key: the stage's asset.
        stage_dir: where the archive is published.
        upstream: the stage whose kept samples were read here; None for raw.
        archive: its ID, which is its partition.
        read_all: see `stages.verify.verify_archive`.
    """
    from md_assets.stages.verify import verify_archive  # imports numpy, which is not needed to load the definitions

    for verdict in verify_archive(stage_dir, upstream, archive, read_all=read_all):
        facts: dict[str, Any] = {"archive": archive, **verdict.facts}
        yield dg.AssetCheckEvaluation(
            asset_key=key,
            check_name=verdict.check,
            passed=verdict.passed,
            description=verdict.what,
            metadata=facts,
            partition=archive,
        )
