"""The asset checks of each stage, stored for each archive.

Here: their declarations and events. Not here: what they look at, see `stages.verify`.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from md_assets.core.paths import Stage, StageDir
from md_assets.core.verdict import CHECKS_OF_STAGE


def check_specs(
    key: dg.AssetKey, stage: Stage, partitions_def: dg.PartitionsDefinition[str]
) -> list[dg.AssetCheckSpec]:
    """The checks of a stage, stored by partition."""
    return [
        dg.AssetCheckSpec(name, asset=key, description=description, partitions_def=partitions_def)
        for name, description in CHECKS_OF_STAGE[stage].items()
    ]


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
