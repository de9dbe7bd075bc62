"""What is published, stale, pruned or missing, told from the ledgers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from md_assets.core.ledger import Pruned
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.settings import ImageSettings
from md_assets.core.spec import DatasetSpec
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.demo.journeydb import REJECTED_BY_RAW
from md_assets.stages.stale import Difference, StaleGroup, WantedSettings
from md_assets.stages.status import StageTotals, dataset_totals, recorded_ledgers, stage_dirs, stages_of
from md_assets_tests.stages.conftest import JourneyDb
from md_assets_tests.stages.made_chain import ENCODERS, JDB_ARCHIVES, TAG, ledger_of, publish_chain

WANTED = WantedSettings(encoders=ENCODERS, encoder_tag=TAG)
CC = "cc12m-train-0000"


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    """Three archives of jdb in all stages."""
    for archive in JDB_ARCHIVES:
        publish_chain(DataRoot(tmp_path), JDB, archive)
    return DataRoot(tmp_path)


def totals(root: DataRoot, spec: DatasetSpec = JDB, wanted: WantedSettings = WANTED) -> dict[str, StageTotals]:
    return {total.stage: total for total in dataset_totals(spec, root, wanted)}


def states(total: StageTotals) -> tuple[int, int, int, int]:
    return total.done, total.stale, total.pruned, total.missing


def rewrite(stage_dir: StageDir, archive: str, **changes: object) -> None:
    stage_dir.ledger(archive).write_text(replace(ledger_of(stage_dir, archive), **changes).to_json())


def test_sums_over_archives_of_both_splits(ready: JourneyDb) -> None:
    ledgers = [ready.raw(archive).ledger for archive in ("valid/000", "train/000", "train/001")]
    mds = ready.mds().ledger
    found = totals(ready.root)
    raw = found["raw"]
    assert (raw.archives, states(raw), raw.read, raw.kept) == (400, (3, 0, 0, 397), 36, 21)
    assert raw.rejected == {reason: 3 * count for reason, count in REJECTED_BY_RAW.items()}
    assert raw.bytes_out == sum(ledger.bytes_out for ledger in ledgers)
    assert raw.seconds == pytest.approx(sum(ledger.seconds for ledger in ledgers))
    of_mds = found["mds"]
    assert (states(of_mds), of_mds.read, of_mds.kept, of_mds.bytes_out) == ((1, 0, 0, 399), 7, 6, mds.bytes_out)
    assert of_mds.rejected == {"no_caption": 1}


def test_ledgers_come_in_the_order_of_upstream(root: DataRoot) -> None:
    assert [ledger.archive for ledger in recorded_ledgers(JDB, root.raw("jdb"))] == list(JDB_ARCHIVES)


def test_what_is_not_whole_is_missing(root: DataRoot) -> None:
    root.raw("jdb").data("train/000").write_bytes(b"cut")
    (root.mds("jdb").data("train/000") / "index.json").unlink()
    root.latents("jdb", TAG).ledger("train/000").write_text("{")
    (root.raw("jdb").path / "train" / "002.tar").write_bytes(b"without a ledger")
    found = totals(root)
    assert [states(found[stage]) for stage in ("raw", "mds", f"mds_latents_{TAG}")] == [(2, 0, 0, 398)] * 3
    assert [ledger.archive for ledger in recorded_ledgers(JDB, root.raw("jdb"))] == ["train/001", "valid/000"]


def test_stages_and_what_each_reads(tmp_path: Path) -> None:
    root = DataRoot(tmp_path)
    for tag, subset in (("b", ""), ("a", "minres512"), ("b", "minres512")):
        root.latents("cc12m", tag, subset).path.mkdir(parents=True)
    (tmp_path / "cc12m" / "mds_latents_file").write_text("no directory")
    (tmp_path / "cc12m" / "mds_other").mkdir()
    found = [(d.path.name, d.asset, upstream and upstream.path.name) for d, upstream in stages_of(root, CC12M)]
    assert found == [
        ("raw", "raw", None),
        ("mds", "mds", "raw"),
        ("mds_minres512", "mds_minres512", "mds"),
        ("mds_latents_a", "latents", "mds"),
        ("mds_minres512_latents_a", "latents_minres512", "mds_latents_a"),
        ("mds_latents_b", "latents", "mds"),
        ("mds_minres512_latents_b", "latents_minres512", "mds_latents_b"),
    ]
    assert [d.path.name for d in stage_dirs(root, JDB)] == ["raw", "mds"]


def test_subsets_are_counted_like_any_stage(tmp_path: Path) -> None:
    publish_chain(DataRoot(tmp_path), CC12M, CC)
    found = totals(DataRoot(tmp_path), CC12M)
    assert list(found) == ["raw", "mds", "mds_minres512", f"mds_latents_{TAG}", f"mds_minres512_latents_{TAG}"]
    assert {states(total) for total in found.values()} == {(1, 0, 0, 2175)}
    assert found["mds_minres512"].rejected == {"not_in_subset": 2}
    assert (found["mds_minres512"].read, found["mds_minres512"].kept) == (4, 2)


def test_nothing_published(tmp_path: Path) -> None:
    found = dataset_totals(JDB, DataRoot(tmp_path / "none"), WANTED)
    assert found == [
        StageTotals("raw", 400, missing=400),
        StageTotals("mds", 400, missing=400),
        StageTotals("raw_test", 2, missing=2),
    ]


def test_other_settings_make_stale_and_are_named(root: DataRoot) -> None:
    publish_chain(root, JDB, "train/001", images=ImageSettings(jpeg_quality=90))
    publish_chain(root, JDB, "valid/000", images=ImageSettings(jpeg_quality=90, min_image_size=1))
    found = totals(root)
    quality = StaleGroup(Difference("images.jpeg_quality", 90, 95), ("train/001", "valid/000"))
    smallest = StaleGroup(Difference("images.min_image_size", 1, 256), ("valid/000",))
    for stage in ("raw", "mds", f"mds_latents_{TAG}"):
        assert states(found[stage]) == (1, 2, 0, 397)
        assert found[stage].stale_groups == (quality, smallest)
    other = WantedSettings(ImageSettings(jpeg_quality=90), ENCODERS, TAG)
    assert states(totals(root, wanted=other)["raw"]) == (1, 2, 0, 397)


def test_other_weights_make_latents_stale_where_their_revision_is_known(root: DataRoot) -> None:
    newer = replace(ENCODERS, vae_revision="newer")
    found = totals(root, wanted=WantedSettings(encoders=newer, encoder_tag=TAG))[f"mds_latents_{TAG}"]
    assert states(found) == (0, 3, 0, 397)
    assert found.stale_groups == (
        StaleGroup(Difference("encoders.vae_revision", "revision of the vae", "newer"), JDB_ARCHIVES),
    )
    unknown = replace(ENCODERS, vae_revision="", text_encoder_revision="")
    assert states(totals(root, wanted=WantedSettings(encoders=unknown))[f"mds_latents_{TAG}"]) == (3, 0, 0, 397)


def test_a_changed_upstream_makes_stale(root: DataRoot) -> None:
    rewrite(root.mds("jdb"), "train/000", rejected={"no_caption": ["x"]}, read=5)
    found = totals(root)
    assert states(found["mds"]) == (3, 0, 0, 397)
    latents = found[f"mds_latents_{TAG}"]
    assert states(latents) == (2, 1, 0, 397)
    assert latents.stale_groups == (StaleGroup(Difference("input mds"), ("train/000",)),)
    root.mds("jdb").ledger("train/000").unlink()  # then nothing can be said
    assert states(totals(root)[f"mds_latents_{TAG}"]) == (3, 0, 0, 397)


def test_changed_captions_make_mds_stale(ready: JourneyDb) -> None:
    ready.raw("valid/000")
    ready.annotations("valid")
    ready.mds()
    ready.mds("valid/000")
    ready.put_prompts("valid", {"./000/other.jpg": "another caption"})
    ready.annotations("valid")
    found = totals(ready.root)["mds"]
    assert found.stale_groups == (StaleGroup(Difference("input annotations"), ("valid/000",)),)


def test_pruned_archives_are_counted_with_their_samples_but_without_bytes(root: DataRoot) -> None:
    before = totals(root)["raw"]
    bytes_of_one = ledger_of(root.raw("jdb"), "train/000").bytes_out
    rewrite(root.raw("jdb"), "train/000", pruned=Pruned("2026-11-22", 99))
    root.raw("jdb").data("train/000").unlink()
    raw = totals(root)["raw"]
    assert states(raw) == (2, 0, 1, 397) and (raw.read, raw.kept) == (before.read, before.kept)
    assert (raw.bytes_out, raw.bytes_freed) == (before.bytes_out - bytes_of_one, 99)
    assert states(totals(root)["mds"]) == (3, 0, 0, 397)


def test_what_is_only_fetched_has_a_row_of_its_own(root: DataRoot) -> None:
    (images,) = (extra.name for extra in JDB.raw_only if extra.images)
    ledger = ledger_of(root.raw("jdb"), "train/000")
    tar = root.raw("jdb").data(images)
    tar.parent.mkdir()
    tar.write_bytes(root.raw("jdb").data("train/000").read_bytes())
    files = (replace(ledger.files[0], path=f"{images}.tar"),)
    root.raw("jdb").ledger(images).write_text(replace(ledger, archive=images, files=files).to_json())
    found = totals(root)
    assert states(found["raw_test"]) == (1, 0, 0, 1) and found["raw_test"].read == ledger.read
    assert states(found["raw"]) == (3, 0, 0, 397)


def test_what_failed_counts_as_nothing_else(root: DataRoot) -> None:
    publish_chain(root, JDB, "train/001", images=ImageSettings(jpeg_quality=90))
    failed = {"raw": {"train/000", "train/001", "train/002"}, "mds": set[str]()}
    raw, mds, *_ = dataset_totals(JDB, root, WANTED, failed)
    assert (raw.failed, states(raw)) == (3, (1, 0, 0, 396)) and raw.stale_groups == ()
    assert (raw.read, raw.kept) == (18, 12)  # what is published of them is there all the same
    assert (mds.failed, states(mds)) == (0, (2, 1, 0, 397))
    assert raw.as_json()["failed"] == 3


def test_the_keys_for_scripts(root: DataRoot) -> None:
    publish_chain(root, JDB, "train/001", images=ImageSettings(jpeg_quality=90))
    rewrite(root.mds("jdb"), "train/000", rejected={"no_caption": ["x"]}, read=5)
    raw, _, latents, _ = dataset_totals(JDB, root, WANTED)
    said = json.loads(json.dumps(raw.as_json()))
    assert said == {
        "stage": "raw",
        "archives": 400,
        "done": 2,
        "failed": None,
        "stale": 1,
        "pruned": 0,
        "missing": 397,
        "read": 18,
        "kept": 12,
        "rejected": {"too_small": 6},
        "bytes": raw.bytes_out,
        "bytes_freed": 0,
        "seconds": round(raw.seconds, 3),
        "stale_because": [
            {"setting": "images.jpeg_quality", "found": 90, "wanted": 95, "archives": ["train/001"]},
        ],
    }
    assert latents.as_json()["stale_because"] == [
        {"input": "mds", "archives": ["train/000"]},
        {"setting": "images.jpeg_quality", "found": 90, "wanted": 95, "archives": ["train/001"]},
    ]
