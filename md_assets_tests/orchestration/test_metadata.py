"""A ledger as people see it in the UI."""

from md_assets.orchestration.metadata import KEYS_SHOWN, archive_metadata, rejects_table
from md_assets_tests.orchestration.conftest import Platform


def test_rejects_are_listed_most_frequent_first_with_some_keys() -> None:
    table = rejects_table({"too_small": ["a"], "no_caption": [f"k{i}" for i in range(1200)]}).splitlines()

    assert table[0] == "| reason | samples | keys |"
    assert table[2].startswith("| no_caption | 1,200 | `k0`, `k1`") and f"and {1200 - KEYS_SHOWN:,} more" in table[2]
    assert table[3] == "| too_small | 1 | `a` |"


def test_every_stage_has_a_picture_and_the_numbers_of_its_ledger(platform: Platform) -> None:
    platform.up_to("latents", "train/000")

    for stage in ("raw", "mds", "latents"):
        ledger = platform.ledger(stage, "train/000")
        assert ledger is not None
        metadata = archive_metadata(platform.dir(stage), ledger, passed_over=False)
        assert metadata["read"] == ledger.read
        assert metadata["kept"] == metadata["dagster/row_count"] == ledger.kept
        assert metadata["rejected"] == ledger.read - ledger.kept
        assert ("rejected_by_reason" in metadata) == bool(ledger.rejected)
        assert metadata["contact_sheet"].md_str.startswith("![samples of train/000](data:image/jpeg;base64,")
        assert len(metadata["contact_sheet"].md_str) < 16_000
        bare = archive_metadata(platform.dir(stage), ledger, passed_over=False, pictures=False)
        assert metadata.keys() - bare.keys() == {"contact_sheet"}
        assert metadata["fingerprint"].text == ledger.fingerprint
        assert metadata["ledger"].path == str(platform.dir(stage).ledger("train/000"))


def test_a_picture_that_cannot_be_made_is_left_out(platform: Platform) -> None:
    assert platform.run("jdb/raw", "train/000").success
    ledger = platform.ledger("raw", "train/000")
    assert ledger is not None
    platform.dir("raw").data("train/000").unlink()

    assert "contact_sheet" not in archive_metadata(platform.dir("raw"), ledger, passed_over=False)
