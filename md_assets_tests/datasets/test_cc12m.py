"""Conceptual Captions 12M: files of one name belong together, as WebDataset reads them."""

from __future__ import annotations

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.source import HubFile
from md_assets.core.spec import Member, OrphanCaption, Rejected, Sample, Subset
from md_assets.datasets.cc12m import SPEC

ARCHIVE = "cc12m-train-0042"


def read(*members: tuple[str, bytes] | Member) -> list[Sample | Rejected | OrphanCaption]:
    """What an archive with these members holds, keys without the archive."""
    found = SPEC.read_samples(ARCHIVE, (m if isinstance(m, Member) else Member(*m) for m in members))
    samples = list(found)
    assert all(sample.key.startswith(f"{ARCHIVE}/") for sample in samples)
    return [type(s)(**{**vars(s), "key": s.key.removeprefix(f"{ARCHIVE}/")}) for s in samples]


def test_archives_lie_where_upstream_has_them() -> None:
    assert SPEC.locate("cc12m-train-0000") == HubFile("pixparse/cc12m-wds", "cc12m-train-0000.tar", "dataset")


def test_small_cleaning_and_the_subset_are_the_references() -> None:
    assert SPEC.small == SPEC.archives[:23] and SPEC.small[-1] == "cc12m-train-0022"
    assert (SPEC.caption_cleaning, SPEC.subsets) == ("deepfloyd", (Subset("minres512", 512),))
    assert SPEC.annotations == ()


def test_image_and_text_of_one_name_are_a_sample_in_whatever_order() -> None:
    members = [("1.jpg", b"A"), ("1.json", b"{}"), ("1.txt", b"one"), ("2.txt", b"two"), ("2.png", b"B")]
    assert read(*members) == [Sample("1", b"A", "one"), Sample("2", b"B", "two")]


def test_an_image_without_text_has_no_caption() -> None:
    assert read(("1.jpg", b"A"), ("1.json", b"{}")) == [Sample("1", b"A", None)]


def test_a_text_without_image_is_an_orphan_and_a_json_alone_is_nothing() -> None:
    assert read(("1.txt", b"one"), ("2.json", b"{}"), ("3.jpg", b"C")) == [OrphanCaption("1"), Sample("3", b"C")]


def test_only_consecutive_files_belong_together() -> None:
    members = [("1.jpg", b"A"), ("2.jpg", b"B"), ("1.txt", b"late")]
    assert read(*members) == [Sample("1", b"A"), Sample("2", b"B"), OrphanCaption("1")]


def test_a_second_image_of_a_name_has_the_key_of_the_first() -> None:
    """raw keeps the first and rejects the other as a duplicate."""
    assert read(("1.jpg", b"A"), ("1.png", b"B"), ("1.txt", b"x")) == [Sample("1", b"A", "x"), Sample("1", b"B", "x")]


@pytest.mark.parametrize("name", ["1.JPG", "1.webp", "1.jfif", "1.cls", "1"])
def test_what_is_no_text_is_an_image_whatever_it_calls_itself(name: str) -> None:
    assert read((name, b"A"), ("1.TXT", b"x")) == [Sample("1", b"A", "x")]


@pytest.mark.parametrize(
    ("image", "text", "key"),
    [("a.b.jpg", "a.txt", "a"), ("deep.er/a.jpg", "deep.er/a.txt", "deep%2Eer/a"), ("x/a", "x/a.txt", "x/a")],
)
def test_a_name_ends_at_the_first_dot_of_its_last_part(image: str, text: str, key: str) -> None:
    assert read((image, b"A"), (text, b"x")) == [Sample(key, b"A", "x")]


def test_a_name_that_begins_with_a_dot_is_whole() -> None:
    assert read((".a.jpg", b"A"), (".b.jpg", b"B")) == [Sample("%2Ea", b"A"), Sample("%2Eb", b"B")]


def test_text_that_is_not_utf8_is_kept_with_replacements() -> None:
    assert read(("1.jpg", b"A"), ("1.txt", b"gr\xfcn \xe7\x8c\xab\n")) == [Sample("1", b"A", "gr\ufffdn 猫\n")]


def test_what_is_refused_is_rejected_and_the_rest_of_its_name_stays() -> None:
    refused_text = Member("1.txt", b"", Reason.TOO_LARGE)
    refused_image = Member("2.jpg", b"", Reason.UNSAFE_MEMBER)
    assert read(("1.jpg", b"A"), refused_text, refused_image, ("2.txt", b"two")) == [
        Rejected("1%2Etxt", "too_large"),
        Sample("1", b"A", None),
        Rejected("2", "unsafe_member"),
    ]


def test_members_are_held_one_sample_at_a_time() -> None:
    taken = 0

    def members():
        nonlocal taken
        for number in range(100):
            taken += 1
            yield Member(f"{number}.jpg", b"A")

    samples = SPEC.read_samples(ARCHIVE, members())
    next(samples)
    assert taken == 2
