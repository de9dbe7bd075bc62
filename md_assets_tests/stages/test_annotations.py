"""The annotations stage: every row of a file of captions is in its index or in its ledger."""

import json
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.progress import Progress
from md_assets.datasets.jdb import ANNOTATION_FILES
from md_assets.demo.journeydb import miniature_archive
from md_assets.stages.annotations import as_unicode
from md_assets.storage import annotation_rows
from md_assets.storage.captions import read_captions
from md_assets_tests.stages.conftest import SAMPLES, SIZE_PX, JourneyDb


def row(name: str = "a", prompt: Any = "a prompt", folder: str = "000", **more: Any) -> bytes:
    return json.dumps({"img_path": f"./{folder}/{name}.jpg", "prompt": prompt, **more}).encode()


def captions(jdb: JourneyDb, archive: str = "train/000") -> Mapping[str, str]:
    """One archive's captions by the image's name."""
    index = read_captions(jdb.dir("annotations").data(archive.partition("/")[0]), archive)
    return {key.removeprefix(f"{archive}/"): caption.text for key, caption in index.items()}


def failure(jdb: JourneyDb) -> ArchiveError:
    with pytest.raises(ArchiveError) as caught:
        jdb.annotations()
    assert str(caught.value).startswith("jdb train: ") and "\n" not in str(caught.value) and caught.value.remedy
    return caught.value


def test_rows_of_the_miniature_are_read_by_archive(jdb: JourneyDb) -> None:
    outcome = jdb.annotations()
    ledger = outcome.ledger
    prompts = miniature_archive("train/001", SAMPLES, SIZE_PX).prompts
    expected = {name.removeprefix("./001/").removesuffix(".jpg"): text for name, text in prompts.items()}
    assert captions(jdb, "train/001") == expected and len(expected) == 10
    assert captions(jdb, "train/002") == {}
    assert not outcome.passed_over
    assert (ledger.read, ledger.kept, ledger.rejected, ledger.details) == (20, 20, {}, {"first_faults": []})
    assert (ledger.stage, ledger.archive) == ("annotations", "train")
    assert ledger.source["name"].endswith(ANNOTATION_FILES["train"])
    assert {str(p.relative_to(jdb.root.path)) for p in jdb.root.path.rglob("*") if p.is_file()} == {
        "jdb/annotations/train.parquet",
        "jdb/annotations/train.json",
    }


def test_second_run_passes_over_and_changed_content_is_indexed_again(jdb: JourneyDb) -> None:
    first = jdb.annotations()
    before = jdb.hub.requests
    assert jdb.annotations().passed_over and jdb.hub.requests - before == {"listing": 1}
    jdb.put_prompts("train", {"./000/new.jpg": "another prompt"})
    again = jdb.annotations()
    assert not again.passed_over and again.ledger.content_id != first.ledger.content_id
    assert captions(jdb) == {"new": "another prompt"} and captions(jdb, "train/001") == {}


def test_the_same_rows_give_the_same_bytes(jdb: JourneyDb) -> None:
    jdb.annotations()
    first = jdb.files()
    jdb.dir("annotations").ledger("train").unlink()
    jdb.annotations()
    assert jdb.files() == first


def test_broken_lines_are_counted_and_named(jdb: JourneyDb) -> None:
    lines = [
        row("good"),
        b"{broken",
        b"",
        b"   ",
        b"[1, 2]",
        b"5",
        b'"text"',
        b"null",
        b'{"img_path": "./000/b.jpg"}',
        b'{"prompt": "no path"}',
        row("c", None),
        row("d", 5),
        json.dumps({"img_path": None, "prompt": "x"}).encode(),
        json.dumps({"img_path": "e.jpg", "prompt": "no folder"}).encode(),
        json.dumps({"img_path": "../000/f.jpg", "prompt": "outside"}).encode(),
        b'{"img_path": "./000/g.jpg", "prompt": "\xff\xfe"}',
        b"[" * 100_000,
        row("last"),
    ]
    jdb.put_lines("train", b"\n".join(lines))  # without a line end after the last one
    ledger = jdb.annotations().ledger
    assert ledger.rejected == {"broken_row": [f"line {n}" for n in (2, *range(5, 18))]}
    assert (ledger.read, ledger.kept, ledger.balances) == (16, 2, True)
    assert captions(jdb) == {"good": "a prompt", "last": "a prompt"}
    faults = ledger.details["first_faults"]
    assert len(faults) == 14 and faults[0].startswith("line 2: JSONDecodeError: ")
    assert faults[5] == "line 9: KeyError: 'prompt'" and "no path" not in str(faults)
    assert faults[8] == "line 12: TypeError: the caption is int, not text"


def test_the_first_twenty_faults_are_named_and_all_lines_listed(jdb: JourneyDb) -> None:
    jdb.put_lines("train", row() + b"\n" + b"broken\n" * 50)
    ledger = jdb.annotations().ledger
    assert len(ledger.rejected["broken_row"]) == 50 and ledger.balances
    assert [fault.partition(":")[0] for fault in ledger.details["first_faults"]] == [f"line {n}" for n in range(2, 22)]


def test_duplicate_keys_first_kept(jdb: JourneyDb) -> None:
    jdb.put_lines("train", b"\n".join([row("a", "first"), row("b"), row("a", "second"), row("a", "third")]))
    ledger = jdb.annotations().ledger
    assert ledger.rejected == {Reason.DUPLICATE_KEY: ["train/000/a", "train/000/a"]}
    assert captions(jdb) == {"a": "first", "b": "a prompt"} and ledger.balances


