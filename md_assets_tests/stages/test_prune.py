"""Pruning: what goes, what stays and why, and what readers see of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.core.spec import DatasetSpec
from md_assets.datasets.cc12m import SPEC as CC12M
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages import prune
from md_assets.stages.index import METADATA_KEY
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.stages.mds import convert_archive
from md_assets.stages.once import published, recorded, upstream_ledger
from md_assets.stages.prune import PruneReport, prune_dataset
from md_assets.stages.stale import WantedSettings
from md_assets.stages.status import dataset_totals
from md_assets.stages.verify import verify_dataset
from md_assets.storage.mds import iter_rows
from md_assets.storage.publish import workspace
from md_assets_tests.stages.conftest import JourneyDb
from md_assets_tests.stages.made_chain import ENCODERS, SIZES, TAG, ledger_of, merge_jdb_mds, publish_chain, publish_jdb
from md_assets_tests.stages.made_chain import JDB_ARCHIVES as ARCHIVES

CC = "cc12m-train-0000"
MDS = mds_settings(JDB, ImageSettings())


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    """Three archives of jdb in all stages, with merged indexes of mds."""
    publish_jdb(DataRoot(tmp_path / "data"))
    return DataRoot(tmp_path / "data")


@pytest.fixture
def cc_root(tmp_path: Path) -> DataRoot:
    """An archive of a dataset with a subset, in all stages."""
    root = DataRoot(tmp_path / "data")
    publish_chain(root, CC12M, CC)
    return root


def run(root: DataRoot, spec: DatasetSpec = JDB, **options: Any) -> PruneReport:
    return prune_dataset(spec, root, TAG, **{"dry_run": False, **options})


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything below a folder: time of change, and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, content)
    return found


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir()))


def why(report: PruneReport) -> dict[str, str]:
    return {kept.archive: kept.why for kept in report.kept_back}


def listed(root: DataRoot, split: str) -> set[str]:
    index = json.loads(root.mds("jdb").index(split).read_bytes())
    return {shard["raw_data"]["basename"].partition("/")[0] for shard in index["shards"]}


def test_raw_and_mds_go_and_latents_and_ledgers_stay(root: DataRoot) -> None:
    raw, mds = root.raw("jdb"), root.mds("jdb")
    sizes = {d: {a: size(d.data(a)) for a in ARCHIVES} for d in (raw, mds)}
    before = {(d, a): ledger_of(d, a) for d in (raw, mds) for a in ARCHIVES}
    latents = tree(root.latents("jdb", TAG).path)
    report = run(root)
    assert dict(report.archives) == {"raw": 3, "mds": 3} and report.kept_back == [] and not report.failed
    assert dict(report.bytes) == {"raw": sum(sizes[raw].values()), "mds": sum(sizes[mds].values())}
    for (stage_dir, archive), ledger in before.items():
        assert not stage_dir.data(archive).exists()
        after = ledger_of(stage_dir, archive)
        assert after.pruned is not None and after.pruned.bytes_freed == sizes[stage_dir][archive]
        assert replace(after, pruned=None) == ledger and after.content_id == ledger.content_id
    contents = {path: content for path, (_, content) in latents.items()}
    assert {path: content for path, (_, content) in tree(root.latents("jdb", TAG).path).items()} == contents


def test_a_dry_run_says_the_same_and_changes_nothing(root: DataRoot) -> None:
    before = tree(root.path)
    dry = run(root, dry_run=True)
    assert tree(root.path) == before
    done = run(root)
    assert dry.dry_run and (dry.archives, dry.bytes) == (done.archives, done.bytes)
    assert sum(dry.bytes.values()) > 0


def test_nothing_is_left_for_a_second_run(root: DataRoot) -> None:
    run(root)
    before = tree(root.path)
    again = run(root)
    assert (again.archives, again.kept_back) == ({}, [])
    assert tree(root.path) == before


def test_kept_upstream_archives_go_too_and_other_files_stay(root: DataRoot) -> None:
    kept = [root.kept_archive("jdb", archive, ".tgz") for archive in ("train/000", "test/imgs")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"t" * 77)
    report = run(root)
    assert (report.archives["archives"], report.bytes["archives"]) == (1, 77)
    assert [path.exists() for path in kept] == [False, True]
    tar_bytes = ledger_of(root.raw("jdb"), "train/000").bytes_out
    pruned = ledger_of(root.raw("jdb"), "train/000").pruned
    assert pruned is not None and pruned.bytes_freed == tar_bytes + 77


def test_status_and_checks_still_tell_everything(root: DataRoot) -> None:
    wanted = WantedSettings(encoders=ENCODERS, encoder_tag=TAG)
    before = {total.stage: total for total in dataset_totals(JDB, root, wanted)}
    report = run(root)
    for total in dataset_totals(JDB, root, wanted):
        was = before[total.stage]
        assert (total.read, total.kept, total.rejected) == (was.read, was.kept, was.rejected)
        gone = total.stage in ("raw", "mds")
        assert (total.pruned, total.done) == ((3, 0) if gone else (0, was.done))
        assert total.stale == 0 and total.bytes_freed == report.bytes[total.stage]
        assert total.bytes_out == (0 if gone else was.bytes_out)
    verdicts = list(verify_dataset(JDB, root))
    assert len(verdicts) == 3 * (2 + 2 + 3) and all(verdict.passed for _, _, verdict in verdicts), verdicts


def test_merged_indexes_never_list_what_is_gone(root: DataRoot) -> None:
    latents_ledger = root.latents("jdb", TAG).ledger("train/001")
    said = latents_ledger.read_bytes()
    latents_ledger.unlink()
    assert listed(root, "train") == {"000", "001"}
    run(root)
    assert listed(root, "train") == {"001"}
    index = json.loads(root.mds("jdb").index("train").read_bytes())
    assert (index[METADATA_KEY]["samples"], index[METADATA_KEY]["archives"]) == (len(SIZES), 1)
    assert [row["key"][:9] for row in iter_rows(root.mds("jdb").path / "train")] == ["train/001"] * len(SIZES)
    assert not root.mds("jdb").index("valid").exists()
    merge_jdb_mds(root, "train")  # and no later merge does
    assert listed(root, "train") == {"001"}
    latents_ledger.write_bytes(said)
    run(root)
    assert not root.mds("jdb").index("train").exists()


def test_latents_that_are_current_are_passed_over_and_others_ask_for_mds(root: DataRoot) -> None:
    run(root)
    plan = LatentsPlan(str(root.path), "jdb", ("train/000",), MDS, ENCODERS, TAG, num_workers=0)
    assert plan.current("train/000") == ledger_of(plan.latents_dir, "train/000")
    assert published(root.mds("jdb"), "train/000") is None and recorded(root.mds("jdb"), "train/000") is not None
    assert upstream_ledger(root.mds("jdb"), "train/000", MDS).pruned is not None


def test_encoding_anew_of_pruned_mds_fails_and_says_what_to_do(
    root: DataRoot, tiny_encoders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root)
    monkeypatch.setattr("md_assets.encoders.bundle.Encoders.load", lambda *_: NeverUsed())
    plan = LatentsPlan(str(root.path), "jdb", ("train/000",), MDS, tiny_encoders.settings(), TAG, num_workers=0)
    events: list[dict[str, Any]] = []
    encode_archives(plan, events.append)
    (event,) = events
    assert event["event"] == "failed" and event["reason"] == "pruned" and not event["transient"]
    assert event["error"].startswith("jdb train/000: mds was pruned on 2")
    assert event["error"].endswith("Materialize jdb/mds of it again")
    assert published(root.latents("jdb", TAG), "train/000") is not None


class NeverUsed:
    """Stands for loaded models where no row is encoded."""

    class device:
        type = "cpu"

    preparation = None


def test_converting_pruned_raw_fails_and_fetching_it_again_mends_it(ready: JourneyDb) -> None:
    ready.mds()
    stages = [ready.dir("raw"), ready.dir("mds")]
    first = [ledger_of(stage_dir, "train/000") for stage_dir in stages]
    for stage_dir, ledger in zip(stages, first, strict=True):  # as pruning leaves it
        marked = replace(ledger, pruned=prune.Pruned("2026-11-22", 1))
        stage_dir.ledger("train/000").write_text(marked.to_json())
    stages[0].data("train/000").unlink()
    with pytest.raises(ArchiveError, match=r"^jdb train/000: raw was pruned on .*Materialize jdb/raw of it again$"):
        convert_archive(JDB, "train/000", ready.root, ImageSettings())
    for number, again in enumerate((ready.raw(), ready.mds())):
        assert not again.passed_over
        assert again.ledger.pruned is None and again.ledger.content_id == first[number].content_id
    assert ready.mds().passed_over


def test_mds_that_is_there_stays_current_though_raw_is_pruned(root: DataRoot) -> None:
    raw = root.raw("jdb")
    marked = replace(ledger_of(raw, "train/000"), pruned=prune.Pruned("2026-11-22", 1))
    raw.ledger("train/000").write_text(marked.to_json())
    raw.data("train/000").unlink()
    ledger = ledger_of(root.mds("jdb"), "train/000")
    rewritten = replace(ledger, inputs={"raw": marked.content_id})
    root.mds("jdb").ledger("train/000").write_text(rewritten.to_json())
    no_captions = replace(JDB, annotations=())
    assert convert_archive(no_captions, "train/000", root, ImageSettings()).passed_over


@pytest.mark.parametrize(
    ("spoil", "says", "failed"),
    [
        (lambda r: r.latents("jdb", TAG).ledger("train/000").unlink(), "its latents are not published", False),
        (lambda r: flip(r.latents("jdb", TAG)), "shards_intact: ", True),
        (lambda r: rewrite(r.latents("jdb", TAG), read=5), "counts_balance: 5 read, but 4 kept", True),
        (lambda r: rewrite(r.latents("jdb", TAG), read=5, kept=5), "counts_balance: mds kept 4, here 5", True),
        (lambda r: rewrite(r.raw("jdb"), read=7, kept=5), "mds: raw kept 5, here 4 were read", True),
        (lambda r: rewrite(r.raw("jdb"), read=7), "raw: 7 read, but 4 kept + 2 rejected", True),
        (lambda r: r.raw("jdb").ledger("train/000").unlink(), "raw: raw is not published", True),
        (lambda r: r.mds("jdb").ledger("train/000").write_text("{"), "is no ledger", True),
        (lambda r: rewrite(r.mds("jdb"), inputs={"raw": "x"}), "mds was made of another raw", False),
        (lambda r: rewrite(r.latents("jdb", TAG), inputs={"mds": "x"}), "was made of another mds: materialize", False),
    ],
    ids=["none", "flipped", "unbalanced", "chain", "raw", "raw unbalanced", "no raw", "ledger", "input", "stale"],
)
def test_what_is_not_verified_stays(root: DataRoot, spoil: Callable[[DataRoot], Any], says: str, failed: bool) -> None:
    spoil(root)
    before = {path: content for path, (_, content) in tree(root.path).items() if "train/000" in path}
    report = run(root)
    assert list(why(report)) == ["train/000"] and says in why(report)["train/000"]
    assert report.failed is failed and report.archives == {"raw": 2, "mds": 2}
    after = tree(root.path)
    assert {path: after[path][1] for path in before if path in after} == before


def flip(stage_dir: StageDir) -> None:
    shard = stage_dir.data("train/000") / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


def rewrite(stage_dir: StageDir, **changes: Any) -> None:
    stage_dir.ledger("train/000").write_text(replace(ledger_of(stage_dir, "train/000"), **changes).to_json())


def test_latents_of_other_encoders_do_not_count(root: DataRoot) -> None:
    report = prune_dataset(JDB, root, "other", dry_run=False)
    assert set(why(report)) == set(ARCHIVES) and set(why(report).values()) == {
        "its latents are not published (mds_latents_other)"
    }
    assert root.raw("jdb").data("train/000").exists()


@pytest.mark.parametrize("stage", ["raw", "mds", TAG, "other"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_an_archive_that_is_worked_on_stays(root: DataRoot, stage: str, dry_run: bool) -> None:
    """In whatever stage, for whatever pair of encoders."""
    publish_chain(root, JDB, "train/001", tag="other")
    directories = {"raw": root.raw("jdb"), "mds": root.mds("jdb")}
    directory = directories.get(stage, root.latents("jdb", stage))
    with workspace(directory.ledger("train/000")):
        report = run(root, dry_run=dry_run)
    assert why(report) == {"train/000": "another run works on it"} and not report.failed
    assert root.raw("jdb").data("train/000").exists() and report.archives == {"raw": 2, "mds": 2}


def test_a_subset_must_have_its_latents_and_its_mds_goes_too(cc_root: DataRoot) -> None:
    latents = cc_root.latents("cc12m", TAG, "minres512")
    said = latents.ledger(CC).read_bytes()
    latents.ledger(CC).unlink()
    assert why(run(cc_root, CC12M)) == {CC: f"its latents_minres512 are not published (mds_minres512_latents_{TAG})"}
    latents.ledger(CC).write_bytes(said)
    shard = latents.data(CC) / "shard.00000.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert "mds_minres512_latents_tiny: shards_intact" in why(run(cc_root, CC12M))[CC]
    shard.write_bytes(whole)
    report = run(cc_root, CC12M)
    assert dict(report.archives) == {"raw": 1, "mds": 1, "mds_minres512": 1}
    assert not cc_root.mds("cc12m", "minres512").data(CC).exists()
    assert all(verdict.passed for _, _, verdict in verify_dataset(CC12M, cc_root))


@pytest.mark.parametrize("link", ["data", "stage", "shard folder", "archives"])
def test_nothing_outside_the_data_root_is_touched(root: DataRoot, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    kept = root.kept_archive("jdb", "train/000", ".tgz")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"kept")
    moved = {
        "data": root.raw("jdb").data("train/000"),
        "stage": root.mds("jdb").path,
        "shard folder": root.mds("jdb").data("train/000"),
        "archives": kept.parent,
    }[link]
    moved.rename(outside)
    moved.symlink_to(outside)
    before = tree(tmp_path / "outside") if outside.is_dir() else outside.read_bytes()
    report = run(root)
    assert (tree(outside) if outside.is_dir() else outside.read_bytes()) == before
    assert moved.is_symlink() and "is a symbolic link, or lies behind one" in why(report)["train/000"]
    assert report.failed and ledger_of(root.raw("jdb"), "train/000").pruned is None


def test_links_inside_what_is_removed_are_not_followed(root: DataRoot, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"mine")
    (root.mds("jdb").data("train/000") / "link").symlink_to(outside)
    run(root)
    assert (outside / "file").read_bytes() == b"mine" and not root.mds("jdb").data("train/000").exists()


def test_a_data_root_that_is_a_link_itself_is_pruned(root: DataRoot, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root.path)
    assert run(DataRoot(tmp_path / "link")).archives == {"raw": 3, "mds": 3}


def test_progress_counts_archives(root: DataRoot) -> None:
    seen: list[Any] = []
    run(root, dry_run=True, report=seen.append)
    assert [(p.doing, p.done, p.total, p.unit) for p in seen] == [
        ("verifies latents", number, 3, "archives") for number in range(3)
    ]
