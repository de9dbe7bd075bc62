"""The latents stage: which rows are published, by whom, and what a failure costs."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from md_assets.core.errors import ArchiveError, MdAssetsError, SettingsError
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.encoders.bundle import Encoders
from md_assets.encoders.vae import VaeEncoder
from md_assets.stages import latents
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.stages.verify import latents_valid
from md_assets.storage.mds import iter_rows, row_count, verify_shards
from md_assets.storage.publish import read_ledger, workspace

COUNTS = {"train/000": 5, "train/001": 0, "train/002": 7}


@pytest.fixture
def plan(latents_plan) -> LatentsPlan:
    """Three archives of mds, ready to be encoded."""
    return latents_plan(COUNTS, batch_size=3)


def run(plan: LatentsPlan, archives: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Encode, and give each archive's final event."""
    events: list[dict[str, Any]] = []
    encode_archives(plan, events.append, archives)
    json.dumps(events)
    final = {e["archive"]: e for e in events if e["event"] in ("published", "passed_over", "failed")}
    assert len(final) == len([e for e in events if e["event"] not in ("progress", "waiting")])  # one for each
    return final


def kinds(events: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {archive: event["event"] for archive, event in sorted(events.items())}


def rows(plan: LatentsPlan, archive: str) -> list[dict[str, Any]]:
    return list(iter_rows(plan.latents_dir.data(archive)))


def assert_same_rows(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    """The same rows in the same order; arrays equal to 1e-4, a fifth of a float16 step."""
    assert [row["key"] for row in a] == [row["key"] for row in b]
    for one, other in zip(a, b, strict=True):
        assert list(one) == list(other)
        for column, value in one.items():
            if "latents" in column:
                x, y = (np.frombuffer(v, np.float16).astype(np.float32) for v in (value, other[column]))
                assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)
            else:
                assert value == other[column]


def unpublished(plan: LatentsPlan, archive: str) -> bool:
    """Whether neither data nor a ledger nor a workspace of the archive is there."""
    path = plan.latents_dir.data(archive)
    return not [p for p in path.parent.glob("*") if p.name.startswith((path.name, f".{path.name}"))]


def damage(plan: LatentsPlan, archive: str, offset: int, count: int = 1) -> None:
    """Overwrite bytes in the archive's first mds shard."""
    shard = plan.mds_dir.data(archive) / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[offset : offset + count] = b"\x00" * count
    shard.write_bytes(data)


def test_importing_the_stage_imports_no_torch() -> None:
    code = "import sys, md_assets.stages.latents; print([m for m in ('torch', 'streaming') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_archives_are_published_with_a_ledger_that_balances(plan: LatentsPlan) -> None:
    events = run(plan)
    assert kinds(events) == dict.fromkeys(COUNTS, "published")
    for archive, count in COUNTS.items():
        assert events[archive]["rows"] == count
        mds, ledger = plan.upstream(archive), read_ledger(plan.latents_dir.ledger(archive))
        assert ledger is not None
        assert (ledger.read, ledger.kept, ledger.rejected) == (mds.kept, count, {})
        assert (ledger.bytes_in, ledger.source, ledger.inputs) == (mds.bytes_out, mds.source, {"mds": mds.content_id})
        assert ledger.settings == plan.settings
        assert ledger.details["caption_latents"] == [1, 77, 64]
        assert ledger.details["image_latents"] == {"32": [4, 4, 4], "64": [4, 8, 8]}
        assert ledger.details["batch_size"] == 3
        assert {"md_assets", "torch", "diffusers", "open_clip_torch", "mosaicml-streaming"} <= set(ledger.versions)
        assert verify_shards(plan.latents_dir.data(archive)) == count
        mds_rows = list(iter_rows(plan.mds_dir.data(archive)))
        for column in ("key", "caption", "width", "height"):
            assert [row[column] for row in rows(plan, archive)] == [row[column] for row in mds_rows]


def test_what_is_published_is_passed_over(plan: LatentsPlan) -> None:
    assert [archive for archive in COUNTS if plan.current(archive)] == []
    run(plan)
    assert all(plan.current(archive) for archive in COUNTS)
    before = {archive: plan.latents_dir.ledger(archive).stat().st_mtime_ns for archive in COUNTS}
    assert kinds(run(plan)) == dict.fromkeys(COUNTS, "passed_over")
    assert {archive: plan.latents_dir.ledger(archive).stat().st_mtime_ns for archive in COUNTS} == before


def test_other_settings_or_inputs_are_encoded_again(plan: LatentsPlan, mds_rows, publish_mds) -> None:
    run(plan, ["train/000"])
    before = rows(plan, "train/000")
    assert kinds(run(replace(plan, batch_size=2, num_workers=1), ["train/000"])) == {"train/000": "passed_over"}
    assert kinds(run(replace(plan, encoders=replace(plan.encoders, seed=1)), ["train/000"])) == {
        "train/000": "published"
    }
    after = rows(plan, "train/000")
    assert [row["caption_latents"] for row in after] == [row["caption_latents"] for row in before]
    assert all(a["latents_64"] != b["latents_64"] for a, b in zip(after, before, strict=True))
    publish_mds(DataRoot(Path(plan.data_root)), "jdb", "train/000", mds_rows("train/000", 2))
    assert kinds(run(plan, ["train/000"])) == {"train/000": "published"}
    assert len(rows(plan, "train/000")) == 2


def test_neither_order_nor_workers_move_a_bit(plan: LatentsPlan) -> None:
    run(plan)
    other = replace(plan, archives=("train/002", "train/000", "train/001"), num_workers=2, encoder_tag="other")
    run(other)
    for archive in COUNTS:
        assert rows(other, archive) == rows(plan, archive)


def test_the_batch_size_moves_rows_by_rounding_only(plan: LatentsPlan) -> None:
    """See docs/decisions/010: a model's kernels are chosen by the batch's size. More sizes, with more processes, in
    `test_latents_worker`."""
    run(plan)
    other = replace(plan, batch_size=1, encoder_tag="other")
    run(other)
    for archive in COUNTS:
        assert_same_rows(rows(other, archive), rows(plan, archive))


def test_full_resolution_and_stored_images(plan: LatentsPlan) -> None:
    encoders = replace(plan.encoders, image_resolutions=(256, 512), save_images=True)
    run(replace(plan, encoders=encoders), ["train/000"])
    for row, mds in zip(rows(plan, "train/000"), iter_rows(plan.mds_dir.data("train/000")), strict=True):
        assert (len(row["latents_256"]), len(row["latents_512"])) == (2 * 4 * 32 * 32, 2 * 4 * 64 * 64)
        assert row["jpg"] == mds["jpg"]


def test_some_rows_are_decoded_again(plan: LatentsPlan) -> None:
    events = run(plan)
    ledger = read_ledger(plan.latents_dir.ledger("train/002"))
    assert ledger is not None
    found = ledger.details["round_trip"]
    assert found["keys"] == ["train/002/0000", "train/002/0006"]
    assert [len(found["psnr_db"][px]) for px in ("32", "64")] == [2, 2]
    assert max(found["caption_error"]) < 1e-3
    assert events["train/002"]["picture"].startswith("data:image/jpeg;base64,")
    assert events["train/001"]["picture"] is None  # it has no rows


def test_an_encoder_that_masks_padding_stores_the_captions_lengths(plan: LatentsPlan, tiny_t5: Path) -> None:
    t5 = replace(plan, encoders=replace(plan.encoders, text_encoder=str(tiny_t5), save_dtype="float32"))
    assert kinds(run(t5)) == dict.fromkeys(COUNTS, "published")
    ledger = read_ledger(t5.latents_dir.ledger("train/000"))
    assert ledger is not None
    assert (ledger.details["caption_latents"], ledger.details["dtype"]) == ([1, 120, 32], "float32")
    for row in rows(t5, "train/000"):
        assert len(row["caption_latents"]) == 120 * 32 * 4
        assert 1 < row["caption_length"] < 120


def test_memory_that_is_not_enough_is_noted_and_costs_no_row(
    plan: LatentsPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(plan)
    encode, small = VaeEncoder.encode, replace(plan, encoder_tag="small")

    def limited(self, images_BCHW):
        if len(images_BCHW) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return encode(self, images_BCHW)

    monkeypatch.setattr(VaeEncoder, "encode", limited)
    assert kinds(run(small)) == dict.fromkeys(COUNTS, "published")
    for archive, noted in (("train/000", True), ("train/001", False), ("train/002", True)):
        ledger = read_ledger(small.latents_dir.ledger(archive))
        assert ledger is not None
        assert ("cut to 1 rows" in ledger.details.get("out_of_memory", "")) == noted
        assert_same_rows(rows(small, archive), rows(plan, archive))


@pytest.mark.parametrize(
    ("spoil", "reason", "says"),
    [
        (lambda p: p.mds_dir.ledger("train/000").unlink(), "upstream_missing", "mds is not published"),
        (lambda p: shutil.rmtree(p.mds_dir.data("train/000")), "upstream_missing", "Materialize jdb/mds"),
        (lambda p: damage(p, "train/000", 0, 4), "upstream_damaged", "has 0 rows, its index says 5"),
        (lambda p: damage(p, "train/000", 4000, 400), "upstream_damaged", "train/000/0001 cannot be decoded"),
    ],
    ids=["no ledger", "no data", "shard header", "one jpeg"],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_archive_fails_alone(
    plan: LatentsPlan, spoil: Callable[[LatentsPlan], Any], reason: str, says: str, num_workers: int
) -> None:
    if reason == "upstream_damaged" and says.endswith("decoded"):
        second = list(iter_rows(plan.mds_dir.data("train/000")))[1]["jpg"]
        at = (plan.mds_dir.data("train/000") / "shard.00000.mds").read_bytes().index(second)
        damage(plan, "train/000", at, len(second) // 2)
    else:
        spoil(plan)
    events = run(replace(plan, num_workers=num_workers))
    assert kinds(events) == {"train/000": "failed", "train/001": "published", "train/002": "published"}
    assert events["train/000"]["reason"] == reason
    assert says in events["train/000"]["error"]
    assert events["train/000"]["error"].startswith("jdb train/000: ")
    assert unpublished(plan, "train/000")


def test_mds_of_other_settings_is_refused(plan: LatentsPlan) -> None:
    events = run(replace(plan, mds_settings=mds_settings(JDB, ImageSettings(min_image_size=300))))
    assert kinds(events) == dict.fromkeys(COUNTS, "failed")
    assert events["train/000"]["reason"] == "stale"
    with pytest.raises(ArchiveError, match="made with other settings"):
        replace(plan, mds_settings=mds_settings(JDB, ImageSettings(min_image_size=300))).upstream("train/000")


def test_mds_that_changes_meanwhile_is_noticed(
    plan: LatentsPlan, mds_rows, publish_mds, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Encoders.encode

    def encode_late(self, batch):
        publish_mds(DataRoot(Path(plan.data_root)), "jdb", "train/000", mds_rows("train/000", 6))
        return encode(self, batch)

    monkeypatch.setattr(Encoders, "encode", encode_late)
    events = run(plan, ["train/000"])
    assert events["train/000"]["reason"] == "upstream_changed"
    assert unpublished(plan, "train/000")


def test_trimmed_captions_are_published_and_verified(plan: LatentsPlan) -> None:
    trimmed = replace(plan, encoders=replace(plan.encoders, text_storage="trimmed"), encoder_tag="trimmed")
    run(plan)
    run(trimmed)
    ledger = read_ledger(trimmed.latents_dir.ledger("train/002"))
    assert ledger is not None
    assert ledger.details["text_storage"] == "trimmed"
    assert max(ledger.details["round_trip"]["caption_error"]) < 1e-3
    assert latents_valid(trimmed.latents_dir, "train/002").passed
    for full, own in zip(rows(plan, "train/002"), rows(trimmed, "train/002"), strict=True):
        assert len(own["caption_latents"]) == own["caption_length"] * 64 * 2
        assert full["caption_latents"].startswith(own["caption_latents"])


def test_a_write_error_fails_its_archive(plan: LatentsPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    write = latents.ShardWriter.write

    def full(self, row):
        if row["key"] == "train/000/0004":
            raise OSError(28, "No space left on device")
        write(self, row)

    monkeypatch.setattr(latents.ShardWriter, "write", full)
    events = run(plan)
    assert kinds(events) == {"train/000": "failed", "train/001": "published", "train/002": "published"}
    assert events["train/000"]["reason"] == "disk"
    assert "No space left on device" in events["train/000"]["error"]
    assert unpublished(plan, "train/000")


def test_what_was_published_stays_when_the_next_run_fails(plan: LatentsPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    run(plan, ["train/000"])
    before = rows(plan, "train/000")
    monkeypatch.setattr(latents, "ledgered_files", lambda *_: 1 / 0)
    events = run(replace(plan, encoders=replace(plan.encoders, seed=1)), ["train/000"])
    assert (events["train/000"]["reason"], "ZeroDivisionError" in events["train/000"]["error"]) == ("internal", True)
    assert rows(plan, "train/000") == before
    assert plan.current("train/000")


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), MdAssetsError("the memory is full", "Buy some")])
def test_an_interrupted_run_leaves_nothing_half(
    plan: LatentsPlan, stop: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, events = Encoders.encode, []

    def encode_some(self, batch):
        if batch.key[0] == "train/002/0003":
            raise stop
        return encode(self, batch)

    monkeypatch.setattr(Encoders, "encode", encode_some)
    with pytest.raises(type(stop)):
        encode_archives(plan, events.append)
    assert {e["archive"]: e["event"] for e in events} == {
        "train/000": "published",
        "train/001": "published",
        "train/002": "failed",
    }
    assert unpublished(plan, "train/002")
    with workspace(plan.latents_dir.ledger("train/002"), wait=False):  # given free
        pass
    monkeypatch.undo()
    assert kinds(run(plan))["train/002"] == "published"


def test_an_encoder_that_cannot_be_loaded_ends_the_run(plan: LatentsPlan) -> None:
    with pytest.raises(SettingsError, match="the VAE /nowhere cannot be loaded"):
        encode_archives(replace(plan, encoders=replace(plan.encoders, vae="/nowhere")), lambda event: None)


def test_two_runs_at_once_share_the_archives(plan: LatentsPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each encodes some, none is encoded twice, and both end with everything published."""
    events: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
    loaded = [Encoders.load(plan.encoders, "cpu") for _ in events]  # loading is not safe in threads
    monkeypatch.setattr(Encoders, "load", lambda *_: loaded.pop())
    both_have_one, encode = threading.Barrier(2, timeout=60), Encoders.encode
    waited = set()

    def encode_together(self, batch):
        if threading.current_thread().name not in waited:
            waited.add(threading.current_thread().name)
            both_have_one.wait()
        return encode(self, batch)

    monkeypatch.setattr(Encoders, "encode", encode_together)
    threads = [threading.Thread(target=encode_archives, args=(plan, events[name].append), name=name) for name in events]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    published = [e["archive"] for name in events for e in events[name] if e["event"] == "published"]
    assert sorted(published) == sorted(COUNTS)
    encoded_by = [{e["archive"] for e in events[n] if e["event"] == "published" and e["rows"]} for n in events]
    assert all(encoded_by)
    for own in events.values():  # each accounts for every archive
        assert {e["archive"] for e in own if e["event"] in ("published", "passed_over")} == set(COUNTS)
    assert all(row_count(plan.latents_dir.data(archive)) == count for archive, count in COUNTS.items())


def test_a_busy_archive_is_waited_for_at_the_end(plan: LatentsPlan) -> None:
    events: list[dict[str, Any]] = []
    with workspace(plan.latents_dir.ledger("train/000")):
        thread = threading.Thread(target=encode_archives, args=(plan, events.append))
        thread.start()
        while not [e for e in events if e["event"] == "waiting"]:
            assert thread.is_alive()
            thread.join(0.05)
        assert [(e["archive"], e["event"]) for e in events] == [
            ("train/001", "published"),
            ("train/002", "published"),
            ("train/000", "waiting"),
        ]
    thread.join(60)
    assert (events[-1]["archive"], events[-1]["event"]) == ("train/000", "published")


def test_progress_is_reported(plan: LatentsPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "PROGRESS_INTERVAL_S", 0.0)
    events: list[dict[str, Any]] = []
    encode_archives(replace(plan, batch_size=1), events.append, ["train/000"])
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["done_images"] for event in progress] == [2, 3, 4, 5]
    assert all(event["total_images"] == 5 and event["images_per_s"] > 0 for event in progress)
