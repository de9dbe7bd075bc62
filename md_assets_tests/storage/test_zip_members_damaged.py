"""Broken zips: none passes for a shorter one, and no header makes a reader hang, crash or fill memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.spec import Member
from md_assets.storage.archives import iter_members
from md_assets_tests.storage.made_archives import SIZES_BEHIND_DATA, STORED, ZipEntry, zip_of

LIMIT_BYTES = 1_000_000
A, B = ZipEntry("val/a.jpg", b"a" * 700), ZipEntry("val/b.jpg", b"b" * 50, method=STORED)
MEMBERS = [Member("val/a.jpg", b"a" * 700), Member("val/b.jpg", b"b" * 50)]
ZIP = zip_of(A, B)
DIRECTORY, END = ZIP.index(b"PK\1\2"), ZIP.index(b"PK\5\6")


def members_of(folder: Path, data: bytes, limit_bytes: int = LIMIT_BYTES) -> list[Member]:
    file = folder / "archive.zip"
    file.write_bytes(data)
    return list(iter_members(file, "zip", limit_bytes))


def refusal_of(folder: Path, data: bytes) -> CorruptArchiveError:
    with pytest.raises(CorruptArchiveError) as caught:
        members_of(folder, data)
    assert str(caught.value).startswith("archive.zip is no usable zip: ") and "\n" not in str(caught.value)
    return caught.value


def test_cut_anywhere_it_fails(tmp_path: Path) -> None:
    data = zip_of(A, B, comment=b"a comment")
    for size in range(len(data)):
        assert refusal_of(tmp_path, data[:size]).reason == "truncated", size


def test_a_piece_missing_in_the_middle_is_found(tmp_path: Path) -> None:
    for start in range(0, END - 5, 3):
        assert refusal_of(tmp_path, ZIP[:start] + ZIP[start + 5 :]).reason == "corrupt", start


def test_one_flipped_byte_is_always_found_or_harmless(tmp_path: Path) -> None:
    """Harmless are versions, times, attributes and flags of no meaning here."""
    unharmed = 0
    for position in range(len(ZIP)):
        data = bytearray(ZIP)
        data[position] ^= 0x41
        try:
            members = members_of(tmp_path, bytes(data))
        except CorruptArchiveError as error:
            assert error.reason in ("truncated", "corrupt", "not_an_archive")
        else:
            assert [member.name for member in members] == [member.name for member in MEMBERS]
            assert all(member.refused or member in MEMBERS for member in members)
            unharmed += members == MEMBERS
    assert unharmed == 48


@given(st.lists(st.tuples(st.integers(0, len(ZIP) - 1), st.integers(0, 255)), min_size=1, max_size=12))
@settings(max_examples=200, deadline=2000)
def test_bytes_of_anything_give_members_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(ZIP)
    for position, value in changes:
        data[position] = value
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    try:
        for member in members_of(folder, bytes(data)):
            assert not member.name.startswith("/") and ".." not in member.name.split("/")
    except CorruptArchiveError as error:
        assert error.reason in ("truncated", "corrupt", "not_an_archive")


@pytest.mark.parametrize(
    ("data", "reason", "says"),
    [
        (b"", "truncated", "it is empty"),
        (b"<!DOCTYPE html><title>403</title>", "not_an_archive", "it is a web page"),
        (b"\r\n  <html>" + b"x" * 200_000, "not_an_archive", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 50, "not_an_archive", "it has no end record"),
        (bytes(100_000), "not_an_archive", "it has no end record"),
        (ZIP + b"x", "corrupt", "there is something behind its end record"),
        (ZIP + bytes(70_000), "truncated", "it is cut off"),
    ],
    ids=["empty", "page", "page-behind-space", "lfs-pointer", "zeros", "tail", "long-tail"],
)
def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path, data: bytes, reason: str, says: str) -> None:
    error = refusal_of(tmp_path, data)
    assert error.reason == reason and says in str(error)


def bomb(full_bytes: int) -> bytes:
    deflate = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return b"".join(deflate.compress(bytes(2**20)) for _ in range(full_bytes >> 20)) + deflate.flush()


def unended(data: bytes) -> bytes:
    """All of the data, but no block that says it is the last."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflate.compress(data) + deflate.flush(zlib.Z_SYNC_FLUSH)


