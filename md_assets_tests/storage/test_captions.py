"""The caption index: one archive's rows from one row group, whatever order and number the rows came in."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from md_assets.core.errors import MdAssetsError
from md_assets.core.spec import Caption
from md_assets.storage import captions
from md_assets.storage.captions import CaptionIndexWriter, read_captions

ARCHIVES = [f"{split}/{number:03}" for split in ("train", "valid") for number in range(100)]


def build(path: Path, rows: Iterable[Caption], archives: Sequence[str] = ARCHIVES) -> tuple[int, list[str]]:
    scratch = path.with_suffix(".spill")
    scratch.mkdir()
    with CaptionIndexWriter(path, scratch, archives) as writer:
        for row in rows:
            writer.add(row)
        return writer.finish()


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


@pytest.mark.parametrize("buffered_rows", [1, 7, 1000, 10**9])
def test_each_archive_has_its_rows_in_the_order_they_came_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffered_rows: int
) -> None:
    monkeypatch.setattr(captions, "BUFFERED_ROWS", buffered_rows)
    rows = rows_of(3000)
    path = tmp_path / "train.parquet"
    assert build(path, rows) == (3000, [])
    for archive in ARCHIVES:
        read = read_captions(path, archive)
        assert list(read.items()) == list(expected(rows, archive).items())
    assert read_captions(path, "train/007") == {} == read_captions(path, "no/such")


@pytest.mark.slow
def test_a_long_table_in_random_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "BUFFERED_ROWS", 5000)
    archives = [f"part-{number:06}" for number in range(1, 14_001)]
    rows = rows_of(200_000, archives)
    path = tmp_path / "large.parquet"
    assert build(path, rows, archives) == (200_000, [])
    for archive in random.Random(1).sample(archives, 50):
        assert read_captions(path, archive) == expected(rows, archive)


def test_the_first_of_equal_keys_stays_and_the_others_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "BUFFERED_ROWS", 2)
    a, b = ARCHIVES[0], ARCHIVES[150]
    rows = [Caption(a, "1", "first"), Caption(b, "1", "of b"), Caption(a, "2", "x"), Caption(a, "1", "second")]
    rows += [Caption(b, "1", "again"), Caption(a, "1", "third")]
    assert build(tmp_path / "i.parquet", rows) == (3, ["1", "1", "1"])
    assert read_captions(tmp_path / "i.parquet", a) == {"1": "first", "2": "x"}
    assert read_captions(tmp_path / "i.parquet", b) == {"1": "of b"}


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
    assert all(read_captions(tmp_path / "i.parquet", archive) == {archive: archive} for archive in archives)
    groups = [pq.ParquetFile(tmp_path / "i.parquet").read_row_group(i)["archive"][0].as_py() for i in range(count)]
    assert groups == archives


def test_no_rows_at_all(tmp_path: Path) -> None:
    assert build(tmp_path / "i.parquet", []) == (0, [])
    assert read_captions(tmp_path / "i.parquet", ARCHIVES[0]) == {}


@pytest.mark.parametrize("text", ["", " ", "\0", "a\nb\r\n", "猫🐈", "x" * 2_000_000, "\ufffd", "é\u0301"])
def test_captions_come_back_as_they_are(tmp_path: Path, text: str) -> None:
    build(tmp_path / "i.parquet", [Caption(ARCHIVES[0], "k", text)])
    assert read_captions(tmp_path / "i.parquet", ARCHIVES[0]) == {"k": text}


def test_an_archive_that_the_dataset_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="train/999"):
        build(tmp_path / "i.parquet", [Caption("train/999", "k", "x")])


def test_long_captions_are_spilled_before_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "BUFFERED_CHARACTERS", 1000)
    (tmp_path / "spill").mkdir()
    with CaptionIndexWriter(tmp_path / "i.parquet", tmp_path / "spill", ARCHIVES) as writer:
        for number in range(50):
            writer.add(Caption(ARCHIVES[0], f"{number}", "x" * 300))
            assert len(writer._buffer) < 4
        assert writer.finish() == (50, [])


def test_nothing_but_the_index_is_left_where_it_is_made(tmp_path: Path) -> None:
    build(tmp_path / "i.parquet", rows_of(500))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i.parquet", "i.spill"]


# Damage


def test_one_archives_rows_come_from_the_footer_and_one_row_group(tmp_path: Path) -> None:
    """With every other byte of the file destroyed they are still read."""
    path = tmp_path / "i.parquet"
    rows = rows_of(3000)
    build(path, rows)
    metadata = pq.read_metadata(path)
    groups = {pq.ParquetFile(path).read_row_group(i)["archive"][0].as_py(): i for i in range(metadata.num_row_groups)}
    columns = [metadata.row_group(groups["valid/050"]).column(i) for i in range(3)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(bytes(min(starts)) + data[min(starts) : max(ends)] + bytes(footer - max(ends)) + data[footer:])
    assert read_captions(path, "valid/050") == expected(rows, "valid/050")
    with pytest.raises(MdAssetsError):
        read_captions(path, "valid/051")


def test_damage_is_an_error_and_never_another_caption(tmp_path: Path) -> None:
    path = tmp_path / "i.parquet"
    rows = [Caption("a", f"k{i}", f"caption {i * i}") for i in range(60)]
    build(path, rows, ["a"])
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    unseen = []
    for position in range(footer):
        damaged = bytearray(data)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            assert read_captions(path, "a") == expected(rows, "a")
            unseen.append(position)
        except MdAssetsError as error:
            assert "materialize annotations again" in str(error)
    assert len(unseen) < 100  # the magic number at the start, statistics, unused fields of page headers


def test_another_archives_rows_are_an_error(tmp_path: Path) -> None:
    """As a changed byte in the footer may bring about."""
    path = tmp_path / "i.parquet"
    build(path, [Caption("a", "k", "of a"), Caption("b", "k", "of b")], ["a", "b"])
    data = path.read_bytes()
    assert data.count(b'{"a": 0, "b": 1}') == 1
    path.write_bytes(data.replace(b'{"a": 0, "b": 1}', b'{"a": 1, "b": 0}'))
    with pytest.raises(MdAssetsError, match="does not hold the captions of a"):
        read_captions(path, "a")


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
from md_assets.core.spec import Caption
from md_assets.storage import captions
from md_assets.storage.captions import CaptionIndexWriter
from md_assets_tests.storage.memory import peak_mib
captions.BUFFERED_ROWS = 5000
rows, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
folder.mkdir()
archives = [f"{n:04}" for n in range(1000)]
with CaptionIndexWriter(folder / "i.parquet", folder, archives) as writer:
    for i in range(rows):
        writer.add(Caption(archives[i * 7919 % 1000], f"{i:08}", f"{i} " + "x" * 200))
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
