"""MDS shards: what mosaicml-streaming writes and reads is what is read here, and no damage goes unseen."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from streaming import LocalDataset, StreamingDataset

from md_assets.core.ledger import OutputFile
from md_assets.core.schema import MDS_COLUMNS, latents_columns
from md_assets.storage import mds
from md_assets.storage.mds import (
    ShardError,
    ShardReader,
    ShardWriter,
    iter_rows,
    ledgered_files,
    read_index,
    row_count,
    spread_rows,
    verify_shards,
)

Row = dict[str, Any]
CAPTIONS = ["plain", "", "猫 🐈\n\t", "x" * 100_000, "\ufeff"]


def rows_of(count: int) -> list[Row]:
    numbers = random.Random(count)
    return [
        {
            "key": f"train/000/{i:04}",
            "jpg": numbers.randbytes(numbers.choice([0, 1, 500, 3000])),
            "caption": CAPTIONS[i % len(CAPTIONS)],
            "width": numbers.choice([0, 512, 2**31 - 1]),
            "height": -i,
        }
        for i in range(count)
    ]


def written(directory: Path, rows: list[Row], columns: dict[str, str] = MDS_COLUMNS) -> Path:
    with ShardWriter(directory, columns) as writer:
        for row in rows:
            writer.write(row)
    assert writer.row_count == len(rows)
    return directory


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mds, "SHARD_SIZE_LIMIT_BYTES", 20_000)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What most tests read: streaming takes a second to write any directory."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mds, "SHARD_SIZE_LIMIT_BYTES", 20_000)
        written(folder / "several", rows_of(23))
    written(folder / "one_shard", [{**row, "caption": row["caption"][:20]} for row in rows_of(4)])
    return folder


@pytest.fixture
def several(tmp_path: Path, made: Path) -> Path:
    """23 rows in several shards."""
    return shutil.copytree(made / "several", tmp_path / "several")


@pytest.fixture
def one_shard(tmp_path: Path, made: Path) -> Path:
    """4 rows in one shard."""
    return shutil.copytree(made / "one_shard", tmp_path / "one_shard")


def plain(row: Row) -> Row:
    """A row as streaming gives it, its numbers as Python's and its images, which it decodes, left out."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in row.items() if name != "jpg"}


def test_streaming_reads_the_same_rows(several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for its locks
    ours = list(iter_rows(several))
    assert len(read_index(several)) > 3 and row_count(several) == 23
    reader = LocalDataset(str(several))
    encoded: list[Row] = []
    for shard in reader.shards:
        shard.column_encodings = [e if e != "jpeg" else "bytes" for e in shard.column_encodings]
    encoded = [{n: v.item() if hasattr(v, "item") else v for n, v in reader[i].items()} for i in range(23)]
    assert encoded == ours == rows_of(23)


def test_streaming_dataset_reads_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mds_rows: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mds, "SHARD_SIZE_LIMIT_BYTES", 20_000)
    rows = mds_rows("train/000", 9)
    directory = written(tmp_path / "a", rows)
    dataset = StreamingDataset(local=str(directory), shuffle=False, batch_size=1)
    assert [plain(row) for row in dataset] == [plain(row) for row in rows]
    assert [row["jpg"].size for row in dataset] == [(90, 70)] * 9
    assert [row["jpg"] for row in iter_rows(directory)] == [row["jpg"] for row in rows]


def test_columns_of_latents_come_back(tmp_path: Path) -> None:
    columns = latents_columns((256, 512), save_images=True)
    values = {"str": "text", "bytes": bytes(8192), "int32": 7, "jpeg": b"jpeg"}
    rows = [{name: values[encoding] for name, encoding in columns.items()}]
    assert list(iter_rows(written(tmp_path / "a", rows, columns))) == rows


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, small_shards: None) -> None:
    one, other = (written(tmp_path / name, rows_of(23)) for name in ("one", "deep/other"))
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir()) and len(names) > 4
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_shards_stay_below_the_limit_and_are_hashed(several: Path) -> None:
    for shard in read_index(several):
        data = shard.path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        assert shard.bytes <= 20_000 or shard.rows == 1


