"""Errors: one line each, with their remedy, and whole after a trip between processes."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md_assets.core.errors import (
    ArchiveError,
    CorruptArchiveError,
    MdAssetsError,
    SettingsError,
    SourceError,
    one_line,
)

EVERY_ERROR = [
    MdAssetsError("the disk is full", "Free some."),
    ArchiveError("jdb", "train/000", "cut off at byte 3", "Fetch it again.", reason="truncated", transient=True),
    SourceError("JourneyDB is gated", "Accept its terms.", reason="gated", transient=False, retry_after_s=2.5),
    CorruptArchiveError("an HTML page", "Log in.", reason="not_an_archive"),
    SettingsError("jpeg_quality 0 is out of range", "Choose 1 to 100."),
]


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_out_of_a_worker_process(error: MdAssetsError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda error: type(error).__name__)
def test_every_error_can_be_caught_as_one_kind(error: MdAssetsError) -> None:
    with pytest.raises(MdAssetsError) as caught:
        raise error
    assert caught.value.remedy


def test_message_is_what_happened_then_the_remedy() -> None:
    assert str(MdAssetsError("the disk is full", "Free some.")) == "the disk is full. Free some"
    assert str(MdAssetsError("the disk is full.")) == "the disk is full"


def test_an_archive_error_names_dataset_and_archive() -> None:
    error = ArchiveError("jdb", "train/000", "cut off", "Fetch it again.", reason="truncated")
    assert str(error) == "jdb train/000: cut off. Fetch it again"
    assert (error.dataset, error.archive, error.reason, error.transient) == ("jdb", "train/000", "truncated", False)


@given(st.text(), st.text())
def test_no_text_breaks_the_line(what: str, remedy: str) -> None:
    message = str(MdAssetsError(what, remedy))
    assert len(message.splitlines()) <= 1
    assert message.isprintable()


@given(st.text() | st.text(st.sampled_from(". \n\\a")))
def test_one_line_may_be_applied_twice(text: str) -> None:
    """Errors are wrapped in errors; a backslash or an escape must not grow on the way."""
    assert one_line(one_line(text)) == one_line(text)


def test_control_characters_of_member_names_are_visible() -> None:
    assert one_line("a\x1b[31mb\x00c\u202ed") == r"a\x1b[31mb\x00c\u202ed"
    assert one_line("undecodable \udcff byte") == r"undecodable \udcff byte"
    assert one_line("grün 猫 é") == "grün 猫 é"
