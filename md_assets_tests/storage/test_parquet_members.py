"""Parquet files from outside: rows come out as they went in, in bounded memory, and a broken file is told."""

from __future__ import annotations

import datetime
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.spec import Member, ParquetLayout
from md_assets.storage.archives import iter_members
from md_assets_tests.storage.made_archives import not_utf_8, parquet_of, table_of

LIMIT_BYTES = 1_000_000
LAYOUT = ParquetLayout(image="image", name="image_id", others=("reference_strs", "image_width"))
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def row(number: int, image: Any = None, **columns: Any) -> dict[str, Any]:
    image = image or {"bytes": b"%d" % number * 50, "path": f"{number}.jpg"}
    others = {"image_width": 600 + number, "reference_strs": [f"caption {number}", "another"], "unused": "x"}
    return {"image": image, "image_id": f"id{number}", **others, **columns}


ROWS = [row(number) for number in range(8)]
MEMBERS = [
    Member(r["image_id"], r["image"]["bytes"], None, {c: r[c] for c in ("reference_strs", "image_width")}) for r in ROWS
]
TABLE = table_of(ROWS)
PARQUET = parquet_of(TABLE)


def members_of(
    folder: Path, data: bytes, limit_bytes: int = LIMIT_BYTES, layout: ParquetLayout = LAYOUT
) -> list[Member]:
    file = folder / "train-00000.parquet"
    file.write_bytes(data)
    return list(iter_members(file, "parquet", limit_bytes, parquet=layout))


def refusal_of(folder: Path, data: bytes, layout: ParquetLayout = LAYOUT) -> CorruptArchiveError:
    with pytest.raises(CorruptArchiveError) as caught:
        members_of(folder, data, layout=layout)
    assert str(caught.value).startswith("train-00000.parquet ") and "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    "options",
    [{}, {"row_group_size": 1}, {"row_group_size": 100}, {"compression": "zstd"}, {"data_page_version": "2.0"}],
    ids=lambda options: str(options),
)
def test_rows_come_in_order_with_their_columns(tmp_path: Path, options: dict[str, Any]) -> None:
    assert members_of(tmp_path, parquet_of(TABLE, **options)) == MEMBERS


def test_batches_end_where_row_groups_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (1, 2, 3, 5):
        monkeypatch.setattr("md_assets.storage.parquet_members.ROWS_AT_ONCE", rows)
        assert members_of(tmp_path, PARQUET) == MEMBERS


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_images_may_be_plain_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [row(number, r["image"]["bytes"]) for number, r in enumerate(ROWS)]
    assert members_of(tmp_path, parquet_of(table_of(rows, image=kind))) == MEMBERS


def test_columns_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    """Their data may even be broken."""
    table = table_of([row(1, unused="u" * 500)])
    data = parquet_of(table, compression="none", use_dictionary=False, write_statistics=False)
    assert data.count(b"u" * 500) == 1
    assert members_of(tmp_path, data.replace(b"u" * 500, b"v" * 500))[0].name == "id1"
    layout = ParquetLayout("image", "image_id", ("unused",))
    assert "CRC" in str(refusal_of(tmp_path, data.replace(b"u" * 500, b"v" * 500), layout))


def test_numbers_are_names_too(tmp_path: Path) -> None:
    members = members_of(tmp_path, parquet_of(table_of([row(1, image_id=4711), row(2, image_id=-1)])))
    assert [member.name for member in members] == ["4711", "-1"]


def test_names_are_made_safe_and_stay_apart(tmp_path: Path) -> None:
    names = {
        b"a": "a",
        b"../evil": "%2E%2E/evil",
        b"/etc/passwd": "%2Fetc/passwd",
        b"line\nend": "line%0Aend",
        b"\xff\xfe": "%FF%FE",
        b"": "%2E",
    }
    table = table_of([row(number) for number in range(len(names))])
    table = table.set_column(table.schema.get_field_index("image_id"), "image_id", not_utf_8(*names))
    members = members_of(tmp_path, parquet_of(table))
    assert [member.name for member in members] == list(names.values())
    assert [m.name for m in members if m.refused == Reason.UNSAFE_MEMBER] == ["%2E%2E/evil", "%2Fetc/passwd", "%2E"]
    assert [p.name for p in tmp_path.iterdir()] == ["train-00000.parquet"]


