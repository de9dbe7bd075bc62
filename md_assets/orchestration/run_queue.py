"""The run queue's knowledge of datasets: each run is tagged with its dataset, and datasets may be taken in order.

Dagster limits runs by their tags, and runs of a backfill from the UI or of automation have none of their dataset. So
`dagster.yaml` names this coordinator.

Here: tags of queued runs, and that who queues them keeps its connection. Not here: limits, which are in
`deploy/dagster.yaml`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.run_coordinator.queued_run_coordinator import QueuedRunCoordinator
from dagster._core.storage.tags import PRIORITY_TAG
from dagster._serdes import ConfigurableClassData

from md_assets.orchestration.backfills import DATASET_TAG
from md_assets.orchestration.records import keep_connection


class DatasetRunCoordinator(QueuedRunCoordinator):
    """Dagster's queue, whose runs carry the tag `md_assets/dataset`.

    Args:
        dataset_order: slugs of datasets; waiting runs of an earlier one go before those of a later one, and these
            before those of datasets that are not named. What an earlier one leaves free, a later one takes.
        queue: see `QueuedRunCoordinator`.
    """

    def __init__(self, dataset_order: Sequence[str] = (), **queue: Any) -> None:
        super().__init__(**queue)
        self._priorities = {slug: len(dataset_order) - number for number, slug in enumerate(dataset_order)}

    @classmethod
    def config_type(cls) -> Any:
        order = dg.Field(dg.Array(str), is_required=False, description="Datasets in the order in which they are taken.")
        queue: Any = super().config_type()  # a mapping, whatever else its type allows
        return {**queue, "dataset_order": order}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]
    ) -> "DatasetRunCoordinator":
        return cls(inst_data=inst_data, **config_value)

    def register_instance(self, instance: dg.DagsterInstance) -> None:
        """Once in each process that queues runs: to create one stores an event for each of its archives."""
        super().register_instance(instance)
        keep_connection(instance)

    def submit_run(self, context: SubmitRunContext) -> dg.DagsterRun:
        """Tag the run, then queue it."""
        run = context.dagster_run
        datasets = {key.path[0] for key in run.asset_selection or ()} or {run.tags.get(DATASET_TAG, "")}
        if len(datasets) == 1:
            (dataset,) = datasets
            tags = {DATASET_TAG: dataset} if dataset else {}
            if dataset in self._priorities:
                tags[PRIORITY_TAG] = str(self._priorities[dataset])
            if new := {name: value for name, value in tags.items() if name not in run.tags}:
                self._instance.add_run_tags(run.run_id, new)
        return super().submit_run(context)
