"""The audit's ticks: what is due, where the next one goes on, and results that people and `--failed` find."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluation
from dagster._core.events import DagsterEvent, DagsterEventType, StepMaterializationData
from dagster._core.utils import make_new_run_id

from md_assets.core.paths import DATA_ROOT_VARIABLE, DataRoot, StageDir
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.core.verdict import AUDITED
from md_assets.datasets import all_specs
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.definitions import defs
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration.archive_run import DATA_VERSION_TAG
from md_assets.orchestration.audit import Audit, Cursor, audit_sensor, audited_assets
from md_assets.orchestration.backfills import plan_failed
from md_assets.orchestration.failures import all_failed
from md_assets.orchestration.metadata import archive_metadata
from md_assets.stages.index import merge_indexes
from md_assets.storage.publish import workspace
from md_assets_tests.orchestration.conftest import Platform
from md_assets_tests.orchestration.test_failures import started_run
from md_assets_tests.stages.made_chain import TAG, ledger_of
from md_assets_tests.stages.sound_archives import mds_row, publish

MDS, LATENTS, MDS_INDEX = (dg.AssetKey(["jdb", name]) for name in ("mds", "latents", "mds_index"))
ARCHIVES = ("train/000", "train/001", "valid/000")


@dataclass
class World:
    """A data root, and what an instance knows of it."""

    root: DataRoot
    instance: dg.DagsterInstance
    cursor: Cursor = field(default_factory=Cursor)

    def dir(self, asset: dg.AssetKey) -> StageDir:
        return self.root.mds("jdb") if asset == MDS else self.root.latents("jdb", TAG)

    def record(self, asset: dg.AssetKey, *archives: str, run_id: str | None = None) -> str:
        """Archives as a run records them."""
        run_id = make_new_run_id() if run_id is None else run_id
        for archive in archives:
            ledger = ledger_of(self.dir(asset), archive)
            metadata = archive_metadata(self.dir(asset), ledger, passed_over=False)
            tags = {DATA_VERSION_TAG: ledger.content_id[:32]}
            self.report(dg.AssetMaterialization(asset, partition=archive, metadata=metadata, tags=tags), run_id)
        return run_id

    def report(self, materialization: dg.AssetMaterialization, run_id: str) -> None:
        event = DagsterEvent(
            event_type_value=DagsterEventType.ASSET_MATERIALIZATION.value,
            event_specific_data=StepMaterializationData(materialization),
            job_name="job",
        )
        self.instance.report_dagster_event(event, run_id)

    def tick(self, settle_s: float = 0, **limits: float) -> Audit:
        """A tick that goes on where the one before ended, with the cursor as Dagster keeps it."""
        audit = Audit(self.instance, [JDB], self.root, self.cursor, settle_s=settle_s, **limits)
        audit.run()
        self.cursor = Cursor.parse(str(audit.cursor))
        return audit

    def checks(self, asset: dg.AssetKey = MDS) -> dict[str | None, AssetCheckEvaluation]:
        """The latest result of each archive."""
        history = self.instance.event_log_storage.get_asset_check_execution_history
        found: dict[str | None, AssetCheckEvaluation] = {}
        for record in reversed(history(dg.AssetCheckKey(asset, AUDITED), limit=100)):
            assert record.event is not None and record.event.dagster_event is not None
            found[record.partition] = record.event.dagster_event.asset_check_evaluation_data
        return found

    def passed(self, asset: dg.AssetKey = MDS) -> dict[str | None, bool]:
        return {archive: check.passed for archive, check in self.checks(asset).items()}

    def said(self, archive: str, asset: dg.AssetKey = MDS) -> str:
        return self.checks(asset)[archive].description or ""

    def shard(self, archive: str) -> Path:
        (path,) = self.dir(MDS).data(archive).glob("*.mds")
        return path

    def cut(self, archive: str) -> None:
        """Cut an archive's shard by one byte."""
        self.shard(archive).write_bytes(self.shard(archive).read_bytes()[:-1])

    def flip(self, archive: str) -> None:
        """Change a bit of a caption, which no decoder minds."""
        content = self.shard(archive).read_bytes()
        assert content.count(b"picture ") == 2
        self.shard(archive).write_bytes(content.replace(b"picture ", b"pictuse ", 1))

    def publish(self, archive: str, rows: int = 2, images: ImageSettings | None = None) -> None:
        publish(self.root, archive, [mds_row(archive, number) for number in range(rows)], images=images)

    def merge(self, *archives: str) -> None:
        merge_indexes(self.dir(MDS), "train", archives, mds_settings(JDB, ImageSettings()))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(DataRoot(tmp_path), instance)
        for archive in ARCHIVES:
            world.publish(archive)
        yield world


