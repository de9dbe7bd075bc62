"""The caption index: few row groups for one archive, whatever order and number the rows came in."""

from __future__ import annotations

import math
import random
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from md_assets.core.errors import MdAssetsError
from md_assets.core.spec import Caption
from md_assets.storage import captions
from md_assets.storage.captions import CaptionIndexWriter, IndexedCaption, read_captions, read_numbered_captions

ARCHIVES = [f"{split}/{number:03}" for split in ("train", "valid") for number in range(100)]


def build(
    path: Path, rows: Iterable[Caption], archives: Sequence[str] = ARCHIVES, scored: bool = False
) -> tuple[int, list[str]]:
    scratch = path.with_suffix(".spill")
    scratch.mkdir()
    with CaptionIndexWriter(path, scratch, archives, scored) as writer:
        for row in rows:
            writer.add(row.archive, row.key, row.text, row.unsafe)
        return writer.finish()


def build_numbered(path: Path, numbers: Iterable[int]) -> tuple[int, list[str]]:
    """An index of captions that are called like their numbers."""
    scratch = path.with_suffix(".spill")
    scratch.mkdir()
    with CaptionIndexWriter(path, scratch, None) as writer:
        for number in numbers:
            writer.add(number, f"sa_{number}", f"caption {number}")
        return writer.finish()


def texts(path: Path, archive: str) -> dict[str, str]:
    return {key: caption.text for key, caption in read_captions(path, archive).items()}


def row_groups(path: Path) -> list[list[str | int]]:
    """The places of each row group."""
    with pq.ParquetFile(path) as parquet:
        return [parquet.read_row_group(i).column(0).to_pylist() for i in range(parquet.num_row_groups)]


def rows_of(count: int, archives: Sequence[str] = ARCHIVES, seed: int = 0) -> list[Caption]:
    """In random order; the archives have different numbers of rows, `train/007` none."""
    numbers = random.Random(seed)
    usable = [archive for archive in archives if archive != "train/007"]
    picked = numbers.choices(usable, weights=range(1, len(usable) + 1), k=count)
    return [Caption(archive, f"{archive}/{i:06}", f"caption {i} 猫") for i, archive in enumerate(picked)]


def expected(rows: Iterable[Caption], archive: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in rows:
        if row.archive == archive:
            found.setdefault(row.key, row.text)
    return found


@pytest.mark.parametrize("buffered_rows", [3, 70, 1000, 10**9])
def test_each_archive_has_its_rows_in_the_order_they_came_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffered_rows: int
) -> None:
    monkeypatch.setattr(captions, "BUFFERED_ROWS", buffered_rows)
    rows = rows_of(1000)
    path = tmp_path / "train.parquet"
    assert build(path, rows) == (1000, [])
    for archive in ARCHIVES:
        read = texts(path, archive)
        assert list(read.items()) == list(expected(rows, archive).items())
    assert texts(path, "train/007") == {} == texts(path, "no/such")


@pytest.mark.slow
def test_a_long_table_in_random_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "BUFFERED_ROWS", 5000)
    archives = [f"part-{number:06}" for number in range(1, 14_001)]
    rows = rows_of(200_000, archives)
    path = tmp_path / "large.parquet"
    assert build(path, rows, archives) == (200_000, [])
    for archive in random.Random(1).sample(archives, 50):
        assert texts(path, archive) == expected(rows, archive)


def test_the_first_of_equal_keys_stays_and_the_others_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "BUFFERED_ROWS", 2)
    a, b = ARCHIVES[0], ARCHIVES[150]
    rows = [Caption(a, "1", "first"), Caption(b, "1", "of b"), Caption(a, "2", "x"), Caption(a, "1", "second")]
    rows += [Caption(b, "1", "again"), Caption(a, "1", "third")]
    assert build(tmp_path / "i.parquet", rows) == (3, ["1", "1", "1"])
    assert texts(tmp_path / "i.parquet", a) == {"1": "first", "2": "x"}
    assert texts(tmp_path / "i.parquet", b) == {"1": "of b"}


def test_the_same_rows_give_the_same_bytes_however_they_were_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(2000)
    build(tmp_path / "one.parquet", rows)
    build(tmp_path / "again.parquet", rows)
    monkeypatch.setattr(captions, "BUFFERED_ROWS", 13)
    build(tmp_path / "other.parquet", rows)
    assert len({path.read_bytes() for path in tmp_path.glob("*.parquet")}) == 1


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130])
def test_any_number_of_archives(tmp_path: Path, count: int) -> None:
    archives = [f"a{number}" for number in range(count)]
    rows = [Caption(archive, archive, archive) for archive in reversed(archives)]
    assert build(tmp_path / "i.parquet", rows, archives) == (count, [])
    assert all(texts(tmp_path / "i.parquet", archive) == {archive: archive} for archive in archives)
    assert [place for group in row_groups(tmp_path / "i.parquet") for place in group] == sorted(archives)


