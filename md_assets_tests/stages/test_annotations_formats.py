"""The annotations stage on what the datasets really have: tables with scores, small texts, COCO's JSON."""

import io
import json
import math
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.paths import DataRoot
from md_assets.datasets.coco2014 import SPEC as COCO2014
from md_assets.datasets.diffdb import SPEC as DIFFDB
from md_assets.datasets.sa1b import SPEC as SA1B
from md_assets.storage import captions as captions_module
from md_assets.storage.captions import read_captions, read_numbered_captions
from md_assets_tests.stages.conftest import wait_until
from md_assets_tests.stages.made_captions import Captioned

TEXTS = {
    "long": "wörd " * 20_000,
    "emoji": "👩‍🚀 ☃",
    "html": "<b>x</b> &amp; https://example.org",
    "lines": "two\nlines",
    "nul": "a\0b",
    "empty": "",
    "space": " \t\n",
}


@pytest.fixture
def diffdb(tmp_path: Path) -> Captioned:
    return Captioned(DIFFDB, DataRoot(tmp_path / "data"), tmp_path / "metadata.parquet")


@pytest.fixture
def sa1b(tmp_path: Path) -> Captioned:
    return Captioned(SA1B, DataRoot(tmp_path / "data"), tmp_path / "captions.tar.gz")


@pytest.fixture
def coco2014(tmp_path: Path) -> Captioned:
    return Captioned(COCO2014, DataRoot(tmp_path / "data"), tmp_path / "annotations.zip")


def put_table(diffdb: Captioned, **columns: Any) -> None:
    """Rows of the large table; columns that are not given have a usual value."""
    names = columns.pop("image_name")
    count = len(names)
    usual: dict[str, Any] = {
        "image_name": names,
        "prompt": [f"prompt {n}" for n in range(count)],
        "part_id": pa.array([1] * count, pa.uint16()),
        "seed": range(count),
        "image_nsfw": pa.array([0.1] * count, pa.float32()),
        "prompt_nsfw": pa.array([0.0] * count, pa.float32()),
    }
    table = {name: column for name, column in {**usual, **columns}.items() if column is not None}
    pq.write_table(pa.table(table), diffdb.file)


def put_texts(sa1b: Captioned, texts: Mapping[str, str | bytes]) -> None:
    with tarfile.open(sa1b.file, "w:gz") as tar:
        for name, text in texts.items():
            data = text.encode() if isinstance(text, str) else text
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def put_coco(coco2014: Captioned, body: Mapping[str, Any]) -> None:
    with zipfile.ZipFile(coco2014.file, "w") as archive:
        archive.writestr("annotations/instances_val2014.json", "{}")
        archive.writestr("annotations/captions_val2014.json", json.dumps(body))


def indexed(captioned: Captioned, archive: str) -> dict[str, str]:
    (source,) = captioned.spec.annotations
    read = read_captions(captioned.root.annotations(captioned.spec.slug).data(source.name), archive)
    return {key.removeprefix(f"{archive}/"): caption.text for key, caption in read.items()}


# A table with scores


def test_rows_of_a_table_are_found_by_archive_with_their_worst_score(diffdb: Captioned) -> None:
    parts, nsfw = pa.array([14_000, 1, 1, 1], pa.uint16()), pa.array([0.5, 0.1, 2.0, None], pa.float32())
    other = pa.array([0.1, 0.3, 0.1, 0.1], pa.float32())
    put_table(diffdb, image_name=["a.webp", "b.webp", "c.webp", "d"], part_id=parts, image_nsfw=nsfw, prompt_nsfw=other)
    ledger = diffdb.annotations()
    assert (ledger.read, ledger.kept, ledger.rejected, ledger.balances) == (4, 4, {}, True)
    path = diffdb.root.annotations("diffdb").data("captions")
    read = read_captions(path, "part-000001")
    assert {key: caption.text for key, caption in read.items()} == {
        "part-000001/b": "prompt 1",
        "part-000001/c": "prompt 2",
        "part-000001/d": "prompt 3",
    }
    scores = [caption.unsafe for caption in read.values()]
    assert scores[:2] == [np.float32(0.3), 2.0] and scores[2] is not None and math.isnan(scores[2])
    assert indexed(diffdb, "part-014000") == {"a": "prompt 0"} and indexed(diffdb, "part-000002") == {}