def test_what_was_published_is_audited_once(world: World) -> None:
    world.record(MDS, *ARCHIVES)
    world.record(LATENTS, "train/000")

    audit = world.tick()

    assert world.passed() == dict.fromkeys(ARCHIVES, True) and world.passed(LATENTS) == {"train/000": True}
    assert world.said("train/000") == "4 read, kept 2 → 2; 2 rows decoded; the hashes of 2 files agree"
    assert audit.summary() == "4 results stored, 0 of them failed; bytes of 4 archives hashed"
    assert world.tick().summary() == "0 results stored, 0 of them failed; bytes of 0 archives hashed"
    world.record(MDS, "train/000")
    assert world.tick().summary().startswith("1 results stored")


def test_a_tick_leaves_to_the_next_what_is_too_much(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.record(LATENTS, "train/000")
    world.record(MDS, *ARCHIVES)
    monkeypatch.setattr("md_assets.orchestration.audit.TICK_EVENTS", 3)
    world.tick()
    assert (len(world.checks(LATENTS)), list(world.checks())) == (1, ["train/000", "train/001"])
    world.tick()
    assert list(world.checks()) == list(ARCHIVES)


def test_a_tick_without_time_keeps_its_place(world: World) -> None:
    world.record(MDS, *ARCHIVES)
    assert world.tick(tick_s=0, hash_s=0).summary().startswith("0 results stored")
    assert world.cursor == Cursor()
    world.tick()
    assert len(world.checks()) == 3


def test_what_is_just_being_stored_waits(world: World) -> None:
    """With what comes after it, or the cursor would go beyond it."""
    world.record(MDS, "train/000")
    world.tick(settle_s=60)
    assert world.checks() == {} and world.cursor == Cursor()


def test_a_damaged_archive_counts_as_failed_until_it_is_sound_again(world: World) -> None:
    world.record(MDS, *ARCHIVES)
    world.cut("train/001")

    audit = world.tick()

    assert world.passed() == {"train/000": True, "train/001": False, "valid/000": True}
    (line,) = audit.faults
    assert line.startswith("jdb/mds train/001: ") and "its ledger says" in line
    (failed,) = all_failed(world.instance, JDB)
    assert (failed.asset, failed.archive, failed.reason, failed.transient) == (MDS, "train/001", AUDITED, True)
    assert failed.why.startswith("jdb train/001: audited: ") and "its ledger says" in failed.why
    assert world.checks()["train/001"].metadata["remedy"].value == "md-assets backfill jdb --failed"

    world.publish("train/001")
    world.record(MDS, "train/001")
    world.tick()
    assert all_failed(world.instance, JDB) == []


def test_bytes_that_there_was_no_time_for_are_hashed_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md_assets.orchestration.audit.HASH_AT_ONCE_S", 0.0)
    world.record(MDS, *ARCHIVES)
    world.flip("train/001")
    audit = world.tick(hash_s=0)
    assert world.passed() == dict.fromkeys(ARCHIVES, True)
    assert world.said("train/001").endswith("; its bytes will be hashed")
    assert audit.summary().endswith("; bytes of others will be hashed by later ticks")
    assert (world.cursor.hashed, world.cursor.files) == (0, 0)

    world.tick()
    assert world.passed() == {"train/000": True, "train/001": False, "valid/000": True}
    assert world.said("train/001").endswith("does not hash to what its ledger says")
    assert world.said("valid/000").endswith("the hashes of 2 files agree")
    assert world.cursor.hashed == world.cursor.audited


def test_hashing_stops_between_two_files(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("md_assets.orchestration.audit.HASH_AT_ONCE_S", 0.0)
    world.record(MDS, "train/000")
    asked = iter([True, True, False])  # before looking for what waits, before the first file, before the second
    monkeypatch.setattr(Audit, "_time_left", lambda self, until_s: until_s > 0 and (until_s != 7 or next(asked)))
    world.tick(hash_s=7)
    assert world.cursor == Cursor(audited=world.cursor.audited, hashed=0, files=1) and world.cursor.audited > 0
    monkeypatch.undo()
    world.tick()
    assert world.said("train/000").endswith("the hashes of 2 files agree")


def test_what_was_made_again_has_its_turn_later(world: World) -> None:
    """Its first record fits no longer to what is on disk, and that is no fault."""
    world.record(MDS, "train/000")
    world.publish("train/000", rows=3)
    world.record(MDS, "train/000")
    assert world.tick().summary().endswith("1 passed over, made again since")
    assert world.passed() == {"train/000": True} and "kept 3 → 3" in world.said("train/000")


def test_what_is_being_made_again_is_passed_over(world: World) -> None:
    world.record(MDS, "train/000")
    with workspace(world.dir(MDS).ledger("train/000")):
        world.dir(MDS).ledger("train/000").unlink()
        world.tick()
    assert world.checks() == {}


def test_what_another_instance_made_again_is_a_fault_here(world: World) -> None:
    world.record(MDS, "train/000")
    world.publish("train/000", images=ImageSettings(jpeg_quality=90))
    world.tick()
    assert world.said("train/000").startswith("it was made with other settings than its run recorded")


def test_a_merged_index_is_audited_when_it_was_merged(world: World) -> None:
    time.sleep(0.02)  # ledgers are older than the merge
    world.merge("train/000")
    run_id = make_new_run_id()
    path = dg.MetadataValue.path(str(world.dir(MDS).index("train")))
    world.report(dg.AssetMaterialization(MDS_INDEX, metadata={"train_index": path}), run_id)

    world.tick()

    assert world.passed(MDS_INDEX) == {None: False}
    (check,) = world.checks(MDS_INDEX).values()
    assert "train/index.json leaves out 1 archives that were published: train/001" in (check.description or "")

    world.merge("train/000", "train/001")
    world.report(dg.AssetMaterialization(MDS_INDEX, metadata={"train_index": path}), make_new_run_id())
    world.tick()
    assert world.passed(MDS_INDEX) == {None: True}


def test_results_stand_with_the_run_that_published(world: World) -> None:
    run_id = world.record(MDS, "train/000")
    world.tick()
    (stored,) = world.instance.all_logs(run_id, of_type=DagsterEventType.ASSET_CHECK_EVALUATION)
    assert stored.get_dagster_event().asset_check_evaluation_data.check_name == AUDITED
    target = world.checks()["train/000"].target_materialization_data
    assert target is not None and target.run_id == run_id and target.storage_id == world.cursor.audited


def test_an_archive_has_one_result_however_often_it_is_audited(world: World) -> None:
    """In the row that its run has planned for it, which is what the UI shows."""
    key, found = dg.AssetCheckKey(MDS, AUDITED), []
    run = started_run(world.instance, MDS, "train/000")
    world.record(MDS, "train/000", run_id=run.run_id)
    whole = world.shard("train/000").read_bytes()
    storage = world.instance.event_log_storage
    for content in (None, whole, whole[:-1], whole):
        if content is not None:
            world.shard("train/000").write_bytes(content)
            world.cursor = Cursor()
            world.tick()
        (info,) = storage.get_asset_check_partition_info([key])
        found.append(info.latest_execution_status.value)
        assert len(storage.get_asset_check_execution_history(key, limit=9)) == 1
    assert found == ["PLANNED", "SUCCEEDED", "FAILED", "SUCCEEDED"]


def test_what_was_reported_by_hand_is_audited_as_often_as_it_is_reported(world: World) -> None:
    """Dagster itself can store one result without a run for each partition, not two."""
    for _ in range(2):
        world.record(MDS, "train/000", run_id="")
        world.tick()
    assert world.passed() == {"train/000": True}
    world.instance.report_runless_asset_event(dg.AssetMaterialization(MDS, partition="train/000"))
    world.tick()
    assert world.said("train/000").endswith("but none at all")


def test_the_sensor_is_off_until_somebody_turns_it_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_ROOT_VARIABLE, str(world.root.path))
    monkeypatch.setattr("md_assets.orchestration.audit.SETTLE_S", 0)
    assert audit_sensor.default_status is dg.DefaultSensorStatus.STOPPED
    result = audit_sensor.evaluate_tick(dg.build_sensor_context(instance=world.instance, definitions=defs))
    assert not result.run_requests and (result.skip_message or "").startswith("0 results stored")
    assert Cursor.parse(result.cursor) == Cursor()


def test_every_audited_asset_declares_the_check() -> None:
    declared = {key.asset_key for key in defs.resolve_asset_graph().asset_check_keys if key.name == AUDITED}
    assert declared == set(audited_assets(all_specs())) and len(declared) == 6 * 4 + 4


def test_what_real_runs_publish_is_sound(platform: Platform) -> None:
    platform.up_to("mds", "train/000", "train/001")
    result = platform.run("jdb/mds_index")
    assert result.success, failure_of(result)

    audit = Audit(platform.instance, [JDB], platform.sandbox.data, Cursor(), settle_s=0)
    audit.run()

    assert audit.faults == []
    assert audit.summary() == "3 results stored, 0 of them failed; bytes of 2 archives hashed"
    world = World(platform.sandbox.data, platform.instance)
    assert world.passed() == {"train/000": True, "train/001": True} and world.passed(MDS_INDEX) == {None: True}
    assert world.said("train/000") == "12 read, kept 7 → 6; 2 rows decoded; the hashes of 2 files agree"
    history = platform.instance.event_log_storage.get_asset_check_execution_history
    for asset in (MDS, MDS_INDEX):  # in the rows that the runs planned, not beside them
        records = history(dg.AssetCheckKey(asset, AUDITED), limit=10)
        assert [record.status.value for record in records] == ["SUCCEEDED"] * (2 if asset == MDS else 1)


def test_what_the_audit_finds_is_made_again_where_the_fault_lies_and_passes(platform: Platform) -> None:
    platform.up_to("mds", "train/000", "train/001")
    (shard,) = platform.dir("mds").data("train/000").glob("*.mds")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    raw_ledger = platform.dir("raw").ledger("train/001")
    raw_ledger.write_text(raw_ledger.read_text().replace('"kept": 7', '"kept": 8'))
    ledgers = {(s, a): platform.dir(s).ledger(a) for s in ("raw", "mds") for a in ("train/000", "train/001")}
    before = {which: path.stat().st_ino for which, path in ledgers.items()}
    audit = Audit(platform.instance, [JDB], platform.sandbox.data, Cursor(), settle_s=0)
    audit.run()
    world = World(platform.sandbox.data, platform.instance)
    assert world.passed() == {"train/000": False, "train/001": False}

    failed = all_failed(platform.instance, JDB)
    assert [(one.asset.path[-1], one.archive, one.transient) for one in failed] == [
        ("raw", "train/001", True),
        ("mds", "train/000", True),
    ]
    plan = plan_failed(platform.instance, defs.resolve_asset_graph(), JDB, failed, ("raw", "mds"))
    assert plan is not None
    assert [(one.asset.path[-1], one.archives) for one in plan.assets] == [
        ("raw", ("train/001",)),
        ("mds", ("train/000", "train/001")),
    ]
    for one in plan.assets:
        result = platform.run(one.asset.to_user_string(), *one.archives)
        assert result.success, failure_of(result)

    made_again = [which for which, path in ledgers.items() if path.stat().st_ino != before[which]]
    assert made_again == [("raw", "train/001"), ("mds", "train/000")]
    assert all_failed(platform.instance, JDB) == []
    audit = Audit(platform.instance, [JDB], platform.sandbox.data, audit.cursor, settle_s=0)
    audit.run()
    assert audit.faults == [] and world.passed() == {"train/000": True, "train/001": True}


def test_an_audit_does_not_import_torch(world: World) -> None:
    code = (
        "import sys; from pathlib import Path; from md_assets.core.paths import DataRoot;"
        "from md_assets.datasets.jdb import SPEC; from md_assets.stages.status import stages_of;"
        "from md_assets.stages.audit import audit_archive, chain_to;"
        "stages = stages_of(DataRoot(Path(sys.argv[1])), SPEC);"
        "print([audit_archive(chain_to(stages, step), 'train/000').passed for step, up in stages if up],"
        "'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(world.root.path)], capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True] False", done.stderr
