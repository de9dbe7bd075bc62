"""The checks: each fails on what it must find, and passes on what is whole."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, Stage, StageDir
from md_assets.core.verdict import CHECKS_OF_STAGE, Verdict
from md_assets.stages import verify
from md_assets.stages.verify import (
    counts_balance,
    latents_fault,
    latents_valid,
    shards_intact,
    tar_intact,
    verify_archive,
)
from md_assets.storage.publish import output_file, read_ledger
from md_assets_tests.stages.conftest import LATENT_SHAPES, LAYOUT, JourneyDb, latents_row

ARCHIVE = "train/000"


@pytest.fixture
def root(tmp_path: Path) -> DataRoot:
    return DataRoot(tmp_path / "data")


@pytest.fixture
def mds_dir(root: DataRoot, publish_mds: Any, mds_rows: Any) -> StageDir:
    publish_mds(root, "jdb", ARCHIVE, mds_rows(ARCHIVE, 5))
    return root.mds("jdb")


@pytest.fixture
def latents_dir(root: DataRoot, publish_latents: Callable[..., Ledger]) -> StageDir:
    publish_latents(root.latents("jdb", "tiny"), ARCHIVE, 5)
    return root.latents("jdb", "tiny")


def ledger_of(stage_dir: StageDir) -> Ledger:
    ledger = read_ledger(stage_dir.ledger(ARCHIVE))
    assert ledger is not None
    return ledger


def rewrite(stage_dir: StageDir, **changes: Any) -> None:
    """The ledger with other fields, otherwise in order."""
    stage_dir.ledger(ARCHIVE).write_text(replace(ledger_of(stage_dir), **changes).to_json())


def edit(stage_dir: StageDir, old: str, new: str) -> None:
    """The ledger's text with something else in it."""
    text = stage_dir.ledger(ARCHIVE).read_text()
    assert old in text
    stage_dir.ledger(ARCHIVE).write_text(text.replace(old, new))


def shard(stage_dir: StageDir) -> Path:
    return stage_dir.data(ARCHIVE) / "shard.00000.mds"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def assert_fails(verdict: Verdict, says: str) -> None:
    assert not verdict.passed
    assert says in verdict.what and "\n" not in verdict.what


def test_everything_passes_on_what_the_stages_publish(ready: JourneyDb) -> None:
    ready.mds()
    found: dict[Stage, list[Verdict]] = {
        "raw": list(verify_archive(ready.dir("raw"), None, ARCHIVE)),
        "mds": list(verify_archive(ready.dir("mds"), ready.dir("raw"), ARCHIVE)),
    }
    for stage, verdicts in found.items():
        assert [verdict.check for verdict in verdicts] == list(CHECKS_OF_STAGE[stage])
        assert all(verdict.passed for verdict in verdicts), verdicts
        assert all(verdict.what and "\n" not in verdict.what for verdict in verdicts)
    assert found["mds"][0].facts == {"read": 7, "kept": 6, "rejected": 1, "kept_upstream": 7}
    assert found["mds"][1].facts["rows"] == 6


def test_everything_passes_on_good_latents(mds_dir: StageDir, latents_dir: StageDir) -> None:
    verdicts = list(verify_archive(latents_dir, mds_dir, ARCHIVE))
    assert [verdict.check for verdict in verdicts] == ["counts_balance", "shards_intact", "latents_valid"]
    assert all(verdict.passed for verdict in verdicts), verdicts
    assert verdicts[2].facts == {"rows": 5, "rows_decoded": 5}


@pytest.mark.parametrize("stage", ["raw", "mds", "latents"])
@pytest.mark.parametrize("read_all", [True, False])
def test_every_check_gives_its_verdict_whatever_is_there(root: DataRoot, stage: Stage, read_all: bool) -> None:
    stage_dir = root.latents("jdb", "tiny") if stage == "latents" else getattr(root, stage)("jdb")
    verdicts = list(verify_archive(stage_dir, None, ARCHIVE, read_all=read_all))
    assert [verdict.check for verdict in verdicts] == list(CHECKS_OF_STAGE[stage])
    assert all(not verdict.passed and f"{stage} is not published" in verdict.what for verdict in verdicts)


