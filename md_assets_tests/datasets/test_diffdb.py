"""DiffusionDB: two folders of zips, and scores of which the worse one counts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.source import HubFile
from md_assets.core.spec import Caption, Member, Rejected, Sample
from md_assets.datasets.diffdb import SPEC

UUID = "0a1b2c3d-1111-2222-3333-444455556666"
ROW = {"image_name": f"{UUID}.webp", "prompt": "a cat", "part_id": 7, "image_nsfw": 0.125, "prompt_nsfw": 0.0625}


def parse(**changes: Any) -> Caption:
    return SPEC.annotations[0].parse({**ROW, **changes})


@pytest.mark.parametrize(
    ("archive", "path"),
    [
        ("part-000001", "diffusiondb-large-part-1/part-000001.zip"),
        ("part-010000", "diffusiondb-large-part-1/part-010000.zip"),
        ("part-010001", "diffusiondb-large-part-2/part-010001.zip"),
        ("part-014000", "diffusiondb-large-part-2/part-014000.zip"),
    ],
)
def test_archives_lie_in_two_folders(archive: str, path: str) -> None:
    assert SPEC.locate(archive) == HubFile("poloclub/diffusiondb", path, "dataset")


def test_the_small_subset_is_the_references() -> None:
    assert SPEC.small == SPEC.archives[:140] and SPEC.small[-1] == "part-000140"


def test_captions_and_scores_come_from_the_large_metadata_table() -> None:
    (source,) = SPEC.annotations
    assert source.file == HubFile("poloclub/diffusiondb", "metadata-large.parquet")
    assert (source.format, source.scored, SPEC.scored) == ("parquet", True, True)
    assert set(source.columns) == set(ROW)


def test_images_are_samples_and_the_archives_own_json_is_none() -> None:
    members = [
        Member(f"{UUID}.webp", b"1"),
        Member("part-000007.json", b"{}"),
        Member("big.webp", b"", Reason.TOO_LARGE),
        Member("link.json", b"", Reason.UNSAFE_MEMBER),
        Member("x.PNG", b"2"),
    ]
    assert list(SPEC.read_samples("part-000007", iter(members))) == [
        Sample(f"part-000007/{UUID}", b"1"),
        Rejected("part-000007/big", "too_large"),
        Rejected("part-000007/link%2Ejson", "unsafe_member"),
        Sample("part-000007/x", b"2"),
    ]


def test_an_image_and_its_row_have_the_same_key() -> None:
    (sample,) = SPEC.read_samples("part-000007", iter([Member(f"{UUID}.webp", b"1")]))
    assert parse() == Caption("part-000007", sample.key, "a cat", 0.125)


@pytest.mark.parametrize(
    ("image", "prompt", "worst"),
    [(0.5, 0.25, 0.5), (0.25, 0.5, 0.5), (2.0, 0.0, 2.0), (0, 1, 1.0)],
)
def test_the_worse_score_counts(image: float, prompt: float, worst: float) -> None:
    assert parse(image_nsfw=image, prompt_nsfw=prompt).unsafe == worst


@pytest.mark.parametrize("absent", [None, math.nan])
@pytest.mark.parametrize("column", ["image_nsfw", "prompt_nsfw"])
def test_a_missing_score_is_worse_than_any(column: str, absent: float | None) -> None:
    unsafe = parse(**{column: absent}).unsafe
    assert unsafe is not None and math.isnan(unsafe)


@pytest.mark.parametrize(
    "changes",
    [
        {"image_name": None},
        {"image_name": "../x.webp"},
        {"image_name": ""},
        {"part_id": None},
        {"part_id": "7"},
        {"part_id": 7.0},
        {"image_nsfw": "bad"},
        {"prompt_nsfw": []},
    ],
)
def test_a_broken_row_is_an_error_of_that_row(changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        parse(**changes)
