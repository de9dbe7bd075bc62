"""Segment-Anything-1B: links or the mirror, and captions that are found by number."""

from __future__ import annotations

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.source import HubFile, LinkedFile
from md_assets.core.spec import Caption, Member, Rejected, Sample
from md_assets.datasets.sa1b import SPEC, number_of

(CAPTIONS,) = SPEC.annotations


def test_archives_are_in_the_link_list_or_on_the_mirror() -> None:
    assert SPEC.locate("sa_000042") == LinkedFile(
        "sa_000042.tar", "MD_ASSETS_SA1B_LINKS", HubFile("Aber-r/SA-1B_backup", "*sa_000042.tar", "dataset")
    )


def test_the_small_subset_is_one_percent() -> None:
    assert SPEC.small == SPEC.archives[:10] and SPEC.small[-1] == "sa_000009"


def test_captions_are_a_tar_of_texts() -> None:
    assert CAPTIONS.file == HubFile("PixArt-alpha/SAM-LLaVA-Captions10M", "SA1B_caption.tar.gz")
    assert (CAPTIONS.format, CAPTIONS.columns, CAPTIONS.scored) == ("texts", ("name", "text"), False)


def test_images_are_samples_and_masks_are_none() -> None:
    members = [
        Member("sa_1.jpg", b"1"),
        Member("sa_1.json", b"{}"),
        Member("sa_2.jpg", b"", Reason.TOO_LARGE),
        Member("sa_3.json", b"", Reason.TOO_LARGE),
    ]
    assert list(SPEC.read_samples("sa_000042", iter(members))) == [
        Sample("sa_000042/sa_1", b"1"),
        Rejected("sa_000042/sa_2", "too_large"),
        Rejected("sa_000042/sa_3%2Ejson", "too_large"),
    ]


@pytest.mark.parametrize("name", ["sa_433759.txt", "captions/sa_433759.txt"])
def test_a_caption_is_stripped_and_does_not_tell_its_archive(name: str) -> None:
    caption = CAPTIONS.parse({"name": name, "text": "\n The image shows a street. \n"})
    assert caption == Caption("", "sa_433759", "The image shows a street.")


@pytest.mark.parametrize(("key", "number"), [("sa_1", 1), ("sa_000042/sa_11185362", 11185362)])
def test_keys_of_captions_and_of_samples_tell_the_number(key: str, number: int) -> None:
    assert number_of(key) == number


@pytest.mark.parametrize("name", ["readme.txt", "sa_.txt", "sa_x.txt", "sa_1.json", "sa_-1.txt", "sa_²", "1.txt", ""])
def test_a_text_that_is_no_caption_is_an_error_of_that_row(name: str) -> None:
    with pytest.raises(ValueError, match="is not sa_N"):
        CAPTIONS.parse({"name": name, "text": "x"})