def test_sizes_alone_find_what_is_missing_or_cut_but_no_flipped_byte(mds_dir: StageDir) -> None:
    def quick() -> Verdict:
        return list(verify_archive(mds_dir, None, ARCHIVE, read_all=False))[1]

    assert quick().passed and "hashes were not read" in quick().what and quick().check == "shards_intact"
    whole = shard(mds_dir).read_bytes()
    flip(shard(mds_dir), len(whole) // 2)
    assert quick().passed and not shards_intact(mds_dir, ARCHIVE).passed
    shard(mds_dir).write_bytes(whole[:-1])
    assert_fails(quick(), f"has {len(whole) - 1} bytes, its ledger says {len(whole)}")
    shard(mds_dir).unlink()
    assert_fails(quick(), f"{shard(mds_dir)} is missing")


@pytest.mark.parametrize("check", [tar_intact, shards_intact, latents_valid])
def test_what_is_not_published_fails(root: DataRoot, check: Callable[[StageDir, str], Verdict]) -> None:
    assert_fails(check(root.mds("jdb"), ARCHIVE), "mds is not published. Materialize it")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: rewrite(d, kept=4), "5 read, but 4 kept + 0 rejected"),
        (lambda d: rewrite(d, rejected={"no_caption": ["x"]}), "5 read, but 5 kept + 1 rejected"),
        (lambda d: rewrite(d, read=6, kept=6), "raw kept 5, here 6 were read"),
        (lambda d: edit(d, '"rejected": {}', '"rejected": {"no_caption": ["x"]}'), "was edited after it was written"),
        (lambda d: edit(d, '"jpeg_quality": 95', '"jpeg_quality": 90'), "was edited after it was written"),
        (lambda d: d.ledger(ARCHIVE).write_text("{"), "is no ledger"),
        (lambda d: d.ledger(ARCHIVE).write_text("[]"), "is no ledger"),
        (lambda d: d.ledger(ARCHIVE).write_bytes(b"\xff"), "is no ledger"),
    ],
)
def test_counts_balance_finds(mds_dir: StageDir, root: DataRoot, spoil: Callable[[StageDir], Any], says: str) -> None:
    upstream = root.raw("jdb")
    upstream.ledger(ARCHIVE).parent.mkdir(parents=True)
    upstream.ledger(ARCHIVE).write_text(replace(ledger_of(mds_dir), stage="raw").to_json())
    assert counts_balance(mds_dir, ARCHIVE, upstream).passed
    spoil(mds_dir)
    assert_fails(counts_balance(mds_dir, ARCHIVE, upstream), says)


def test_counts_balance_needs_upstream(mds_dir: StageDir, root: DataRoot) -> None:
    assert_fails(counts_balance(mds_dir, ARCHIVE, root.raw("jdb")), "raw is not published")
    assert counts_balance(mds_dir, ARCHIVE, None).passed


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: flip(path, 3000),
        lambda path: path.write_bytes(path.read_bytes()[:-512]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
    ],
    ids=["flipped", "cut", "longer", "empty"],
)
def test_tar_intact_finds_damage(jdb: JourneyDb, spoil: Callable[[Path], Any]) -> None:
    ledger = jdb.raw().ledger
    assert tar_intact(jdb.dir("raw"), ARCHIVE).passed
    spoil(jdb.dir("raw").data(ARCHIVE))
    verdict = tar_intact(jdb.dir("raw"), ARCHIVE)
    assert_fails(verdict, f"its ledger says {ledger.bytes_out} bytes, sha256 {ledger.files[0].sha256[:16]}")


def test_tar_intact_finds_its_absence(jdb: JourneyDb) -> None:
    jdb.raw()
    jdb.dir("raw").data(ARCHIVE).unlink()
    assert_fails(tar_intact(jdb.dir("raw"), ARCHIVE), "No such file")


def drop_rows(stage_dir: StageDir, rows: int) -> None:
    """The index says other rows than the shard's header."""
    path = stage_dir.data(ARCHIVE) / "index.json"
    index = json.loads(path.read_bytes())
    index["shards"][0]["samples"] = rows
    path.write_text(json.dumps(index))


