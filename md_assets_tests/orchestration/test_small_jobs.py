"""The jobs that start the small subsets from the UI."""

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableRepository

from md_assets.datasets import all_specs, spec_of
from md_assets.definitions import defs
from md_assets.orchestration.backfills import ui_path


def test_each_dataset_with_a_small_subset_has_its_job() -> None:
    jobs = {job.name for job in defs.get_repository_def().get_all_jobs()}
    assert {f"{spec.slug}_small" for spec in all_specs() if spec.small} == {j for j in jobs if j.endswith("_small")}


def test_the_job_launches_the_backfill_and_links_to_it() -> None:
    spec = spec_of("jdb")
    # From the code location, as a run's process does it: only then an op knows its repository.
    job = ReconstructableRepository.for_module("md_assets.definitions", "defs").get_reconstructable_job("jdb_small")
    with dg.DagsterInstance.ephemeral() as instance, dg.execute_job(job, instance) as result:
        assert result.success

        (backfill,) = instance.get_backfills()
        target = backfill.get_asset_backfill_data(defs.resolve_asset_graph()).target_subset
        for stage in ("raw", "mds", "latents"):
            archives = target.get_partitions_subset(dg.AssetKey(["jdb", stage])).get_partition_keys()
            assert set(archives) == set(spec.small)
        (output,) = [event for event in result.all_events if event.is_successful_output]
        metadata = output.step_output_data.metadata
        assert metadata["backfill"].value == ui_path(backfill.backfill_id)
        assert metadata["archives"].value == 4
        logged = [entry.user_message for entry in instance.all_logs(result.run_id)]
        assert f"backfill {backfill.backfill_id}: {ui_path(backfill.backfill_id)}" in logged
