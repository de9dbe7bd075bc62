"""The ledger: its balance, its identity, and a JSON form that gives back what was written."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import Ledger, LedgerNumbers, OutputFile, Pruned, Reason

COUNTS = st.integers(0, 2**53)
TEXTS = st.dictionaries(st.text(), st.text(), max_size=3)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)
LEDGERS = st.builds(
    Ledger,
    dataset=st.text(),
    archive=st.text(),
    stage=st.sampled_from(["raw", "mds", "latents", "annotations"]),
    read=COUNTS,
    kept=COUNTS,
    rejected=st.dictionaries(st.text(), st.lists(st.text(), max_size=3), max_size=3),
    bytes_in=COUNTS,
    bytes_out=COUNTS,
    seconds=st.floats(0, 1e9),
    source=TEXTS,
    inputs=TEXTS,
    settings=st.dictionaries(st.text(), JSON_VALUES, max_size=3),
    versions=TEXTS,
    files=st.lists(st.builds(OutputFile, st.text(), COUNTS, st.text("0123456789abcdef")), max_size=3).map(tuple),
    details=st.dictionaries(st.text(), JSON_VALUES, max_size=3),
)


def make(**changes: Any) -> Ledger:
    """A small raw ledger that balances."""
    fields: dict[str, Any] = {
        "dataset": "jdb",
        "archive": "train/000",
        "stage": "raw",
        "read": 5,
        "kept": 3,
        "rejected": {Reason.TOO_SMALL: ["b"], Reason.UNDECODABLE: ["d"]},
        "bytes_in": 100,
        "bytes_out": 60,
        "seconds": 1.5,
        "source": {"name": "x", "content_id": "c", "revision": "r"},
        "inputs": {"archive": "c"},
        "settings": {"format_version": 1, "images": {"min_image_size": 256}},
        "versions": {"pillow": "12"},
        "files": (OutputFile("train/000.tar", 60, "ab"),),
    }
    return Ledger(**(fields | changes))


@given(LEDGERS)
def test_reading_back_gives_an_equal_ledger(ledger: Ledger) -> None:
    back = Ledger.from_json(ledger.to_json(), "a.json")
    assert back == ledger
    assert back.to_json() == ledger.to_json()


@given(LEDGERS)
def test_json_is_plain_ascii_that_any_reader_takes(ledger: Ledger) -> None:
    text = ledger.to_json()
    assert text.isascii()
    body = json.loads(text)
    assert body["read"] == ledger.read
    assert body["fingerprint"] == ledger.fingerprint
    assert body["content_id"] == ledger.content_id


def test_balance() -> None:
    assert make().rejected_count == 2
    assert make().balances
    assert not make(kept=4).balances
    assert not make(read=6).balances
    assert not make(rejected={Reason.TOO_SMALL: ["b"]}).balances
    assert make(read=0, kept=0, rejected={}).balances


@pytest.mark.parametrize(
    "changes",
    [
        {"files": (OutputFile("train/000.tar", 60, "cd"),)},
        {"files": (OutputFile("train/000.tar", 61, "ab"),)},
        {"files": (OutputFile("train/001.tar", 60, "ab"),)},
        {"rejected": {Reason.TOO_SMALL: ["b"], Reason.UNDECODABLE: ["e"]}},
        {"rejected": {Reason.TOO_SMALL: ["b", "d"]}},
    ],
)
def test_content_id_changes_with_what_the_next_stage_reads(changes: dict[str, Any]) -> None:
    assert make(**changes).content_id != make().content_id


def test_content_id_does_not_tell_when_or_how_fast() -> None:
    again = make(seconds=9.0, versions={"pillow": "13"}, details={"note": 1}, source={"name": "mirror"})
    assert again.content_id == make().content_id


def test_order_of_rejected_keys_is_content() -> None:
    """They are in archive order; another order means that the archive was read otherwise."""
    one, other = make(rejected={"x": ["a", "b"]}), make(rejected={"x": ["b", "a"]})
    assert one.content_id != other.content_id


def test_current_means_same_settings_and_same_inputs() -> None:
    ledger = make()
    assert ledger.is_current({"images": {"min_image_size": 256}, "format_version": 1}, {"archive": "c"})
    assert not ledger.is_current({"images": {"min_image_size": 255}, "format_version": 1}, {"archive": "c"})
    assert not ledger.is_current(ledger.settings, {"archive": "other"})
    assert not ledger.is_current(ledger.settings, {"archive": "c", "annotations": "new"})
    assert ledger.is_current(ledger.settings, {"archive": ""})  # the source does not tell
    assert not ledger.is_current({"format_version": 1}, {"archive": ""})
    assert not ledger.is_current(ledger.settings, {"archive": "", "annotations": ""})
    assert not ledger.is_current(ledger.settings, {})


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", "{}", '{"fingerprint": "a", "content_id": "b"}', make().to_json()[:-20]],
)
def test_a_text_that_is_no_ledger_is_named(text: str) -> None:
    with pytest.raises(MdAssetsError, match=r"^raw/000\.json is no ledger.*Delete it"):
        Ledger.from_json(text, "raw/000.json")


@pytest.mark.parametrize("field", ["extra", "read"])
def test_fields_must_be_exactly_a_ledgers(field: str) -> None:
    body = json.loads(make().to_json())
    body.pop(field, None) or body.update({field: 1})
    with pytest.raises(MdAssetsError, match="no ledger"):
        Ledger.from_json(json.dumps(body), "a.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("settings", {"format_version": 2}),
        ("rejected", {}),
        ("files", []),
        ("files", [{"path": "train/000.tar", "bytes": 60, "sha256": "other"}]),
        ("fingerprint", "0" * 16),
        ("content_id", "0" * 64),
    ],
)
def test_an_edited_ledger_is_refused(field: str, value: Any) -> None:
    body = json.loads(make().to_json()) | {field: value}
    with pytest.raises(MdAssetsError, match=r"a\.json was edited"):
        Ledger.from_json(json.dumps(body), "a.json")


def test_a_ledger_cannot_be_changed_in_passing() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().kept = 4  # type: ignore[misc]


def test_reasons_are_distinct_words_for_tables() -> None:
    words = [value for name, value in vars(Reason).items() if name.isupper()]
    assert len(set(words)) == len(words)
    assert all(word == name.lower() for name, word in vars(Reason).items() if name.isupper())


def test_a_pruned_ledger_has_the_same_content_and_settings() -> None:
    pruned = make(pruned=Pruned("2026-11-22T10:00:00+00:00", 60))
    assert pruned.content_id == make().content_id and pruned.fingerprint == make().fingerprint
    assert pruned.is_current(make().settings, make().inputs)
    assert Ledger.from_json(pruned.to_json(), "a.json") == pruned


def test_a_ledger_of_before_there_was_pruning_is_read() -> None:
    body = json.loads(make().to_json())
    assert body.pop("pruned") is None
    assert Ledger.from_json(json.dumps(body), "a.json") == make()


@given(LEDGERS)
def test_numbers_are_those_of_the_ledger(ledger: Ledger) -> None:
    numbers = LedgerNumbers.from_json(ledger.to_json(), "a.json")
    for name in ("archive", "fingerprint", "content_id", "read", "kept", "bytes_out", "seconds", "inputs"):
        assert getattr(numbers, name) == getattr(ledger, name)
    assert (numbers.settings, numbers.details) == (ledger.settings, ledger.details)
    assert sum(numbers.rejected.values()) == ledger.rejected_count and numbers.rejected.keys() == ledger.rejected.keys()
    assert numbers.files == {file.path: file.bytes for file in ledger.files}
    assert numbers.pruned is ledger.pruned is None


def test_numbers_know_of_pruning() -> None:
    pruned = Pruned("2026-11-22T10:00:00+00:00", 60)
    assert LedgerNumbers.from_json(make(pruned=pruned).to_json(), "a.json").pruned == pruned


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"pruned": 3}', make().to_json()[:-20]])
def test_numbers_of_what_is_no_ledger_are_refused(text: str) -> None:
    with pytest.raises(MdAssetsError, match=r"^raw/000\.json is no ledger.*Delete it"):
        LedgerNumbers.from_json(text, "raw/000.json")
