"""Rows of annotations files: all of them in every format, broken ones told, memory bounded."""

import datetime
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from md_assets.core.errors import CorruptArchiveError, MdAssetsError
from md_assets.core.source import HubFile
from md_assets.core.spec import AnnotationFormat, AnnotationSource, Caption
from md_assets.storage import annotation_rows
from md_assets.storage.annotation_rows import iter_rows

MEMBER = "annotations/captions.json"
CAPTIONS = {
    "long": "wörd " * 20_000,
    "emoji": "👩‍🚀 ☃ 漢字 \u202eltr",
    "html": "<b>bold</b> &amp; https://example.org/?a=1&b=2",
    "lines": "  two\nlines\r\n\ttab  ",
    "nul": "a\0b\0",
    "empty": "",
    "space": " \t\u3000",
}


def parse(row: Mapping[str, Any]) -> Caption:
    raise AssertionError("rows are read, not parsed")


def source(annotation_format: AnnotationFormat, *columns: str) -> AnnotationSource:
    return AnnotationSource("captions", HubFile("a/b", "c"), columns, parse, annotation_format, member=MEMBER)


def rows_of(path: Path, annotation_format: AnnotationFormat, *columns: str) -> list[tuple[str, Any]]:
    """All rows, exceptions as text."""
    rows = iter_rows(path, source(annotation_format, *columns), "the file")
    return [(name, f"{type(f).__name__}: {f}" if isinstance(f, Exception) else f) for name, f in rows]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, body: Any, member: str = MEMBER) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/other.json", "{}")
        archive.writestr(member, body if isinstance(body, bytes) else json.dumps(body))
    return path


def write_parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    pq.write_table(pa.table(dict(columns)), path)
    return path


def refusal(path: Path, annotation_format: AnnotationFormat, *columns: str) -> MdAssetsError:
    with pytest.raises(MdAssetsError) as caught:
        rows_of(path, annotation_format, *columns)
    assert caught.value.remedy and "\n" not in str(caught.value)
    return caught.value


# JSON lines

LINES = b'{"a": 1}\n\n  \n{broken\n[1]\n{"a": 2, "b": "\xe7\x8c\xab"}'
ROWS = [("line 1", {"a": 1}), ("line 5", [1]), ("line 6", {"a": 2, "b": "猫"})]


@pytest.mark.parametrize("container", ["plain", "w", "w:gz", "w:bz2"])
def test_json_lines_in_a_tar_or_plain(tmp_path: Path, container: str) -> None:
    path = tmp_path / "file"
    if container == "plain":
        path.write_bytes(LINES)
    else:
        write_tar(path, [("a.jsonl", LINES)], container)
    if container == "w:bz2":  # no source has it
        assert refusal(path, "json_lines").what.startswith("file ")
        return
    read = rows_of(path, "json_lines", "a")
    assert [row for row in read if row[0] != "line 4"] == ROWS
    assert [row[1].partition(":")[0] for row in read if row[0] == "line 4"] == ["JSONDecodeError"]


def test_a_line_that_is_too_long_is_one_broken_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_rows, "MAX_ROW_BYTES", 20)
    path = tmp_path / "file"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 90 + b'"}\n{"a": 2}')
    broken = ("line 2", "ValueError: the line has more than 20 bytes")
    assert rows_of(path, "json_lines", "a") == [("line 1", {"a": 1}), broken, ("line 3", {"a": 2})]


def test_a_web_page_and_an_empty_file_are_no_json_lines(tmp_path: Path) -> None:
    for content, reason in [(b" <!DOCTYPE html><p>sign in", "not_an_archive"), (b"", "truncated")]:
        (tmp_path / "file").write_bytes(content)
        error = refusal(tmp_path / "file", "json_lines", "a")
        assert isinstance(error, CorruptArchiveError) and error.reason == reason


# Columns


@pytest.mark.parametrize("count", [1, 1000, 2500])
def test_columns_that_no_row_has_are_refused_with_their_names(tmp_path: Path, count: int) -> None:
    (tmp_path / "file").write_bytes(b'{"b": 1, "x": 2}\n' * count)
    error = refusal(tmp_path / "file", "json_lines", "a", "b", "c")
    assert error.what == f"the file has no column a, c in its first {min(count, 1000)} rows"


