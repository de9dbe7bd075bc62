"""The raw stage's tars: the same bytes every time, read as WebDataset reads them, and no damage goes unseen."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import OutputFile
from md_assets.storage.images import StoredImage
from md_assets.storage.raw_tar import RawSample, RawTarWriter, iter_raw_tar, spread_jpegs

CAPTIONS = [
    "plain",
    None,
    "",
    "猫 🐈 \n\t\"quoted\" 'single'",
    "<b>html</b> https://example.org",
    "x" * 100_000,
    "\ufeff",
]
KEYS = [f"train/000/{number:03}" for number in range(len(CAPTIONS))]
LONG_KEY = "train/000/" + "猫" * 300 + "/" + "y" * 500


def image(number: int, size_bytes: int = 900) -> StoredImage:
    return StoredImage(bytes([number]) * size_bytes, 512, 600 + number, 1024, 1200, "JPEG", original=number % 2 == 0)


def written(path: Path, captions: list[str | None] = CAPTIONS, keys: list[str] = KEYS) -> OutputFile:
    with RawTarWriter(path) as writer:
        for number, (key, caption) in enumerate(zip(keys, captions, strict=True)):
            writer.write(key, image(number), caption)
    return writer.output_file("train/000.tar")


def samples(captions: list[str | None] = CAPTIONS, keys: list[str] = KEYS) -> list[RawSample]:
    return [
        RawSample(key, image(number).jpeg, 512, 600 + number, caption)
        for number, (key, caption) in enumerate(zip(keys, captions, strict=True))
    ]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    assert list(iter_raw_tar(path, written(path))) == samples()


@pytest.mark.parametrize("key", [LONG_KEY, "train/000/a%2Eb%0Ac", "train/000/grün 猫"])
def test_keys_of_any_length_and_script(tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.tar"
    keys, captions = [key, "train/000/next"], ["one", "two"]
    assert list(iter_raw_tar(path, written(path, captions, keys))) == samples(captions, keys)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_unicode_caption_comes_back(tmp_path_factory: pytest.TempPathFactory, caption: str) -> None:
    path = tmp_path_factory.getbasetemp() / "captions.tar"
    path.unlink(missing_ok=True)
    (sample,) = iter_raw_tar(path, written(path, [caption], ["a"]))
    assert sample.caption == caption


def test_an_archive_without_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    assert list(iter_raw_tar(path, written(path, [], []))) == [] and spread_jpegs(path, 16) == []


def test_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    out = written(path)
    assert out == OutputFile("train/000.tar", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_same_samples_give_the_same_bytes_at_another_time_and_place(tmp_path: Path) -> None:
    first = written(tmp_path / "a.tar")
    time.sleep(1.1)  # a tar's clock ticks in seconds
    (tmp_path / "elsewhere").mkdir()
    assert written(tmp_path / "elsewhere" / "b.tar") == first


def test_members_tell_nothing_of_this_machine(tmp_path: Path) -> None:
    written(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.isreg()) == (0, 0, 0, "", "", True)


def test_webdataset_reads_it(tmp_path: Path) -> None:
    """It joins neighbours whose names agree up to the first dot of the last part."""
    written(tmp_path / "a.tar", ["one", None, "three"], [LONG_KEY, *KEYS[:2]])
    read: list[dict[str, bytes | str]] = []
    with tarfile.open(tmp_path / "a.tar", mode="r|") as tar:
        for info in tar:
            folder, _, name = info.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if not read or read[-1]["__key__"] != f"{folder}/{stem}":
                read.append({"__key__": f"{folder}/{stem}"})
            content = tar.extractfile(info)
            assert content is not None
            read[-1][suffix] = content.read()
    assert [sample["__key__"] for sample in read] == [LONG_KEY, *KEYS[:2]]
    assert all(set(sample) == {"__key__", "jpg", "json"} for sample in read)
    assert [json.loads(sample["json"]) for sample in read[:2]] == [
        {
            "key": LONG_KEY,
            "width": 512,
            "height": 600,
            "source_width": 1024,
            "source_height": 1200,
            "source_format": "JPEG",
            "original_bytes": True,
            "caption": "one",
        },
        {
            "key": KEYS[0],
            "width": 512,
            "height": 601,
            "source_width": 1024,
            "source_height": 1200,
            "source_format": "JPEG",
            "original_bytes": False,
        },
    ]


def test_tar_itself_reads_it(tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar here")
    written(tmp_path / "a.tar", ["one"], [LONG_KEY])
    listed = subprocess.run(
        ["tar", "tf", "a.tar", "--quoting-style=literal"], cwd=tmp_path, capture_output=True, check=True
    )
    assert listed.stdout.decode().splitlines() == [f"{LONG_KEY}.jpg", f"{LONG_KEY}.json"] and not listed.stderr


def assert_damage_is_found(path: Path, expected: OutputFile) -> None:
    with pytest.raises(MdAssetsError, match=r"is not what its ledger says\. Materialize raw"):
        list(iter_raw_tar(path, expected))


def test_a_cut_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    expected = written(path, ["one", "two"], KEYS[:2])
    data = path.read_bytes()
    for size in [*range(0, 7000, 7), *range(0, len(data), 512)]:
        path.write_bytes(data[:size])
        assert_damage_is_found(path, expected)


@pytest.mark.parametrize("flip", [0xFF, 0x80, 0x02, 0x63])
def test_a_changed_byte_anywhere_is_found_and_nothing_hangs(tmp_path: Path, flip: int) -> None:
    """0x80 at the start of a number makes it a binary one of up to 2**88, 0x63 turns a plain file into a sparse one."""
    path = tmp_path / "a.tar"
    expected = written(path, ["one"], KEYS[:1])
    data = path.read_bytes()
    for position in [*range(0, 512), *range(512, 1536, 50), *range(1536, 2300), len(data) - 1]:
        changed = bytearray(data)
        changed[position] ^= flip
        start = position // 512 * 512
        header = changed[start : start + 512]
        if start in (0, 1536):  # a header, whose own checksum shall not be what finds it
            header[148:156] = b" " * 8
            changed[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        if changed != data:
            path.write_bytes(changed)
            assert_damage_is_found(path, expected)


def test_what_is_added_or_exchanged_is_found(tmp_path: Path) -> None:
    path, other = tmp_path / "a.tar", tmp_path / "b.tar"
    expected = written(path)
    written(other, ["other", *CAPTIONS[1:]])
    assert_damage_is_found(other, expected)
    path.write_bytes(path.read_bytes() + b"\0")
    assert_damage_is_found(path, expected)


@pytest.mark.parametrize("content", [b"", b"text", b"[]", b"[" * 100_000, b"{}", b"5", b'{"key": "a"}'])
def test_metadata_that_are_none_are_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("a.jpg", b"1"), ("a.json", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    file = OutputFile("a.tar", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert_damage_is_found(path, file)


def test_an_absent_file_is_damage(tmp_path: Path) -> None:
    assert_damage_is_found(tmp_path / "a.tar", OutputFile("a.tar", 1, "0" * 64))


def test_an_error_while_writing_closes_the_file_and_comes_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), RawTarWriter(tmp_path / "a.tar") as writer:
        writer.write("a", image(1), None)
        raise RuntimeError("mine")
    assert writer._file.closed


@pytest.mark.parametrize(("count", "numbers"), [(0, []), (1, [0]), (3, [0, 2, 4]), (7, range(7)), (100, range(7))])
def test_images_for_looking_at_are_spread_over_the_archive(tmp_path: Path, count: int, numbers: list[int]) -> None:
    written(tmp_path / "a.tar")
    assert spread_jpegs(tmp_path / "a.tar", count) == [image(number).jpeg for number in numbers]
