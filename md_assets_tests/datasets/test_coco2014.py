"""MS-COCO 2014: two zips of a web server, several captions for each image."""

from __future__ import annotations

from typing import Any

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.source import Checksum, WebFile
from md_assets.core.spec import Caption, Member, Rejected, Sample
from md_assets.datasets.coco2014 import SPEC

(CAPTIONS,) = SPEC.annotations
NAME = "COCO_val2014_000000000042"


def test_images_are_the_official_zip_with_its_md5() -> None:
    assert SPEC.locate("val2014") == WebFile(
        "zips/val2014.zip",
        "MD_ASSETS_COCO_URL",
        "http://images.cocodataset.org",
        Checksum("md5", "a3d79f5ed8d289b7a7554ce06a5782b3"),
    )


def test_captions_are_one_file_of_the_annotations_zip() -> None:
    assert CAPTIONS.file == WebFile(
        "annotations/annotations_trainval2014.zip",
        "MD_ASSETS_COCO_URL",
        "http://images.cocodataset.org",
        Checksum("md5", "0a379cfc70b0e71301e0f377548639bd"),
    )
    assert (CAPTIONS.format, CAPTIONS.member) == ("coco_captions", "annotations/captions_val2014.json")
    assert CAPTIONS.first_of_several and not CAPTIONS.scored


def test_an_image_and_its_caption_have_the_same_key() -> None:
    (sample,) = SPEC.read_samples("val2014", iter([Member(f"val2014/{NAME}.jpg", b"1")]))
    caption = CAPTIONS.parse({"file_name": f"{NAME}.jpg", "caption": "A dog.\n"})
    assert caption == Caption("val2014", sample.key, "A dog.\n")
    assert sample.key == f"val2014/{NAME}"


def test_every_file_is_a_sample_and_what_is_refused_is_rejected() -> None:
    members = [Member("val2014/a.jpg", b"1"), Member("val2014/b.jpg", b"", Reason.UNSAFE_MEMBER)]
    assert list(SPEC.read_samples("val2014", iter(members))) == [
        Sample("val2014/a", b"1"),
        Rejected("val2014/b", "unsafe_member"),
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"caption": "x"},
        {"file_name": "a.jpg"},
        {"file_name": None, "caption": "x"},
        {"file_name": "..", "caption": "x"},
    ],
)
def test_a_broken_row_is_an_error_of_that_row(row: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        CAPTIONS.parse(row)
