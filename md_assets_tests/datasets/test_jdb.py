"""JourneyDB: upstream's paths to the letter, and keys on which images and captions agree."""

from __future__ import annotations

from typing import Any

import pytest

from md_assets.core.ledger import Reason
from md_assets.core.names import safe_name
from md_assets.core.source import HubFile
from md_assets.core.spec import Caption, Member, Rejected, Sample
from md_assets.datasets.jdb import REPO, SPEC

UUID = "0a1b2c3d-1111-2222-3333-444455556666"


def test_archives_are_those_of_the_contract() -> None:
    assert (SPEC.slug, SPEC.splits, SPEC.archive_format) == ("jdb", ("train", "valid"), "tar")
    assert SPEC.archives == tuple(f"{split}/{n:03}" for split in ("train", "valid") for n in range(200))
    assert SPEC.archives[0] == "train/000" and SPEC.archives[-1] == "valid/199"
    assert SPEC.small == ("train/000", "train/001", "valid/000", "valid/001")


@pytest.mark.parametrize(
    ("archive", "path"),
    [
        ("train/000", "data/train/imgs/000.tgz"),
        ("train/199", "data/train/imgs/199.tgz"),
        ("valid/007", "data/valid/imgs/007.tgz"),
    ],
)
def test_archives_lie_where_upstream_has_them(archive: str, path: str) -> None:
    assert SPEC.locate(archive) == HubFile("JourneyDB/JourneyDB", path, "dataset")


def test_captions_come_from_the_repath_files() -> None:
    """`realease` is upstream's spelling; the plain `train_anno.jsonl` does not match the archives' paths."""
    assert {source.name: source.file for source in SPEC.annotations} == {
        "train": HubFile(REPO, "data/train/train_anno_realease_repath.jsonl.tgz"),
        "valid": HubFile(REPO, "data/valid/valid_anno_repath.jsonl.tgz"),
    }
    assert all(source.columns == ("img_path", "prompt") for source in SPEC.annotations)


def parse(split: str, **row: Any) -> Caption:
    source = SPEC.annotation_of(f"{split}/000")
    assert source is not None
    return source.parse(row)


def sample_of(archive: str, name: str) -> Sample | Rejected:
    """The sample of a member that the tgz calls `name`."""
    safe = safe_name(name)
    assert safe is not None
    (sample,) = SPEC.read_samples(archive, iter([Member(safe, b"1")]))
    return sample


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize(
    "path",
    [
        f"./012/{UUID}.jpg",
        f"012/{UUID}.jpg",
        f".//012/./{UUID}.JPG",
        "./012/a.b.png",
        "./012/grün 猫%.jpg",
        "./012/line\nend.jpg",
        "./012/deep/er.jpg",
        "./012/no_suffix",
        "./012/012/x.jpg",
    ],
)
def test_an_image_and_its_caption_have_the_same_key(split: str, path: str) -> None:
    caption = parse(split, img_path=path, prompt="a prompt --ar 3:2", other=[1])
    assert (caption.archive, caption.text) == (f"{split}/012", "a prompt --ar 3:2")
    assert sample_of(f"{split}/012", path).key == caption.key


def test_keys_tell_split_archive_and_name() -> None:
    assert parse("train", img_path=f"./012/{UUID}.jpg", prompt="").key == f"train/012/{UUID}"


def test_every_file_is_a_sample_and_what_is_refused_is_rejected() -> None:
    members = [
        Member("000/a.jpg", b"1"),
        Member("000/b.jpg", b"", Reason.TOO_LARGE),
        Member("%2E%2E/c.jpg", b"", Reason.UNSAFE_MEMBER),
        Member("000/notes.txt", b"2"),
    ]
    assert list(SPEC.read_samples("train/000", iter(members))) == [
        Sample("train/000/a", b"1"),
        Rejected("train/000/b", "too_large"),
        Rejected("train/000/%2E%2E/c", "unsafe_member"),
        Sample("train/000/notes%2Etxt", b"2"),
    ]


def test_a_refused_member_does_not_take_the_key_of_a_good_one() -> None:
    refused = Rejected("train/000/%2F000/a", Reason.UNSAFE_MEMBER)
    members = [Member("%2F000/a.jpg", b"", Reason.UNSAFE_MEMBER), Member("000/a.jpg", b"1")]
    assert list(SPEC.read_samples("train/000", iter(members))) == [refused, Sample("train/000/a", b"1")]


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"img_path": "./000/a.jpg"},
        {"prompt": "x"},
        {"img_path": "a.jpg", "prompt": "x"},
        {"img_path": "../000/a.jpg", "prompt": "x"},
        {"img_path": "/000/a.jpg", "prompt": "x"},
        {"img_path": "", "prompt": "x"},
        {"img_path": "./000/\ud800.jpg", "prompt": "x"},
        {"img_path": None, "prompt": "x"},
        {"img_path": 5, "prompt": "x"},
        {"img_path": ["./000/a.jpg"], "prompt": "x"},
    ],
)
def test_a_broken_row_is_an_error_of_that_row(row: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        parse("train", **row)


def test_the_test_split_is_only_fetched() -> None:
    assert {extra.name: (extra.file, extra.images) for extra in SPEC.raw_only} == {
        "test/test_questions": (HubFile(REPO, "data/test/test_questions.jsonl.tgz"), False),
        "test/imgs": (HubFile(REPO, "data/test/imgs.tgz"), True),
    }


def test_images_of_the_test_split_are_read_like_any_others() -> None:
    assert sample_of("test/imgs", f"./imgs/{UUID}.png") == Sample(f"test/imgs/{UUID}", b"1")