def test_columns_of_a_few_rows_only_are_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'{"b": 1}\n' * 998 + b'{"a": 1}\n' + b'{"b": 1}\n' * 5)
    assert len(rows_of(tmp_path / "file", "json_lines", "a", "b")) == 1004


def test_columns_missing_in_parquet_are_refused_with_their_names_before_a_row_is_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "file", {"b": ["x"], "c": [1]})
    error = refusal(path, "parquet", "a", "b", "d")
    assert error.what == "the file has no column a, d but b, c" and "pin an older revision" in error.remedy


# Parquet


def test_parquet_rows_have_the_columns_asked_for_whatever_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotation_rows, "ROWS_AT_ONCE", 7)
    table = pa.table({"n": range(50), "other": [b"x"] * 50, "text": [f"t {i} 猫" for i in range(50)]})
    pq.write_table(table, tmp_path / "file", row_group_size=11)
    read = rows_of(tmp_path / "file", "parquet", "text", "n")
    assert read == [(f"row {i + 1}", {"text": f"t {i} 猫", "n": i}) for i in range(50)]


def test_parquet_captions_of_any_text_null_and_scores(tmp_path: Path) -> None:
    columns = {"text": [*CAPTIONS.values(), None], "score": pa.array([0.25] * len(CAPTIONS) + [None], pa.float32())}
    read = rows_of(write_parquet(tmp_path / "file", columns), "parquet", "text", "score")
    assert [fields["text"] for _, fields in read] == [*CAPTIONS.values(), None]
    assert [fields["score"] for _, fields in read] == [0.25] * len(CAPTIONS) + [None]


def test_parquet_rows_that_python_cannot_hold_are_broken_and_their_neighbours_stay(tmp_path: Path) -> None:
    buffers = pa.array([b"good", b"\xff\xfe", b"also good"], pa.binary()).buffers()
    no_utf8 = pa.StringArray.from_buffers(3, buffers[1], buffers[2])
    dates = pa.array([0, 1, 2**62], pa.timestamp("ms"))
    read = rows_of(write_parquet(tmp_path / "file", {"text": no_utf8, "date": dates}), "parquet", "text", "date")
    assert [name for name, _ in read] == ["row 1", "row 2", "row 3"]
    assert read[0][1] == {"text": "good", "date": datetime.datetime(1970, 1, 1)}
    assert read[1][1].startswith("UnicodeDecodeError: ") and read[2][1].partition(":")[0] in (
        "OverflowError",
        "ValueError",
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:-200] + bytes(100) + data[-100:], "corrupt"),
        (lambda data: b"<html>sign in</html>", "not_an_archive"),
        (lambda data: b"", "truncated"),
    ],
    ids=["cut", "damaged", "page", "empty"],
)
def test_spoiled_parquet_is_an_error(tmp_path: Path, spoil: Any, reason: str) -> None:
    path = write_parquet(tmp_path / "file", {"a": [f"{i * i}" for i in range(2000)]})
    path.write_bytes(spoil(path.read_bytes()))
    error = refusal(path, "parquet", "a")
    assert isinstance(error, CorruptArchiveError) and error.reason == reason