DAMAGED = {
    "checksum": (replace(A, told={"crc": 7}), "val/a.jpg has the wrong checksum"),
    "checksum of a stored one": (replace(B, told={"crc": 7}), "val/b.jpg has the wrong checksum"),
    "more than declared": (replace(A, told={"full_bytes": 699}), "val/a.jpg has another size than it declares"),
    "less than declared": (replace(A, told={"full_bytes": 701}), "val/a.jpg has another size than it declares"),
    "stored in another size": (replace(B, told={"full_bytes": 49}), "val/b.jpg has another size than it declares"),
    "nothing": (replace(A, packed=b""), "val/a.jpg has another size than it declares"),
    "deflate data cut": (replace(A, packed=A.packed_data()[:-2]), "val/a.jpg has another size than it declares"),
    "deflate data without end": (replace(A, packed=unended(A.data)), "another size than it declares"),
    "something behind deflate data": (replace(A, packed=A.packed_data() + b"x"), "another size than it declares"),
    "no deflate data": (replace(A, packed=b"\xff" * 20), "val/a.jpg is damaged"),
    "another local name": (replace(A, told_locally={"name": b"val/c.jpg"}), "val/a.jpg contradicts the directory"),
    "another local method": (replace(A, told_locally={"method": 0}), "val/a.jpg contradicts the directory"),
    "encrypted locally": (replace(A, told_locally={"flags": 1}), "val/a.jpg contradicts the directory"),
    "another local checksum": (replace(A, told_locally={"crc": 7}), "val/a.jpg contradicts the directory"),
    "another local size": (replace(A, told_locally={"full_bytes": 7}), "val/a.jpg contradicts the directory"),
    "no local header": (replace(A, told_locally={"signature": b"PK\7\7"}), "no header of val/a.jpg"),
    "elsewhere": (replace(A, at=80), "no header of val/a.jpg"),
    "behind the directory": (replace(A, at=10_000), "an entry that lies behind it"),
    "zip64 without its sizes": (replace(A, told={"full_bytes": 0xFFFFFFFF}), "another size than it declares"),
    "streamed with another checksum": (replace(A, flags=SIZES_BEHIND_DATA, told={"crc": 7}), "wrong checksum"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_member_that_is_not_what_it_says_fails_the_archive(tmp_path: Path, kind: str) -> None:
    odd, says = DAMAGED[kind]
    path = tmp_path / "archive.zip"
    path.write_bytes(zip_of(ZipEntry("first.jpg", b"1"), odd, ZipEntry("last.jpg", b"2")))
    with pytest.raises(CorruptArchiveError, match=says) as caught:
        list(iter_members(path, "zip", 2**40))
    assert caught.value.reason == "corrupt"


def test_a_member_never_inflates_to_more_than_it_declares(tmp_path: Path) -> None:
    """64 MiB of zeros that pass for 700 bytes."""
    data = zip_of(replace(A, packed=bomb(2**26)))
    tracemalloc.start()
    error = refusal_of(tmp_path, data)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "another size than it declares" in str(error) and peak_bytes < 10_000_000


# Entries that overlap: what makes 46 MB of zip 4.5 PB of files


def test_entries_at_the_same_place_are_refused(tmp_path: Path) -> None:
    assert "two of its entries are at the same place" in str(refusal_of(tmp_path, zip_of(A, replace(A, at=0))))


def test_an_entry_that_reaches_into_the_next_one_is_refused(tmp_path: Path) -> None:
    kernel = zip_of(ZipEntry("in.jpg", b"2" * 50, method=STORED))
    local = kernel[: kernel.index(b"PK\1\2")]
    outer = ZipEntry("out.jpg", local, method=STORED)
    inner = ZipEntry("in.jpg", b"2" * 50, method=STORED, at=30 + len("out.jpg"))
    data = zip_of(outer, inner)
    assert "out.jpg reaches into what follows it" in str(refusal_of(tmp_path, data))


def test_an_entry_that_reaches_into_the_directory_is_refused(tmp_path: Path) -> None:
    odd = replace(B, told={"full_bytes": 51, "packed_bytes": 51})
    assert "val/b.jpg reaches into what follows it" in str(refusal_of(tmp_path, zip_of(A, odd)))


def test_a_zip_in_a_cut_zip_does_not_pass_for_it(tmp_path: Path) -> None:
    inner = zip_of(B)
    data = zip_of(ZipEntry("inner.zip", inner, method=STORED), A)
    cut = data[: data.index(inner) + len(inner)]
    assert "its directory is not where it should be" in str(refusal_of(tmp_path, cut))


# The directory itself


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (END + 4, b"\1\0", "one part of several"),
        (END + 6, b"\1\0", "one part of several"),
        (END + 10, b"\3\0", "has 2 entries and should have 3"),
        (END + 12, struct.pack("<L", END - DIRECTORY - 1), "its directory is not where it should be"),
        (END + 16, struct.pack("<L", DIRECTORY + 1), "1 bytes of it are missing"),
        (END + 16, b"\xff" * 4, "bytes of it are missing"),
        (DIRECTORY, b"PK\7\7", "its directory is damaged"),
        (DIRECTORY + 28, b"\xff\xff", "its directory is damaged"),
    ],
)
def test_a_damaged_directory_is_told(tmp_path: Path, at: int, value: bytes, says: str) -> None:
    error = refusal_of(tmp_path, ZIP[:at] + value + ZIP[at + len(value) :])
    assert error.reason == "corrupt" and says in str(error)


def test_a_damaged_zip64_record_is_told(tmp_path: Path) -> None:
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, END, 1)
    assert "its end record is damaged" in str(refusal_of(tmp_path, ZIP[:END] + bytes(56) + locator + ZIP[END:]))


def test_memory_does_not_grow_with_the_directory(tmp_path: Path) -> None:
    """1,000 entries with comments of 60 KB: 60 MB of it."""
    path = tmp_path / "archive.zip"
    count, comment = 1_000, random.Random(1).randbytes(60_000)
    with path.open("wb") as file:
        for number in range(count):
            file.write(struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 0, 0, 6, 0) + b"%06d" % number)
        start = file.tell()
        for number in range(count):
            sizes = 6, 0, len(comment)
            file.write(
                struct.pack("<4s6H3L5H2L", b"PK\1\2", 0x314, 20, 0, 0, 0, 33, 0, 0, 0, *sizes, 0, 0, 0, number * 36)
            )
            file.write(b"%06d" % number + comment)
        size = file.tell() - start
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 0))
    tracemalloc.start()
    names = [member.name for member in iter_members(path, "zip", LIMIT_BYTES)]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert names == [f"{number:06}" for number in range(count)] and peak_bytes < 5_000_000 < path.stat().st_size