def test_a_row_larger_than_a_shard_has_one_to_itself(tmp_path: Path, small_shards: None) -> None:
    rows = rows_of(3)
    rows[1]["caption"] = "x" * 50_000
    directory = written(tmp_path / "a", rows)
    assert list(iter_rows(directory)) == rows and verify_shards(directory) == 3


def test_no_rows_give_an_index_without_shards(tmp_path: Path) -> None:
    directory = written(tmp_path / "a", [])
    assert [p.name for p in directory.iterdir()] == ["index.json"]
    assert (list(iter_rows(directory)), row_count(directory), verify_shards(directory)) == ([], 0, 0)
    assert list(spread_rows(directory, 16)) == []


def test_finishing_does_not_wait_for_uploads_that_there_are_none_of(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that would upload is still behind when the last row is written; streaming then sleeps for a second."""
    monkeypatch.setattr("streaming.base.format.base.writer.sleep", lambda _: pytest.fail("it sleeps"))
    with ShardWriter(tmp_path / "shards", MDS_COLUMNS) as writer:
        monkeypatch.setattr(writer._writer.cloud_writer, "upload_file", lambda _: time.sleep(0.02))  # type: ignore[attr-defined]
        for row in rows_of(23):
            writer.write(row)
    assert len(read_index(tmp_path / "shards")) > 2 and row_count(tmp_path / "shards") == 23


def test_an_error_while_writing_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), ShardWriter(tmp_path / "a", MDS_COLUMNS) as writer:
        writer.write(rows_of(1)[0])
        raise RuntimeError("mine")
    assert not (tmp_path / "a" / "index.json").exists()
    with pytest.raises(ShardError, match="is no index of MDS shards"):
        read_index(tmp_path / "a")


@pytest.mark.parametrize(
    ("count", "numbers"),
    [(0, []), (1, [0]), (2, [0, 22]), (3, [0, 11, 22]), (4, [0, 7, 15, 22]), (23, range(23)), (99, range(23))],
)
def test_rows_for_looking_at_are_spread_from_first_to_last(several: Path, count: int, numbers: list[int]) -> None:
    rows = rows_of(23)
    assert list(spread_rows(several, count)) == [rows[number] for number in numbers]


def test_rows_that_are_left_out_are_as_if_they_were_not_there(several: Path) -> None:
    rows = rows_of(23)
    gone = {rows[0]["key"], rows[11]["key"], rows[12]["key"], "another"}
    left = [row for row in rows if row["key"] not in gone]
    assert list(spread_rows(several, 3, gone)) == [left[0], left[10], left[19]]
    assert list(spread_rows(several, 99, gone)) == left
    assert list(spread_rows(several, 2, {row["key"] for row in rows})) == []


def test_ledgered_files_are_all_files_with_their_hashes(several: Path) -> None:
    files = ledgered_files(several, "train/000")
    assert sorted(Path(f.path).name for f in files) == sorted(p.name for p in several.iterdir())
    for file in files:
        data = (several / Path(file.path).name).read_bytes()
        assert file == OutputFile(f"train/000/{Path(file.path).name}", len(data), hashlib.sha256(data).hexdigest())


def test_a_merged_index_reaches_into_its_archives(several: Path, tmp_path: Path) -> None:
    index = json.loads((several / "index.json").read_text())
    for shard in index["shards"]:
        shard["raw_data"]["basename"] = f"several/{shard['raw_data']['basename']}"
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert list(iter_rows(tmp_path)) == rows_of(23) and verify_shards(tmp_path) == 23


# Damage


def test_verified_shards_have_their_rows(several: Path) -> None:
    assert verify_shards(several) == 23


def test_every_changed_byte_is_found(one_shard: Path) -> None:
    path = read_index(one_shard)[0].path
    data = path.read_bytes()
    for position in [*range(0, min(600, len(data))), *range(600, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ShardError, match=r"shard\.00000\.mds .*Materialize"):
            verify_shards(one_shard)
    path.write_bytes(data)
    assert verify_shards(one_shard) == 4


def test_any_cut_and_any_addition_is_found(one_shard: Path) -> None:
    path = read_index(one_shard)[0].path
    data = path.read_bytes()
    for damaged in [*(data[:size] for size in range(0, len(data), 11)), data + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"bytes, its index says|cannot be read"):
            verify_shards(one_shard)


def test_a_missing_shard_is_found(several: Path) -> None:
    (several / "shard.00001.mds").unlink()
    with pytest.raises(ShardError, match=r"shard\.00001\.mds is missing"):
        verify_shards(several)
    with pytest.raises(ShardError, match="cannot be read"):
        list(iter_rows(several))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 3),
        (("shards",), None),
        (("shards", 0), None),
        (("shards", 0, "samples"), 999),
        (("shards", 0, "raw_data"), None),
        (("shards", 0, "raw_data", "bytes"), 1),
        (("shards", 0, "raw_data", "hashes"), []),
        (("shards", 0, "raw_data", "hashes", "sha256"), "0" * 64),
        (("shards", 0, "raw_data", "basename"), "shard.99999.mds"),
        (("shards", 0, "column_sizes"), [None]),
        (("shards", 0, "column_names"), None),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_an_index_that_does_not_fit_is_found(several: Path, path: tuple[str | int, ...], value: object) -> None:
    index = json.loads((several / "index.json").read_text())
    place = index
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (several / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError):
        verify_shards(several)


@pytest.mark.parametrize("content", ["", "text", "[]", "{}", "null", "5"])
def test_an_index_that_is_none_is_said_so(tmp_path: Path, content: str) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ShardError, match="is no index of MDS shards"):
        read_index(tmp_path)


def rewritten(directory: Path, data: bytes, rows: int | None = None) -> ShardReader:
    """A reader of the only shard with other bytes, whose index says that they are right."""
    index = json.loads((directory / "index.json").read_text())
    shard = index["shards"][0]
    shard["raw_data"]["bytes"] = len(data)
    shard["samples"] = shard["samples"] if rows is None else rows
    (directory / "index.json").write_text(json.dumps(index))
    (directory / shard["raw_data"]["basename"]).write_bytes(data)
    return ShardReader(read_index(directory)[0])


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_a_shard_too_short_for_its_own_header_is_damaged(one_shard: Path, size: int) -> None:
    data = read_index(one_shard)[0].path.read_bytes()
    with pytest.raises(ShardError, match="is damaged"):
        rewritten(one_shard, data[:size])


def test_a_header_that_promises_more_rows_than_fit_is_damaged(one_shard: Path) -> None:
    data = read_index(one_shard)[0].path.read_bytes()
    with pytest.raises(ShardError, match="is damaged"):
        rewritten(one_shard, struct.pack("<I", 2**31) + data[4:], rows=2**31)


def test_a_damaged_row_is_an_error_and_the_others_are_read(one_shard: Path) -> None:
    rows = list(iter_rows(one_shard))
    data = bytearray(read_index(one_shard)[0].path.read_bytes())
    (start,) = struct.unpack_from("<I", data, 4 + 4 * 2)
    for value in (0, 1, 2**31, 2**32 - 1):
        struct.pack_into("<I", data, start, value)  # the length of the third row's key
        reader = rewritten(one_shard, bytes(data))
        assert [reader[i] for i in (0, 1, 3)] == [rows[i] for i in (0, 1, 3)]
        with pytest.raises(ShardError, match="row 2 is damaged"):
            reader[2]


def test_a_row_that_goes_on_behind_the_end_is_damaged(one_shard: Path) -> None:
    data = read_index(one_shard)[0].path.read_bytes()
    reader = rewritten(one_shard, data[:-1])
    with pytest.raises(ShardError, match="row 3 is damaged"):
        reader[3]


def test_text_that_is_not_utf_8_is_damage(one_shard: Path) -> None:
    data = read_index(one_shard)[0].path.read_bytes()
    reader = rewritten(one_shard, data.replace(b"train/000/0001", b"train/000/\xff\xff\xff\xff"))
    with pytest.raises(ShardError, match="row 1 is damaged"):
        reader[1]


@pytest.mark.parametrize("row", [-1, 4, 100])
def test_rows_that_do_not_exist(one_shard: Path, row: int) -> None:
    reader = ShardReader(read_index(one_shard)[0])
    assert len(reader) == 4
    with pytest.raises(IndexError):
        reader[row]
