"""A dataset's spec: which split and which captions an archive has."""

import dataclasses
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from md_assets.core.source import HubFile
from md_assets.core.spec import AnnotationSource, Caption, DatasetSpec, Member, RawOnly, Rejected, Sample


def locate(archive: str) -> HubFile:
    return HubFile("org/name", f"{archive}.tgz")


def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Sample | Rejected]:
    for member in members:
        yield Rejected(member.name, member.refused) if member.refused else Sample(member.name, member.data)


def parse(row: Mapping[str, Any]) -> Caption:
    return Caption(row["archive"], row["key"], row["text"])


TRAIN = AnnotationSource("train", HubFile("org/name", "train.jsonl.tgz"), ("text",), parse)
VALID = AnnotationSource("valid", HubFile("org/name", "valid.jsonl.tgz"), ("text",), parse)
SPLIT = DatasetSpec(
    slug="jdb",
    title="JourneyDB",
    datasheet="",
    archives=("train/000", "train/001", "valid/000"),
    archive_format="tar",
    locate=locate,
    read_samples=read_samples,
    annotations=(TRAIN, VALID),
    splits=("train", "valid"),
    small=("train/000",),
)
WHOLE = dataclasses.replace(SPLIT, archives=("sa_000000", "odd/name"), splits=(), annotations=(TRAIN,), small=())


@pytest.mark.parametrize(("archive", "split"), [("train/000", "train"), ("valid/000", "valid")])
def test_an_archives_split_is_the_front_of_its_id(archive: str, split: str) -> None:
    assert SPLIT.split_of(archive) == split


@pytest.mark.parametrize("archive", WHOLE.archives)
def test_without_splits_every_archive_is_in_the_nameless_one(archive: str) -> None:
    assert WHOLE.split_of(archive) == ""


def test_captions_come_from_the_archives_own_split() -> None:
    assert SPLIT.annotation_of("train/001") is TRAIN
    assert SPLIT.annotation_of("valid/000") is VALID


def test_a_split_without_captions_has_none_and_not_anothers() -> None:
    assert dataclasses.replace(SPLIT, annotations=(TRAIN,)).annotation_of("valid/000") is None


def test_one_file_of_captions_covers_a_dataset_without_splits() -> None:
    assert WHOLE.annotation_of("sa_000000") is TRAIN
    assert dataclasses.replace(WHOLE, annotations=()).annotation_of("sa_000000") is None


def test_what_passes_between_processes_comes_out_equal() -> None:
    values = [Member("a", b"1"), Member("b", b"", "unsafe_member"), Sample("k", b"1", "c"), Rejected("k", "too_small")]
    assert pickle.loads(pickle.dumps(values)) == values


def test_a_reader_sees_members_in_order_and_only_what_it_is_given() -> None:
    members = [Member("a", b"1"), Member("../x", b"", "unsafe_member"), Member("b", b"2")]
    samples = list(SPLIT.read_samples("train/000", iter(members)))
    assert samples == [Sample("a", b"1"), Rejected("../x", "unsafe_member"), Sample("b", b"2")]


def test_what_is_only_fetched_is_one_asset_for_each_folder() -> None:
    names = ("test/imgs", "test/questions", "extra")
    assets = [RawOnly(name, HubFile("o/n", "x"), "", images=True).asset for name in names]
    assert assets == ["raw_test", "raw_test", "raw_extra"]
