"""TextCaps: two splits of parquet files with one merged index, the first of several captions."""

from __future__ import annotations

from typing import Any

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.source import HubFile
from md_assets.core.spec import Member, ParquetLayout, Rejected, Sample
from md_assets.datasets.textcaps import SPEC


def test_archives_are_the_parquet_files_of_both_splits() -> None:
    train = tuple(f"train/{number:05}" for number in range(13))
    assert SPEC.archives == SPEC.small == (*train, "val/00000", "val/00001")


def test_both_splits_have_one_merged_index() -> None:
    """Training configs of the reference name `textcaps/mds_latents_…/`, where it put train and validation together."""
    assert SPEC.splits == () and {SPEC.split_of(archive) for archive in SPEC.archives} == {""}


@pytest.mark.parametrize(
    ("archive", "path"),
    [
        ("train/00000", "data/train-00000-of-00013*.parquet"),
        ("train/00012", "data/train-00012-of-00013*.parquet"),
        ("val/00001", "data/val-00001-of-00002*.parquet"),
    ],
)
def test_the_files_names_may_go_on_before_their_suffix(archive: str, path: str) -> None:
    assert SPEC.locate(archive) == HubFile("lmms-lab/TextCaps", path, "dataset")


def test_samples_lie_in_the_columns_that_upstream_has() -> None:
    assert SPEC.parquet == ParquetLayout("image", "image_id", ("reference_strs",))


def sample_with(captions: Any) -> Sample | Rejected:
    fields = {"reference_strs": captions}
    (sample,) = SPEC.read_samples("val/00001", iter([Member("0a1b", b"1", fields=fields)]))
    return sample


def test_the_first_caption_counts() -> None:
    assert sample_with(["A sign says STOP.", "Stop sign."]) == Sample("val/00001/0a1b", b"1", "A sign says STOP.")


@pytest.mark.parametrize("captions", [None, [], [None, "second"], [5]])
def test_a_row_without_a_first_caption_has_none(captions: Any) -> None:
    assert sample_with(captions) == Sample("val/00001/0a1b", b"1", None)


def test_an_empty_first_caption_is_not_replaced_by_the_second() -> None:
    assert sample_with(["", "second"]) == Sample("val/00001/0a1b", b"1", "")


def test_a_refused_row_is_rejected() -> None:
    members = [Member("0a1b", b"", Reason.TOO_LARGE)]
    assert list(SPEC.read_samples("train/00000", iter(members))) == [Rejected("train/00000/0a1b", "too_large")]