PEAK = """
import sys
from pathlib import Path
from md_assets_tests.storage.memory import peak_mib
from md_assets_tests.storage.test_annotation_rows import source
from md_assets.storage.annotation_rows import iter_rows
assert sum(1 for _ in iter_rows(Path(sys.argv[1]), source("parquet", "text"), "")) == int(sys.argv[2])
print(peak_mib())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """250 MB more of text, in a single row group, are read in a fifth of that more memory; the smaller table has enough
    batches for the allocators to have got what they keep."""
    peaks_mib = []
    for count in (250_000, 750_000):
        texts = [f"{n:08} " + f"{n * 7919:09}" * 55 for n in range(count)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "file", row_group_size=count)
        command = [sys.executable, "-c", PEAK, str(tmp_path / "file"), str(count)]
        peaks_mib.append(float(subprocess.run(command, capture_output=True, check=True).stdout))
    assert peaks_mib[1] - peaks_mib[0] < 50


# Texts


def test_texts_are_rows_with_names(tmp_path: Path) -> None:
    members = [(f"./captions/{key}.txt", text.encode()) for key, text in CAPTIONS.items()]
    read = rows_of(write_tar(tmp_path / "file", members), "texts", "name", "text")
    names = [f"captions/{key}.txt" for key in CAPTIONS]
    assert read == [(name, {"name": name, "text": text}) for name, text in zip(names, CAPTIONS.values(), strict=True)]


def test_texts_that_cannot_be_read_are_broken_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotation_rows, "MAX_ROW_BYTES", 100)
    with tarfile.open(tmp_path / "file", "w:gz") as tar:
        for name, data in [("../evil.txt", b"x"), ("a\nb.txt", b"ok"), ("big.txt", b"x" * 101), ("bytes.txt", b"\xff")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    read = dict(rows_of(tmp_path / "file", "texts", "name", "text"))
    assert read.pop("a%0Ab.txt") == {"name": "a%0Ab.txt", "text": "ok"}
    assert read.pop("bytes.txt").startswith("UnicodeDecodeError")
    assert read == {
        "%2E%2E/evil.txt": "ValueError: it is refused: unsafe_member",
        "big.txt": "ValueError: it is refused: too_large",
        "link.txt": "ValueError: it is refused: unsafe_member",
    }


def test_a_cut_tar_of_texts_is_an_error(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "file", [(f"sa_{n}.txt", f"{n * n}".encode()) for n in range(200)])
    path.write_bytes(path.read_bytes()[:-100])
    assert isinstance(refusal(path, "texts", "name", "text"), CorruptArchiveError)


# COCO

IMAGES = [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}]


def test_coco_captions_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    annotations = [{"image_id": n, "id": i, "caption": f"{i} 猫"} for i, n in enumerate([3, 7, 3])]
    path = write_zip(tmp_path / "file", {"images": IMAGES, "annotations": annotations, "info": {}})
    assert rows_of(path, "coco_captions", "file_name", "caption") == [
        ("annotation 1", {"file_name": "a.jpg", "caption": "0 猫"}),
        ("annotation 2", {"file_name": "b.jpg", "caption": "1 猫"}),
        ("annotation 3", {"file_name": "a.jpg", "caption": "2 猫"}),
    ]


def test_coco_captions_of_no_image_are_broken_rows(tmp_path: Path) -> None:
    annotations = [{"image_id": 5, "caption": "x"}, {"caption": "x"}, 5, {"image_id": [1], "caption": "x"}]
    annotations += [{"image_id": 7}, {"image_id": 7, "caption": "good"}]
    images = [*IMAGES, {"id": 8}, {"file_name": "c.jpg"}, None]
    read = rows_of(write_zip(tmp_path / "file", {"images": images, "annotations": annotations}), "coco_captions")
    assert [fields for _, fields in read if isinstance(fields, dict)] == [
        {"file_name": "b.jpg"},  # without caption: whoever parses it says so
        {"file_name": "b.jpg", "caption": "good"},
    ]
    assert read[0] == ("annotation 1", "ValueError: the file has no image 5")
    assert [fields.partition(":")[0] for _, fields in read[1:4]] == ["KeyError", "TypeError", "TypeError"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSONDecodeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[" * 100_000, "RecursionError"),
        ([], "TypeError"),
        ({"images": []}, "KeyError: 'annotations'"),
        ({"images": [], "annotations": {}}, "annotations or images are no list"),
    ],
)
def test_what_is_no_coco_file_is_an_error(tmp_path: Path, body: Any, says: str) -> None:
    error = refusal(write_zip(tmp_path / "file", body), "coco_captions")
    assert error.what.startswith(f"{MEMBER} in the file is no file of COCO captions") and says in error.what


def test_a_coco_file_that_is_absent_or_too_large_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"no file {MEMBER}" in refusal(write_zip(tmp_path / "file", {}, "x.json"), "coco_captions").what
    monkeypatch.setattr(annotation_rows, "MAX_JSON_BYTES", 1000)
    path = write_zip(tmp_path / "file", {"images": [], "annotations": ["x" * 1000]})
    assert "has more than 1000 bytes" in refusal(path, "coco_captions").what


def test_coco_captions_without_the_columns_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "file", {"images": IMAGES, "annotations": [{"image_id": 3, "text": "x"}] * 3})
    error = refusal(path, "coco_captions", "file_name", "caption")
    assert error.what == "the file has no column caption in its first 3 rows"