def test_a_row_without_name_is_refused_by_its_number(tmp_path: Path) -> None:
    rows = [*ROWS[:4], row(4, image_id=None), row(5, image_id=None), *ROWS[6:]]
    members = members_of(tmp_path, parquet_of(table_of(rows)))
    assert members[4:6] == [Member(f"row {number}", b"", Reason.UNSAFE_MEMBER) for number in (5, 6)]
    assert members[:4] + members[6:] == MEMBERS[:4] + MEMBERS[6:]


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": "a.jpg"}, {"bytes": b"", "path": None}])
def test_a_row_without_image_has_no_data(tmp_path: Path, image: Any) -> None:
    rows = [{**row(1), "image": image}, row(2)]
    members = members_of(tmp_path, parquet_of(table_of(rows, image=STRUCT)))
    assert [(m.name, m.data, m.refused) for m in members] == [("id1", b"", None), ("id2", b"2" * 50, None)]


def test_a_larger_image_is_refused(tmp_path: Path) -> None:
    rows = [row(1, {"bytes": b"1" * 101, "path": ""}), row(2, {"bytes": b"2" * 100, "path": ""})]
    large, kept = members_of(tmp_path, parquet_of(table_of(rows)), 100)
    assert large == Member("id1", b"", Reason.TOO_LARGE) and len(kept.data) == 100


def test_a_row_that_python_cannot_hold_is_refused_alone(tmp_path: Path) -> None:
    """Text that is not UTF-8, and a time after the year 9999."""
    table = table_of([row(1), row(2), row(3)])
    table = table.append_column("text", not_utf_8(b"ok", b"\xff", b"ok"))
    table = table.append_column("at", pa.array([0, 0, 2**60], pa.timestamp("ms")))
    layout = ParquetLayout("image", "image_id", ("text", "at"))
    members = members_of(tmp_path, parquet_of(table), layout=layout)
    assert members[1:] == [Member(f"id{number}", b"", Reason.UNREADABLE_MEMBER) for number in (2, 3)]
    assert members[0].fields == {"text": "ok", "at": datetime.datetime(1970, 1, 1)}


def test_position_rises_to_the_files_size(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(PARQUET)
    positions: list[int] = []
    list(iter_members(path, "parquet", LIMIT_BYTES, positions.append, LAYOUT))
    assert positions == [len(PARQUET) * number // 8 for number in range(1, 9)]


def test_a_table_without_rows_has_no_members(tmp_path: Path) -> None:
    assert members_of(tmp_path, parquet_of(TABLE.slice(0, 0))) == []


# Broken


def test_missing_columns_are_named_with_the_file(tmp_path: Path) -> None:
    data = parquet_of(TABLE.drop_columns(["image_id", "reference_strs"]))
    error = refusal_of(tmp_path, data)
    expected = "train-00000.parquet has no column image_id, reference_strs; it has image, image_width, unused"
    assert error.what == expected and error.reason == "corrupt" and "pin an older revision" in error.remedy


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([1]), "int64"),
        (pa.array(["text"]), "string"),
        (pa.array([{"path": "a.jpg"}]), "struct<path: string>"),
        (pa.array([{"bytes": "text"}]), "string"),
    ],
)
def test_a_column_that_holds_no_images_is_told(tmp_path: Path, column: pa.Array, says: str) -> None:
    table = table_of([row(1)])
    data = parquet_of(table.set_column(0, "image", column))
    assert f"its column image is {says} and holds no images" in str(refusal_of(tmp_path, data))


