"""Following a backfill: what is said of it, and when waiting ends. The daemon itself is in `end_to_end`."""

from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.definitions.events import AssetKeyPartitionKey
from dagster._core.execution.asset_backfill import AssetBackfillData
from dagster._core.execution.backfill import BulkActionStatus

from md_assets.core.errors import MdAssetsError
from md_assets.datasets.jdb import SPEC
from md_assets.definitions import defs
from md_assets.orchestration.backfill_progress import AssetProgress, follow
from md_assets.orchestration.backfills import plan_backfill

GRAPH = defs.resolve_asset_graph()
RAW, MDS, INDEX = (dg.AssetKey(["jdb", name]) for name in ("raw", "mds", "mds_index"))
ARCHIVES = ("train/000", "train/001", "train/002")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def launch(instance: dg.DagsterInstance) -> str:
    return plan_backfill(instance, GRAPH, SPEC, ARCHIVES, ("raw", "mds")).launch(instance, GRAPH)


def subset(**archives: tuple[str, ...]) -> AssetGraphSubset:
    """`raw=("train/000",)` is that archive of jdb/raw; an empty tuple an asset without partitions."""
    return AssetGraphSubset.from_asset_partition_set(
        {
            AssetKeyPartitionKey(dg.AssetKey(["jdb", name]), archive)
            for name, ids in archives.items()
            for archive in ids or (None,)
        },
        GRAPH,
    )


def moved(instance: dg.DagsterInstance, backfill_id: str, status: BulkActionStatus) -> AssetBackfillData:
    """As the daemon would leave it: train/000 failed in raw, the others are in raw, and train/001 in mds too."""
    backfill = instance.get_backfill(backfill_id)
    assert backfill is not None
    data = backfill.get_asset_backfill_data(GRAPH)._replace(
        requested_subset=subset(raw=ARCHIVES, mds=ARCHIVES[1:], annotations=()),
        materialized_subset=subset(raw=ARCHIVES[1:], mds=ARCHIVES[1:2], annotations=()),
        failed_and_downstream_subset=subset(raw=ARCHIVES[:1], mds=ARCHIVES[:1], mds_index=()),
    )
    instance.update_backfill(backfill.with_status(status)._replace(asset_backfill_data=data))
    return data


def test_progress_tells_what_failed_from_what_is_behind_it(instance: dg.DagsterInstance) -> None:
    data = moved(instance, launch(instance), BulkActionStatus.REQUESTED)
    assert {key.path[1]: str(AssetProgress.of(data, key)) for key in data.target_subset.asset_keys} == {
        "annotations": "done",
        "raw": "2 done, 1 failed, 0 in progress, of 3",
        "mds": "1 done, 0 failed, 1 in progress, 1 behind a failure, of 3",
        "mds_index": "not made",
    }


def test_what_is_done_in_a_second_attempt_is_not_failed(instance: dg.DagsterInstance) -> None:
    data = moved(instance, launch(instance), BulkActionStatus.REQUESTED)
    assert AssetProgress.of(data._replace(materialized_subset=subset(raw=ARCHIVES)), RAW).failed == frozenset()


def test_a_backfill_that_has_ended_is_told_once(instance: dg.DagsterInstance) -> None:
    backfill_id = launch(instance)
    moved(instance, backfill_id, BulkActionStatus.COMPLETED_FAILED)
    lines: list[str] = []

    result = follow(instance, GRAPH, SPEC, backfill_id, lines.append)

    assert lines == [
        "jdb/annotations: done",
        "jdb/raw: 2 done, 1 failed, 0 in progress, of 3",
        "jdb/mds: 1 done, 0 failed, 1 in progress, 1 behind a failure, of 3",
        "jdb/mds_index: not made",
    ]
    assert not result.success and result.status == "COMPLETED_FAILED"
    assert [(failed.asset, failed.archive) for failed in result.failed] == [(RAW, "train/000")]
    assert result.unmade == (INDEX,)


def test_a_backfill_that_was_canceled_is_no_success(instance: dg.DagsterInstance) -> None:
    backfill_id = launch(instance)
    backfill = instance.get_backfill(backfill_id)
    assert backfill is not None
    instance.update_backfill(backfill.with_status(BulkActionStatus.CANCELED))

    result = follow(instance, GRAPH, SPEC, backfill_id, print)

    assert (result.success, result.status, result.failed) == (False, "CANCELED", ())


def test_waiting_without_a_daemon_ends(instance: dg.DagsterInstance) -> None:
    backfill_id = launch(instance)
    with pytest.raises(MdAssetsError, match=rf"{backfill_id} waits, and no daemon runs .* Start `dagster dev`"):
        follow(instance, GRAPH, SPEC, backfill_id, print, poll_s=0.01, no_daemon_s=0.02)


def test_a_backfill_of_another_instance_is_said(instance: dg.DagsterInstance) -> None:
    with pytest.raises(MdAssetsError, match="this instance has no backfill abcdefgh"):
        follow(instance, GRAPH, SPEC, "abcdefgh", print)
