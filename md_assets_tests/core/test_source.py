"""Descriptions of remote files: values that travel to worker processes and serve as keys."""

import dataclasses
import hashlib
import pickle
from typing import get_args, get_type_hints

import pytest

from md_assets.core.source import Checksum, HubFile, RemoteFile

REMOTE = RemoteFile(
    name="JourneyDB/JourneyDB:data/train/imgs/000.tgz",
    url="http://127.0.0.1/000.tgz",
    size_bytes=3,
    checksum=Checksum("sha256", "ab"),
    content_id="ab",
    revision="c",
)


@pytest.mark.parametrize("value", [REMOTE, REMOTE.checksum, HubFile("a/b", "c.tgz")], ids=lambda v: type(v).__name__)
def test_a_description_is_the_same_key_after_a_trip_to_another_process(value: object) -> None:
    back = pickle.loads(pickle.dumps(value))
    assert {value: "found"}[back] == "found"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RemoteFile)])
def test_a_description_cannot_be_changed_once_it_was_compared(field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(REMOTE, field, None)


def test_every_algorithm_is_one_that_hashlib_knows() -> None:
    algorithms = get_args(get_type_hints(Checksum)["algorithm"])
    assert set(algorithms) <= hashlib.algorithms_guaranteed


def test_a_file_is_a_datasets_unless_it_says_otherwise() -> None:
    assert HubFile("a/b", "c.tgz") == HubFile("a/b", "c.tgz", "dataset")
    assert HubFile("a/b", "c.tgz") != HubFile("a/b", "c.tgz", "model")
