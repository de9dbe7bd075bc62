"""The code location: every dataset's assets with the three resources.

Here: putting them together. Not here: any logic.
"""

import warnings

import dagster as dg

from md_assets.datasets import all_specs
from md_assets.orchestration.alerts import alert_failed_checks, alert_failed_runs
from md_assets.orchestration.audit import audit_sensor
from md_assets.orchestration.jobs import prune_job
from md_assets.orchestration.refresh import refresh_schedules
from md_assets.orchestration.report import report_asset, report_schedule
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.orchestration.retry import retry_job, retry_sensor
from md_assets.orchestration.small_jobs import small_job

# Partitioned checks are marked preview, observable sources and backfill policies beta; their versions are pinned.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from md_assets.orchestration.assets import dataset_assets  # noqa: E402 (its decorators warn)
from md_assets.orchestration.automation import automation_sensor  # noqa: E402 (likewise)

defs = dg.Definitions(
    assets=[*(asset for spec in all_specs() for asset in dataset_assets(spec)), report_asset(all_specs())],
    jobs=[prune_job, retry_job, *(small_job(spec) for spec in all_specs() if spec.small)],
    schedules=[*refresh_schedules(all_specs()), report_schedule()],
    sensors=[automation_sensor, audit_sensor, retry_sensor, alert_failed_runs, alert_failed_checks],
    # Steps of a run take turns anyway; a process for each would only cost its start.
    executor=dg.in_process_executor,
    resources={"hub": HubResource(), "images": ImagesResource(), "encoders": EncodersResource()},
)
