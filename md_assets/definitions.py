"""The code location: every dataset's assets with the three resources.

Here: putting them together. Not here: any logic.
"""

import warnings

import dagster as dg

from md_assets.datasets import all_specs
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource

# Partitioned checks are marked preview, observable sources and backfill policies beta; their versions are pinned.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from md_assets.orchestration.assets import dataset_assets  # noqa: E402 (its decorators warn)

defs = dg.Definitions(
    assets=[asset for spec in all_specs() for asset in dataset_assets(spec)],
    # Steps of a run take turns anyway; a process for each would only cost its start.
    executor=dg.in_process_executor,
    resources={"hub": HubResource(), "images": ImagesResource(), "encoders": EncodersResource()},
)
