"""Jobs that are no materialization: what people start by hand in the UI.

Here: pruning. Not here: which archives are pruned (`stages.prune`); backfills (`orchestration.backfills`).
No `from __future__ import annotations`: Dagster reads the annotations of ops.
"""

import dagster as dg
from pydantic import Field

from md_assets.core.errors import MdAssetsError
from md_assets.core.paths import DataRoot
from md_assets.core.progress import ProgressLines
from md_assets.datasets import all_specs, spec_of
from md_assets.orchestration.metadata import pruned_table
from md_assets.orchestration.resources import EncodersResource


class PruneConfig(dg.Config):
    """What is pruned."""

    datasets: list[str] = Field(default=[], description="Slugs, e.g. cc12m. Default: all that have data.")
    dry_run: bool = Field(default=True, description="Tell what would be removed, and change nothing.")
    encoders: str = Field(
        default="",
        description="The pair of encoders whose latents must be verified, as in mds_latents_<pair>. Default: that of "
        "the resource `encoders`.",
    )


@dg.op(
    name="prune_verified",
    description="Reads and verifies latents, marks the ledgers of raw and mds, removes their data.",
)
def prune_verified(context: dg.OpExecutionContext, config: PruneConfig, encoders: EncodersResource) -> None:
    """Prune the datasets, one after the other."""
    from md_assets.stages.prune import prune_dataset

    root = DataRoot.from_environment()
    try:
        specs = [spec_of(slug) for slug in dict.fromkeys(config.datasets)] or all_specs()
    except MdAssetsError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    reports = []
    for spec in specs:
        if (root.path / spec.slug).is_dir():
            progress = ProgressLines(spec.slug, context.log.info)
            tag = config.encoders or encoders.tag()
            reports.append(prune_dataset(spec, root, tag, dry_run=config.dry_run, report=progress))
            context.add_output_metadata({report.dataset: pruned_table(report) for report in reports})
    if failed := [report.dataset for report in reports if report.failed]:
        raise dg.Failure(
            f"Some archives of {', '.join(failed)} were not pruned, because something is wrong with them",
            metadata={report.dataset: pruned_table(report) for report in reports},
            allow_retries=False,
        )


@dg.job(
    name="prune",
    description="Remove raw and mds of all archives whose latents are verified, everything but the latents. A dry run "
    "unless dry_run is switched off.",
)
def prune_job() -> None:
    """The job `prune`."""
    prune_verified()
