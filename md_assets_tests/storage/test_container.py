"""How a file that is no usable archive is told."""

import pytest

from md_assets.core.errors import CorruptArchiveError
from md_assets.storage.container import REFETCH, Broken, broken_as_corrupt, is_web_page


def test_what_is_broken_becomes_one_sentence_with_its_remedy() -> None:
    with pytest.raises(CorruptArchiveError) as caught, broken_as_corrupt("000.zip", "zip"):
        raise Broken("truncated", "it is\ncut off")
    assert str(caught.value) == f"000.zip is no usable zip: it is cut off. {REFETCH}"
    assert caught.value.reason == "truncated"


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(KeyError), broken_as_corrupt("000.zip", "zip"):
        raise KeyError


@pytest.mark.parametrize(
    ("start", "page"),
    [(b"<!DOCTYPE html>", True), (b"\r\n\t <html>", True), (b"\x1f\x8b<", False), (b"", False), (b"PK", False)],
)
def test_a_web_page_is_known_by_its_first_character(start: bytes, page: bool) -> None:
    assert is_web_page(start) == page