def test_broken_rows_of_a_table_are_counted_and_the_first_twenty_named(diffdb: Captioned) -> None:
    names = [f"{n}.webp" for n in range(40)]
    prompts = [None if n % 4 == 0 else "x" for n in range(40)]
    parts = pa.array([0 if n % 4 == 1 else None if n % 4 == 2 else 1 for n in range(40)], pa.uint16())
    put_table(diffdb, image_name=names, prompt=prompts, part_id=parts)
    ledger = diffdb.annotations()
    broken = [f"row {n + 1}" for n in range(40) if n % 4 in (0, 2)]
    assert ledger.rejected == {"broken_row": broken, "unknown_archive": [f"row {n + 2}" for n in range(0, 40, 4)]}
    assert (ledger.read, ledger.kept, ledger.balances) == (40, 10, True)
    faults = ledger.details["first_faults"]
    assert len(faults) == 20 and faults[0] == "row 1: TypeError: the caption is NoneType, not text"
    assert faults[1] == "row 2: archive part-000000 is none of diffdb" and faults[2].startswith("row 3: TypeError: ")


def test_captions_of_a_table_are_as_upstream(diffdb: Captioned) -> None:
    put_table(diffdb, image_name=[f"{name}.webp" for name in TEXTS], prompt=list(TEXTS.values()))
    assert diffdb.annotations().kept == len(TEXTS)
    assert indexed(diffdb, "part-000001") == TEXTS


def test_missing_columns_of_a_table_are_refused_with_their_names(diffdb: Captioned) -> None:
    put_table(diffdb, image_name=["a.webp"], prompt=None, prompt_nsfw=None, text=["x"])
    with pytest.raises(ArchiveError) as caught:
        diffdb.annotations()
    assert caught.value.what.startswith(
        "diffdb captions: org/name:metadata.parquet has no column prompt, prompt_nsfw but image_name, part_id, "
    )
    assert "format" in caught.value.remedy
    assert [path for path in diffdb.root.path.rglob("*") if path.is_file()] == []


def test_columns_that_nobody_asked_for_may_be_missing_or_unreadable(diffdb: Captioned) -> None:
    put_table(diffdb, image_name=["a.webp"], seed=None, timestamp=pa.array([2**62], pa.timestamp("ms")))
    assert diffdb.annotations().kept == 1


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:200] + bytes(300) + data[500:], "corrupt"),
        (lambda data: b"<html>sign in</html>", "not_an_archive"),
    ],
    ids=["cut", "damaged", "page"],
)
def test_a_spoiled_table_leaves_the_index_that_was_there(diffdb: Captioned, spoil: Any, reason: str) -> None:
    put_table(diffdb, image_name=[f"{n}.webp" for n in range(500)])
    diffdb.annotations()
    published = {path: path.read_bytes() for path in diffdb.root.path.rglob("*") if path.is_file()}
    diffdb.file.write_bytes(spoil(diffdb.file.read_bytes()))
    with pytest.raises(ArchiveError) as caught:
        diffdb.annotations()
    assert caught.value.reason == reason and caught.value.remedy
    assert {path: path.read_bytes() for path in diffdb.root.path.rglob("*") if path.is_file()} == published


# Small texts, by number


def numbered(sa1b: Captioned, first: int = 0, last: int = 2**40) -> list[tuple[str, str]]:
    read = read_numbered_captions(sa1b.root.annotations("sa1b").data("captions"), first, last)
    return [(caption.key, caption.text) for caption in read]


def test_texts_are_ordered_by_number(sa1b: Captioned) -> None:
    put_texts(sa1b, {"./sa_11185362.txt": "last\n", "sa_10.txt": "ten", "x/sa_9.txt": " nine ", "sa_0.txt": ""})
    ledger = sa1b.annotations()
    assert (ledger.read, ledger.kept, ledger.rejected) == (4, 4, {})
    assert numbered(sa1b) == [("sa_0", ""), ("sa_9", "nine"), ("sa_10", "ten"), ("sa_11185362", "last")]
    assert numbered(sa1b, 9, 10) == [("sa_9", "nine"), ("sa_10", "ten")]


def test_broken_texts_are_counted_and_named_and_one_key_is_kept_once(sa1b: Captioned) -> None:
    texts: dict[str, str | bytes] = {"README": "x", "sa_1.txt": b"\xff", "../sa_2.txt": "x", f"sa_{10**30}.txt": "x"}
    put_texts(sa1b, {**texts, "sa_3.txt": "first", "again/sa_3.txt": "second"})
    ledger = sa1b.annotations()
    assert ledger.rejected == {
        "broken_row": ["README", "sa_1.txt", "%2E%2E/sa_2.txt", f"sa_{10**30}.txt"],
        Reason.DUPLICATE_KEY: ["sa_3"],
    }
    assert (ledger.read, ledger.kept, ledger.balances) == (6, 1, True) and numbered(sa1b) == [("sa_3", "first")]
    assert ledger.details["first_faults"][0] == "README: ValueError: 'README' is not sa_N"


