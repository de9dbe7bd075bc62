"""The prune job: a dry run unless told otherwise, on the datasets that are named or there."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from md_assets.core.paths import DataRoot
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration.jobs import prune_job
from md_assets.orchestration.resources import EncodersResource
from md_assets_tests.stages.made_chain import JDB_ARCHIVES, TAG, publish_jdb


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DataRoot]:
    """Three archives of jdb in all stages."""
    monkeypatch.setenv("MD_ASSETS_DATA", str(tmp_path / "data"))
    publish_jdb(DataRoot(tmp_path / "data"))
    return DataRoot(tmp_path / "data")


def run(**config: object) -> dg.ExecuteInProcessResult:
    return prune_job.execute_in_process(
        run_config={"ops": {"prune_verified": {"config": config}}},
        resources={"encoders": EncodersResource(vae="org/coder", text_encoder=f"openclip:hf-hub:org/{TAG}")},
        raise_on_error=False,
    )


def table(result: dg.ExecuteInProcessResult) -> str:
    (output,) = (event for event in result.all_events if event.event_type is dg.DagsterEventType.STEP_OUTPUT)
    return output.step_output_data.metadata["jdb"].value


def tars(root: DataRoot) -> list[bool]:
    return [root.raw("jdb").data(archive).exists() for archive in JDB_ARCHIVES]


def test_it_only_tells_unless_told_otherwise(root: DataRoot) -> None:
    result = run(encoders=TAG)
    assert result.success and tars(root) == [True] * 3
    assert "bytes would be removed; nothing was" in table(result)
    assert "| raw | 3 |" in table(result) and "| mds | 3 |" in table(result)


def test_it_prunes_what_it_is_told_to(root: DataRoot) -> None:
    result = run(encoders=TAG, datasets=["jdb"], dry_run=False)
    assert result.success and tars(root) == [False] * 3
    assert "bytes were removed" in table(result)


def test_latents_are_those_of_the_encoders_resource(root: DataRoot) -> None:
    result = run(dry_run=False)
    assert result.success and tars(root) == [True] * 3
    assert "- Not pruned: its latents are not published (mds_latents_coder_tiny): 3 archives" in table(result)


def test_damaged_latents_fail_the_run_after_the_others_were_pruned(root: DataRoot) -> None:
    shard = root.latents("jdb", TAG).data("train/000") / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run(encoders=TAG, dry_run=False)
    assert not result.success and tars(root) == [True, False, False]
    assert failure_of(result) == "Some archives of jdb were not pruned, because something is wrong with them"


def test_a_dataset_that_there_is_not_is_named(root: DataRoot) -> None:
    result = run(encoders=TAG, datasets=["jbd"])
    assert not result.success and failure_of(result).startswith("there is no dataset 'jbd'. Choose one of")
