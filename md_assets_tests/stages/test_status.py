"""What is published, told from the ledgers."""

from collections.abc import Callable

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot
from md_assets.datasets.jdb import SPEC
from md_assets.demo.journeydb import REJECTED_BY_RAW
from md_assets.stages.status import StageTotals, published_ledgers, stage_dirs, totals
from md_assets_tests.stages.conftest import JourneyDb


def test_sums_over_archives_of_both_splits(ready: JourneyDb) -> None:
    ledgers = [ready.raw(archive).ledger for archive in ("valid/000", "train/000", "train/001")]
    mds = ready.mds().ledger
    raw_dir, mds_dir = stage_dirs(ready.root, "jdb")
    found = totals(SPEC, raw_dir)
    assert (found.stage, found.archives, found.read, found.kept) == ("raw", 3, 36, 21)
    assert found.rejected == {reason: 3 * count for reason, count in REJECTED_BY_RAW.items()}
    assert found.bytes_out == sum(ledger.bytes_out for ledger in ledgers)
    assert found.seconds == sum(ledger.seconds for ledger in ledgers)
    assert totals(SPEC, mds_dir) == StageTotals("mds", 1, 7, 6, {"no_caption": 1}, mds.bytes_out, mds.seconds)  # type: ignore[arg-type]


def test_ledgers_come_in_the_order_of_upstream(jdb: JourneyDb) -> None:
    for archive in ("valid/000", "train/001", "train/000"):
        jdb.raw(archive)
    archives = [ledger.archive for ledger in published_ledgers(SPEC, jdb.dir("raw"))]
    assert archives == ["train/000", "train/001", "valid/000"]


def test_what_is_not_whole_is_not_counted(jdb: JourneyDb) -> None:
    jdb.raw("train/000")
    jdb.raw("train/001")
    jdb.dir("raw").data("train/000").write_bytes(b"cut")
    (jdb.dir("raw").path / "train" / "002.tar").write_bytes(b"without a ledger")
    assert [ledger.archive for ledger in published_ledgers(SPEC, jdb.dir("raw"))] == ["train/001"]
    assert totals(SPEC, jdb.dir("raw")).archives == 1


def test_latents_of_each_pair_of_encoders(jdb: JourneyDb, publish_latents: Callable[..., Ledger]) -> None:
    for tag in ("sdxl1_dfnclipH14", "a_b"):
        publish_latents(jdb.root.latents("jdb", tag), "train/000")
    (jdb.root.path / "jdb" / "mds_latents_file").write_text("no directory")
    names = [stage_dir.path.name for stage_dir in stage_dirs(jdb.root, "jdb")]
    assert names == ["raw", "mds", "mds_latents_a_b", "mds_latents_sdxl1_dfnclipH14"]
    assert totals(SPEC, stage_dirs(jdb.root, "jdb")[2]).kept == 3


def test_nothing_published(jdb: JourneyDb) -> None:
    found = [totals(SPEC, stage_dir) for stage_dir in stage_dirs(DataRoot(jdb.root.path / "none"), "jdb")]
    assert found == [StageTotals("raw"), StageTotals("mds")]