def test_no_rows_at_all(tmp_path: Path) -> None:
    assert build(tmp_path / "i.parquet", []) == (0, [])
    assert texts(tmp_path / "i.parquet", ARCHIVES[0]) == {}


@pytest.mark.parametrize("text", ["", " ", "\0", "a\nb\r\n", "猫🐈", "x" * 2_000_000, "\ufffd", "é\u0301"])
def test_captions_come_back_as_they_are(tmp_path: Path, text: str) -> None:
    build(tmp_path / "i.parquet", [Caption(ARCHIVES[0], "k", text)])
    assert texts(tmp_path / "i.parquet", ARCHIVES[0]) == {"k": text}


def test_an_archive_that_the_dataset_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="train/999"):
        build(tmp_path / "i.parquet", [Caption("train/999", "k", "x")])


def test_long_captions_are_spilled_before_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "BUFFERED_CHARACTERS", 1000)
    (tmp_path / "spill").mkdir()
    with CaptionIndexWriter(tmp_path / "i.parquet", tmp_path / "spill", ARCHIVES) as writer:
        for number in range(50):
            writer.add(ARCHIVES[0], f"{number}", "x" * 300)
            assert len(writer._buffer) < 4
        assert writer.finish() == (50, [])


def test_nothing_but_the_index_is_left_where_it_is_made(tmp_path: Path) -> None:
    build(tmp_path / "i.parquet", rows_of(500))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i.parquet", "i.spill"]


@pytest.mark.parametrize(("rows", "sizes"), [(10, [12, 10, 11]), (12, [12, 21]), (13, [22, 11]), (1, [12, 10, 11])])
def test_row_groups_have_so_many_rows_and_end_with_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(captions, "ROW_GROUP_ROWS", rows)
    monkeypatch.setattr(captions, "SPILL_FILES", 1)
    numbers = {"a": 12, "b": 10, "c": 11}
    build(
        tmp_path / "i.parquet",
        [Caption(a, f"{a}{n}", "x") for a, count in numbers.items() for n in range(count)],
        "abc",
    )
    assert list(map(len, row_groups(tmp_path / "i.parquet"))) == sizes
    assert {a: len(read_captions(tmp_path / "i.parquet", a)) for a in numbers} == numbers


# Scores


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]  # type: ignore[no-any-return]


def test_scores_are_kept_as_float32_and_absent_ones_are_nan(tmp_path: Path) -> None:
    scores = {"low": 0.0, "even": 0.2, "blurred": 2.0, "nan": math.nan, "absent": None, "infinite": math.inf}
    build(tmp_path / "i.parquet", [Caption(ARCHIVES[0], key, "x", s) for key, s in scores.items()], scored=True)
    read = {key: caption.unsafe for key, caption in read_captions(tmp_path / "i.parquet", ARCHIVES[0]).items()}
    expected = {"low": 0.0, "even": float32(0.2), "blurred": 2.0, "infinite": math.inf}
    assert {key: read.pop(key) for key in expected} == expected != scores
    assert list(read) == ["nan", "absent"] and all(map(math.isnan, read.values()))


def test_an_index_without_scores_has_none(tmp_path: Path) -> None:
    build(tmp_path / "i.parquet", [Caption(ARCHIVES[0], "k", "x", 0.5)])
    assert read_captions(tmp_path / "i.parquet", ARCHIVES[0]) == {"k": IndexedCaption("k", "x", None)}


# Numbered


@pytest.mark.parametrize("buffered_rows", [100, 10**9])
def test_captions_are_read_by_number_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffered_rows: int
) -> None:
    monkeypatch.setattr(captions, "BUFFERED_ROWS", buffered_rows)
    monkeypatch.setattr(captions, "NUMBERS_PER_SPILL", 100)
    monkeypatch.setattr(captions, "ROW_GROUP_ROWS", 30)
    numbers = [n for n in range(3_000) if n % 7]
    random.Random(0).shuffle(numbers)
    path = tmp_path / "i.parquet"
    assert build_numbered(path, numbers) == (len(numbers), [])
    for first, last in [(0, 0), (1, 1), (95, 103), (7, 7), (0, 2999), (1290, 2900), (3000, 10**9), (5, 4)]:
        expected = [IndexedCaption(f"sa_{n}", f"caption {n}", None) for n in range(first, min(last, 2999) + 1) if n % 7]
        assert list(read_numbered_captions(path, first, last)) == expected


def test_numbers_of_any_size(tmp_path: Path) -> None:
    numbers = [captions.MAX_NUMBER, 0, 2**40, 11_185_362, 2**62, 1]
    assert build_numbered(tmp_path / "i.parquet", numbers) == (6, [])
    read = read_numbered_captions(tmp_path / "i.parquet", 0, captions.MAX_NUMBER)
    assert [caption.key for caption in read] == [f"sa_{number}" for number in sorted(numbers)]