@pytest.mark.parametrize(
    ("data", "reason", "says"),
    [
        (b"", "truncated", "it is empty"),
        (b"PA", "truncated", "it is cut off"),
        (b"PAR1", "truncated", "it is cut off"),
        (b"<!DOCTYPE html><title>403</title>", "not_an_archive", "it is a web page"),
        (b"\n <html>" + b"x" * 20_000 + b"PAR1", "not_an_archive", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not_an_archive", "it does not begin with PAR1"),
        (b"PAR1" + bytes(100) + b"PAR1", "corrupt", "no usable parquet file"),
        (PARQUET[:4] + PARQUET[-200:], "corrupt", "no usable parquet file"),
    ],
    ids=["empty", "magic-cut", "magic", "page", "page-behind-space", "lfs-pointer", "zeros", "middle-missing"],
)
def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path, data: bytes, reason: str, says: str) -> None:
    error = refusal_of(tmp_path, data)
    assert error.reason == reason and says in str(error)


def test_cut_anywhere_it_fails(tmp_path: Path) -> None:
    for size in range(0, len(PARQUET), 7):
        assert refusal_of(tmp_path, PARQUET[:size]).reason == "truncated", size


def test_one_flipped_byte_of_the_data_is_found_by_the_checksums(tmp_path: Path) -> None:
    data = parquet_of(TABLE, compression="none")
    start = data.index(b"3" * 50)
    for position in range(start, start + 50):
        flipped = data[:position] + b"x" + data[position + 1 :]
        error = refusal_of(tmp_path, flipped)
        assert error.reason == "corrupt" and "CRC" in str(error)


def test_a_damaged_page_without_checksum_is_found_by_its_compression(tmp_path: Path) -> None:
    data = parquet_of(TABLE, write_page_checksum=False, compression="gzip", use_dictionary=False)
    start = data.index(b"\x1f\x8b") + 20
    error = refusal_of(tmp_path, data[:start] + b"\xff" * 8 + data[start + 8 :])
    assert error.reason == "corrupt"


@pytest.mark.slow
def test_any_flipped_byte_gives_members_or_one_clear_error(tmp_path: Path) -> None:
    """In a process of its own, which must survive."""
    (tmp_path / "whole.parquet").write_bytes(parquet_of(TABLE.slice(0, 3)))
    code = f"""
import pathlib, random
from md_assets.core.errors import CorruptArchiveError
from md_assets_tests.storage.test_parquet_members import members_of
folder = pathlib.Path({str(tmp_path)!r})
whole, choose = (folder / "whole.parquet").read_bytes(), random.Random(1)
for position in range(len(whole)):
    data = bytearray(whole)
    data[position] ^= choose.choice((1, 0x41, 0x80, 0xff))
    try:
        members_of(folder, bytes(data))
    except CorruptArchiveError as error:
        assert error.reason in ("truncated", "corrupt", "not_an_archive")
print("survived", len(whole))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("survived"), done.stderr[-2000:]


def test_an_error_of_the_disk_is_none_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(OSError, match="Input/output error"):
        members_of(tmp_path, PARQUET)


# Memory


def test_memory_holds_a_page_however_large_the_file(tmp_path: Path) -> None:
    """160 images of 300 KB in row groups of 20: a page has 6 MB, the file 48."""
    path = tmp_path / "large.parquet"
    with pq.ParquetWriter(path, table_of([row(1)]).schema) as writer:
        for number in range(8):
            rows = [row(20 * number + i, {"bytes": os.urandom(300_000), "path": ""}) for i in range(20)]
            writer.write_table(table_of(rows), row_group_size=20)
    code = f"""
import pathlib
from md_assets.core.spec import ParquetLayout
from md_assets.storage.archives import iter_members
from md_assets_tests.storage.memory import peak_mib
layout = ParquetLayout("image", "image_id")
peaks_mib = [peak_mib() for _ in iter_members(pathlib.Path({str(path)!r}), "parquet", 2**28, parquet=layout)]
print(len(peaks_mib), peaks_mib[-1] - peaks_mib[59])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, grown_mib = map(int, done.stdout.split())
    assert count == 160 and grown_mib < 10