def no_shard_listed(stage_dir: StageDir) -> None:
    """Index and ledger agree on no shard, but the ledger's count stays."""
    path = stage_dir.data(ARCHIVE) / "index.json"
    path.write_text(json.dumps({"version": 2, "shards": []}))
    rewrite(stage_dir, files=(output_file(path, f"{ARCHIVE}/index.json"),))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda d: flip(shard(d), shard(d).stat().st_size // 2), "does not hash to what its index says"),
        (lambda d: flip(shard(d), 0), "rows, its index says 5"),
        (lambda d: shard(d).write_bytes(shard(d).read_bytes()[:-1]), "bytes, its index says"),
        (lambda d: shard(d).write_bytes(b""), "cannot be read"),
        (lambda d: shard(d).unlink(), "is missing"),
        (lambda d: shutil.rmtree(d.data(ARCHIVE)), "is no index of MDS shards"),
        (lambda d: (d.data(ARCHIVE) / "index.json").write_text("{"), "is no index of MDS shards"),
        (lambda d: drop_rows(d, 4), "5 rows, its index says 4"),
        (lambda d: rewrite(d, kept=6, read=6), "5 rows in the shards, 6 in the ledger"),
        (no_shard_listed, "0 rows in the shards, 5 in the ledger"),
    ],
    ids=["flipped", "header", "cut", "empty", "absent", "no data", "index", "rows", "kept", "unlisted"],
)
def test_shards_intact_finds(mds_dir: StageDir, spoil: Callable[[StageDir], Any], says: str) -> None:
    assert shards_intact(mds_dir, ARCHIVE).passed
    spoil(mds_dir)
    assert_fails(shards_intact(mds_dir, ARCHIVE), says)


def test_shards_intact_finds_whole_shards_of_something_else(
    mds_dir: StageDir, root: DataRoot, publish_mds: Any, mds_rows: Any
) -> None:
    """Index and shards agree with each other and in their rows, only the ledger tells that they are not its own."""
    publish_mds(root, "jdb", "train/001", mds_rows("train/001", 5))
    shutil.rmtree(mds_dir.data(ARCHIVE))
    mds_dir.data("train/001").rename(mds_dir.data(ARCHIVE))
    assert_fails(shards_intact(mds_dir, ARCHIVE), "are not those of the ledger")


def spoiled_row(column: str, value: bytes) -> list[dict[str, Any]]:
    return [latents_row(f"{ARCHIVE}/{n}", **({column: value} if n == 4 else {})) for n in range(5)]


def not_finite(value: float) -> bytes:
    array = np.zeros(LATENT_SHAPES["latents_32"], np.float16)
    array[-1, -1, -1] = value
    return array.tobytes()


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("latents_32", not_finite(np.nan), "latents_32 has values that are not finite"),
        ("latents_32", not_finite(-np.inf), "latents_32 has values that are not finite"),
        ("caption_latents", b"", "caption_latents has 0 bytes, (1, 3, 4) in float16 are 24"),
        ("latents_32", b"\0" * 62, "latents_32 has 62 bytes, (2, 4, 4) in float16 are 64"),
        ("latents_32", b"\0" * 128, "latents_32 has 128 bytes"),
    ],
)
def test_latents_valid_names_the_sample(
    root: DataRoot, publish_latents: Callable[..., Ledger], column: str, value: bytes, says: str
) -> None:
    stage_dir = root.latents("jdb", "tiny")
    publish_latents(stage_dir, ARCHIVE, spoiled_row(column, value))
    assert shards_intact(stage_dir, ARCHIVE).passed
    assert_fails(latents_valid(stage_dir, ARCHIVE), f"sample {ARCHIVE}/4: {says}")