def test_rows_of_an_archive_that_does_not_exist_are_told(jdb: JourneyDb) -> None:
    jdb.put_lines("train", row("a") + b"\n" + row("b", folder="999"))
    ledger = jdb.annotations().ledger
    assert ledger.rejected == {"unknown_archive": ["line 2"]} and ledger.balances
    assert ledger.details["first_faults"] == ["line 2: archive train/999 is none of jdb"]


@pytest.mark.parametrize(
    ("line", "missing"),
    [(b'{"img_path": "./000/a.jpg", "text": "x"}', "prompt"), (b'{"a": 1}', "img_path, prompt"), (b"x", "img_path")],
)
@pytest.mark.parametrize("count", [1, 3000])
def test_missing_columns_are_refused_with_their_names(jdb: JourneyDb, line: bytes, missing: str, count: int) -> None:
    jdb.annotations()
    before = jdb.files()
    jdb.put_lines("train", (line + b"\n") * count)
    error = failure(jdb)
    assert f"{ANNOTATION_FILES['train']} has no column {missing}" in error.what
    assert f"in its first {min(count, 1000)} rows" in error.what and "format" in error.remedy
    assert jdb.files() == before and jdb.temporaries() == []


def test_a_huge_line_is_one_broken_row_and_its_neighbours_stay(jdb: JourneyDb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_rows, "MAX_ROW_BYTES", 1000)
    fits = row("fits", "x" * (1000 - len(row("fits", "")) - 1))
    assert len(fits + b"\n") == 1000
    lines = [row("a"), row("huge", "x" * 5000), fits, row("too", "x" * 1000), row("b"), b"y" * 3000]
    jdb.put_lines("train", b"\n".join(lines))
    ledger = jdb.annotations().ledger
    assert ledger.rejected == {"broken_row": ["line 2", "line 4", "line 6"]} and ledger.read == 6
    assert list(captions(jdb)) == ["a", "fits", "b"]
    assert ledger.details["first_faults"][0] == "line 2: ValueError: the line has more than 1000 bytes"


@pytest.mark.parametrize(
    "prompt",
    ["NUL \0 inside", "emoji 👩‍🚀 ☃", "<b>html</b> &amp;", "two\nlines\r\n", "x" * 100_000, "", " \t"],
    ids=["NUL", "emoji", "html", "lines", "long", "empty", "space"],
)
def test_captions_are_as_upstream(jdb: JourneyDb, prompt: str) -> None:
    jdb.put_prompts("train", {"./000/a.jpg": prompt})
    jdb.annotations()
    assert captions(jdb) == {"a": prompt}


def test_half_a_surrogate_pair_spoils_neither_file_nor_row(jdb: JourneyDb) -> None:
    r"""Prompts that were cut off inside an emoji end with `\ud83d`, which no UTF-8 file can hold."""
    line = rb'{"img_path": "./000/a.jpg", "prompt": "cut \ud83d"}' + b"\n" + row("b", "whole 👩")
    jdb.put_lines("train", line)
    assert jdb.annotations().ledger.kept == 2
    assert captions(jdb) == {"a": "cut �", "b": "whole 👩"}
    assert as_unicode("\ud83d\ude00") == "😀" and as_unicode("\0é") == "\0é"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:-4] + b"\0\0\0\0", "corrupt"),
        (lambda data: b"<html>sign in</html>", "not_an_archive"),
    ],
    ids=["cut", "checksum", "page"],
)
def test_a_spoiled_file_leaves_the_index_that_was_there(jdb: JourneyDb, spoil: Any, reason: str) -> None:
    ledger = jdb.annotations().ledger
    before = jdb.files()
    file = jdb.repository / ANNOTATION_FILES["train"]
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    assert failure(jdb).reason == reason
    assert jdb.files() == before and jdb.temporaries() == []
    file.write_bytes(whole)
    assert jdb.annotations().ledger == ledger


def test_a_tgz_of_two_files_is_refused(jdb: JourneyDb) -> None:
    from md_assets.demo.journeydb import write_tgz

    write_tgz(jdb.repository / ANNOTATION_FILES["train"], [("a.jsonl", row()), ("b.jsonl", row())])
    assert "more than one file" in failure(jdb).what


def test_an_empty_file_has_no_captions(jdb: JourneyDb) -> None:
    jdb.put_lines("train", b"")
    assert (jdb.annotations().ledger.read, captions(jdb)) == (0, {})


def test_two_at_once_give_one_index(jdb: JourneyDb) -> None:
    outcomes = []
    jdb.hub.faults.throttle("*train_anno*", 5_000)
    threads = [threading.Thread(target=lambda: outcomes.append(jdb.annotations())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcome.passed_over for outcome in outcomes) == [False, True]
    assert jdb.hub.requests["cdn"] == 1 and len(captions(jdb)) == 10


def test_progress_tells_of_rows(jdb: JourneyDb) -> None:
    jdb.put_prompts("train", {f"./000/{number}.jpg": "x" for number in range(2500)})
    told: list[Progress] = []
    jdb.annotations(report=told.append)
    assert [(p.done, p.unit) for p in told if p.doing == "indexes"] == [(1000, "rows"), (2000, "rows")]
    assert {p.archive for p in told} == {"train"}
