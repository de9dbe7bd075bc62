"""`<ds>_small`: one click in the UI that starts a dataset's ~1 % subset through all stages.

A job of its own, and not one over the assets: Dagster offers every partition of a partitioned job, and no named part.

Here: the job. Not here: what a backfill is about (`orchestration.backfills`).
No `from __future__ import annotations`: Dagster reads the annotations of ops.
"""

import dagster as dg

from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.backfills import DATASET_TAG, SMALL, plan_backfill, ui_path


def small_job(spec: DatasetSpec) -> dg.JobDefinition:
    """The job that launches the backfill over a dataset's small subset."""
    description = (
        f"Launches a backfill over the small subset of {spec.title}: {len(spec.small):,} of {len(spec.archives):,} "
        f"archives ({spec.small[0]} to {spec.small[-1]}) through raw, mds and latents, and the merged indexes. "
        "Archives that are published already are passed over."
    )

    @dg.op(name=f"{spec.slug}_launch_small_backfill", description=description)
    def launch_small_backfill(context: dg.OpExecutionContext) -> None:
        asset_graph = context.repository_def.asset_graph
        plan = plan_backfill(context.instance, asset_graph, spec, spec.small, what=SMALL)
        backfill_id = plan.launch(context.instance, asset_graph)
        for line in plan.lines():
            context.log.info(line)
        context.log.info(f"backfill {backfill_id}: {ui_path(backfill_id)}")
        context.add_output_metadata(
            {
                "backfill": dg.MetadataValue.url(ui_path(backfill_id)),
                "backfill_id": backfill_id,
                "archives": plan.archives,
                "runs": plan.runs,
            }
        )

    @dg.job(name=f"{spec.slug}_small", description=description, tags={DATASET_TAG: spec.slug})
    def small():
        launch_small_backfill()

    return small