def test_captions_of_texts_are_as_upstream(sa1b: Captioned) -> None:
    put_texts(sa1b, {f"sa_{number}.txt": text for number, text in enumerate(TEXTS.values())})
    sa1b.annotations()
    assert numbered(sa1b) == [(f"sa_{number}", text.strip()) for number, text in enumerate(TEXTS.values())]


# COCO


def test_the_first_of_several_captions_is_kept_and_the_others_are_no_duplicates(coco2014: Captioned) -> None:
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012}.jpg"} for n in (42, 73)]
    annotations = [{"image_id": n, "caption": f"{i} of {n}"} for i, n in enumerate([73, 42, 73, 5, 42, 73])]
    put_coco(coco2014, {"images": images, "annotations": annotations})
    ledger = coco2014.annotations()
    keys = {n: f"val2014/COCO_val2014_{n:012}" for n in (42, 73)}
    assert ledger.rejected == {
        "broken_row": ["annotation 4"],
        Reason.FURTHER_CAPTION: [keys[73], keys[42], keys[73]],
    }
    assert (ledger.read, ledger.kept, ledger.balances) == (6, 2, True)
    assert ledger.details["first_faults"] == ["annotation 4: ValueError: the file has no image 5"]
    assert indexed(coco2014, "val2014") == {
        "COCO_val2014_000000000073": "0 of 73",
        "COCO_val2014_000000000042": "1 of 42",
    }


# All


def test_a_fault_is_quoted_in_one_short_line(diffdb: Captioned) -> None:
    put_table(diffdb, image_name=["../\n" + "x" * 100_000])
    (fault,) = diffdb.annotations().details["first_faults"]
    assert fault.startswith("row 1: ValueError: image_name '../") and "\n" not in fault and len(fault) <= 300


def test_an_index_of_an_older_layout_is_made_anew(diffdb: Captioned, monkeypatch: pytest.MonkeyPatch) -> None:
    put_table(diffdb, image_name=["a.webp"])
    first = diffdb.annotations()
    assert diffdb.annotations() == first
    monkeypatch.setattr("md_assets.stages.annotations.INDEX_VERSION", captions_module.INDEX_VERSION + 1)
    again = diffdb.annotations()
    assert again.fingerprint != first.fingerprint and again.files == first.files


def test_plain_json_lines_are_read_too(tmp_path: Path) -> None:
    (source,) = DIFFDB.annotations
    spec = replace(DIFFDB, annotations=(replace(source, format="json_lines"),))
    lines = Captioned(spec, DataRoot(tmp_path / "data"), tmp_path / "captions.jsonl")
    row = {"image_name": "a.webp", "prompt": "x", "part_id": 2, "image_nsfw": 0.0, "prompt_nsfw": 0.0}
    lines.file.write_text(f"{json.dumps(row)}\nbroken\n{json.dumps({**row, 'image_name': 'b.webp'})}\n")
    ledger = lines.annotations()
    assert (ledger.read, ledger.kept, ledger.rejected) == (3, 2, {"broken_row": ["line 2"]})
    assert indexed(lines, "part-000002") == {"a": "x", "b": "x"}


PROGRAM = """
import sys, time
from pathlib import Path
from md_assets.core.paths import DataRoot
from md_assets.datasets.diffdb import SPEC
from md_assets.storage import captions
from md_assets_tests.stages.made_captions import Captioned

captions.BUFFERED_ROWS = 100
sort = captions._sorted_by_place

def sorted_slowly(spill):
    print("amid", flush=True)
    time.sleep(60)
    return sort(spill)

captions._sorted_by_place = sorted_slowly
Captioned(SPEC, DataRoot(Path(sys.argv[1])), Path(sys.argv[2])).annotations()
"""


@pytest.mark.slow
def test_killed_midway_then_run_again_gives_the_same_bytes_and_leaves_nothing(diffdb: Captioned) -> None:
    put_table(diffdb, image_name=[f"{n}.webp" for n in range(1000)])
    command = [sys.executable, "-c", PROGRAM, str(diffdb.root.path), str(diffdb.file)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "amid\n"
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: process.poll() is not None)
    folder = diffdb.root.annotations("diffdb").path
    assert [path.name for path in folder.iterdir()] == [".captions.tmp"]
    ledger = diffdb.annotations()
    assert sorted(path.name for path in folder.iterdir()) == ["captions.json", "captions.parquet"]
    elsewhere = replace(diffdb, root=DataRoot(diffdb.root.path.parent / "elsewhere"))
    assert elsewhere.annotations().files == ledger.files