def test_one_number_may_have_several_keys_but_no_key_twice(tmp_path: Path) -> None:
    (tmp_path / "spill").mkdir()
    with CaptionIndexWriter(tmp_path / "i.parquet", tmp_path / "spill", None) as writer:
        for key, text in [("sa_01", "a"), ("sa_1", "b"), ("sa_1", "c")]:
            writer.add(1, key, text)
        assert writer.finish() == (2, ["sa_1"])
    read = read_numbered_captions(tmp_path / "i.parquet", 1, 1)
    assert [(caption.key, caption.text) for caption in read] == [("sa_01", "a"), ("sa_1", "b")]


def test_few_row_groups_are_read_for_a_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "ROW_GROUP_ROWS", 10)
    build_numbered(tmp_path / "i.parquet", range(1000))
    opened: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def spied(file: pq.ParquetFile, group: int, **options: object) -> object:
        opened.append(group)
        return read_row_group(file, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spied)
    assert len(list(read_numbered_captions(tmp_path / "i.parquet", 495, 512))) == 18
    assert opened == [49, 50, 51]


# Damage


def footer_start(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def test_one_archives_rows_come_from_the_footer_and_one_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every other byte of the file destroyed they are still read."""
    monkeypatch.setattr(captions, "ROW_GROUP_ROWS", 1)
    path = tmp_path / "i.parquet"
    rows = rows_of(3000)
    build(path, rows)
    group = next(i for i, places in enumerate(row_groups(path)) if "valid/050" in places)
    columns = [pq.read_metadata(path).row_group(group).column(i) for i in range(3)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
    data = path.read_bytes()
    footer = footer_start(data)
    path.write_bytes(bytes(min(starts)) + data[min(starts) : max(ends)] + bytes(footer - max(ends)) + data[footer:])
    assert texts(path, "valid/050") == expected(rows, "valid/050")
    with pytest.raises(MdAssetsError):
        read_captions(path, "valid/051")


@pytest.mark.parametrize("part", ["data", "footer"])
def test_damage_is_an_error_and_never_another_or_no_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(captions, "ROW_GROUP_ROWS", 20)
    path = tmp_path / "i.parquet"
    rows = [Caption(f"{i % 3}", f"k{i}", f"caption {i * i}") for i in range(60)]
    build(path, rows, ["0", "1", "2"])
    data = path.read_bytes()
    footer = footer_start(data)
    seen = 0
    positions = range(0, footer, 3) if part == "data" else range(footer, len(data), 5)
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            assert texts(path, "1") == expected(rows, "1")
        except MdAssetsError as error:
            assert "materialize annotations again" in str(error)
            seen += 1
    # Not seen: other archives' row groups, names and statistics that nobody reads.
    assert seen > len(positions) / 5


@pytest.mark.parametrize("size", [0, 4, 100, -1, -8, -200])
def test_a_cut_file_is_an_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "i.parquet"
    build(path, rows_of(100))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(MdAssetsError, match=r"i\.parquet cannot be read: .*\. Delete its \.json"):
        read_captions(path, ARCHIVES[0])


def test_an_absent_file_and_a_strangers_are_errors(tmp_path: Path) -> None:
    with pytest.raises(MdAssetsError, match="cannot be read"):
        read_captions(tmp_path / "none.parquet", "a")
    build(tmp_path / "i.parquet", rows_of(10))
    pq.write_table(pq.read_table(tmp_path / "i.parquet"), tmp_path / "foreign.parquet", store_schema=False)
    with pytest.raises(MdAssetsError, match="cannot be read"):
        read_captions(tmp_path / "foreign.parquet", "a")


PEAK = """
import pathlib, sys
from md_assets.storage import captions
from md_assets.storage.captions import CaptionIndexWriter
from md_assets_tests.storage.memory import peak_mib
captions.BUFFERED_ROWS = 5000
rows, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
folder.mkdir()
archives = [f"{n:04}" for n in range(1000)]
with CaptionIndexWriter(folder / "i.parquet", folder, archives) as writer:
    for i in range(rows):
        writer.add(archives[i * 7919 % 1000], f"{i:08}", f"{i} " + "x" * 200)
    writer.finish()
print(peak_mib())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """16 times the rows, 50 MB of them, in a tenth of that more memory."""
    peaks_mib = [
        float(subprocess.run([sys.executable, "-c", PEAK, str(rows), str(tmp_path / str(rows))],
                             capture_output=True, check=True).stdout)
        for rows in (12_000, 200_000)
    ]  # fmt: skip
    assert peaks_mib[1] - peaks_mib[0] < 25
