"""Partitions are archives."""

import dagster as dg

from md_assets.datasets.jdb import SPEC
from md_assets.orchestration.partitions import archive_partitions, archives_of


def test_one_partition_for_each_archive_in_upstreams_order() -> None:
    assert archive_partitions(SPEC).get_partition_keys() == list(SPEC.archives)


def test_a_range_covers_its_archives_in_upstreams_order() -> None:
    seen: list[list[str]] = []

    @dg.asset(partitions_def=archive_partitions(SPEC), backfill_policy=dg.BackfillPolicy.multi_run(8))
    def covered(context: dg.AssetExecutionContext) -> None:
        seen.append(archives_of(context, SPEC))

    first, last = "train/198", "valid/001"
    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
    assert dg.materialize([covered], tags=tags).success
    assert seen == [["train/198", "train/199", "valid/000", "valid/001"]]