@pytest.mark.parametrize(
    ("details", "says"),
    [
        ({}, "'dtype' is not in the ledger's details"),
        ({"dtype": "float16"}, "'caption_latents' is not in the ledger's details"),
        ({**LAYOUT, "image_latents": {"64": [2, 8, 8]}}, "latents_64 has 0 bytes"),
        ({**LAYOUT, "image_latents": [1]}, "items"),
        ({**LAYOUT, "image_latents": {"x": [2, 4, 4]}}, "invalid literal"),
        ({**LAYOUT, "dtype": "float32"}, "caption_latents has 24 bytes, (1, 3, 4) in float32 are 48"),
        ({**LAYOUT, "dtype": "int7"}, "int7"),
        ({**LAYOUT, "caption_latents": None}, "NoneType"),
    ],
)
def test_latents_valid_needs_what_the_ledger_promises(
    root: DataRoot, publish_latents: Callable[..., Ledger], details: dict[str, Any], says: str
) -> None:
    stage_dir = root.latents("jdb", "tiny")
    publish_latents(stage_dir, ARCHIVE, 2, details=details)
    assert_fails(latents_valid(stage_dir, ARCHIVE), says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"caption_length": 3, "caption_latents": b"\0" * 24}, ""),
        ({"caption_length": 3}, "caption_latents has 16 bytes, (1, 3, 4) in float16 are 24"),
        ({"caption_length": 0}, "caption_latents: its caption_length is 0, of 3 positions"),
        ({"caption_length": 4, "caption_latents": b"\0" * 32}, "its caption_length is 4, of 3 positions"),
        ({"caption_latents": b"\0\x7e" * 8}, "caption_latents has values that are not finite"),
    ],
)
def test_trimmed_captions_are_as_long_as_they_say(changes: dict[str, Any], says: str) -> None:
    row = {"caption_length": 2, "caption_latents": b"\0" * 16, **changes}
    fault = latents_fault(row, {"caption_latents": (1, 3, 4)}, "float16", "trimmed")
    assert (fault is None) == (says == "")
    assert says in (fault or "")


def test_a_trimmed_caption_needs_its_length() -> None:
    row = {"caption_latents": b"\0" * 16}
    fault = latents_fault(row, {"caption_latents": (1, 3, 4)}, "float16", "trimmed")
    assert fault == "caption_latents: there is no 'caption_length'"


@pytest.mark.parametrize("at", [1, 4, 8, 40])
def test_latents_valid_survives_a_shard_of_noise(latents_dir: StageDir, at: int) -> None:
    flip(shard(latents_dir), at)
    assert not latents_valid(latents_dir, ARCHIVE).passed or not shards_intact(latents_dir, ARCHIVE).passed
    assert not shards_intact(latents_dir, ARCHIVE).passed


def test_latents_valid_counts_the_rows(latents_dir: StageDir) -> None:
    rewrite(latents_dir, kept=6, read=6)
    assert_fails(latents_valid(latents_dir, ARCHIVE), "5 rows in the index, 6 in the ledger")


def test_latents_valid_decodes_a_sample_of_many(root: DataRoot, publish_latents: Callable[..., Ledger]) -> None:
    stage_dir = root.latents("jdb", "tiny")
    publish_latents(stage_dir, ARCHIVE, 300)
    assert latents_valid(stage_dir, ARCHIVE).facts == {"rows": 300, "rows_decoded": verify.ROWS_SAMPLED}


ROUND_TRIP = {"keys": ["a", "b"], "psnr_db": {"32": [30.1, 28.4]}, "caption_error": [0.0002, 0.0001]}


def test_latents_valid_reports_what_came_back_of_a_few_rows(latents_dir: StageDir) -> None:
    rewrite(latents_dir, details={**ledger_of(latents_dir).details, "round_trip": ROUND_TRIP})
    verdict = latents_valid(latents_dir, ARCHIVE)
    assert verdict.passed
    assert verdict.facts == {"rows": 5, "rows_decoded": 5, "psnr_db_32": 28.4, "caption_error": 0.0002}


def test_latents_valid_fails_where_a_captions_states_are_anothers(latents_dir: StageDir) -> None:
    other = {**ROUND_TRIP, "caption_error": [0.0002, 0.97]}
    rewrite(latents_dir, details={**ledger_of(latents_dir).details, "round_trip": other})
    assert_fails(latents_valid(latents_dir, ARCHIVE), "sample b: its caption's states differ by 97%")


def test_latents_valid_does_without_a_round_trip_that_had_no_room(latents_dir: StageDir) -> None:
    details = {**ledger_of(latents_dir).details, "round_trip": {"skipped": "out of memory"}}
    rewrite(latents_dir, details=details)
    assert latents_valid(latents_dir, ARCHIVE).facts == {"rows": 5, "rows_decoded": 5}


def test_an_archive_without_a_sample_is_whole_but_a_check_says_so(
    root: DataRoot, publish_latents: Callable[..., Ledger]
) -> None:
    stage_dir = root.latents("jdb", "tiny")
    publish_latents(stage_dir, ARCHIVE, 0)
    counts, *others = verify_archive(stage_dir, stage_dir, ARCHIVE)
    assert_fails(counts, "no sample is kept, of 0 that were read")
    assert len(others) == 2 and all(verdict.passed for verdict in others)
