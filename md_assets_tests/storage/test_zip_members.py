"""Zips from outside: what they hold comes out as it went in, and nothing that they say of themselves is believed."""

from __future__ import annotations

import io
import random
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.spec import Member
from md_assets.storage.archives import iter_members, open_zip_member
from md_assets_tests.storage.made_archives import DEFLATED, ENCRYPTED, SIZES_BEHIND_DATA, STORED, ZipEntry, zip_of

LIMIT_BYTES = 1_000_000
A, B = ZipEntry("val/a.jpg", b"a" * 700), ZipEntry("val/b.jpg", b"b" * 3, method=STORED)
MEMBERS = [Member("val/a.jpg", b"a" * 700), Member("val/b.jpg", b"b" * 3)]


def members_of(folder: Path, data: bytes, limit_bytes: int = LIMIT_BYTES) -> list[Member]:
    file = folder / "archive.zip"
    file.write_bytes(data)
    return list(iter_members(file, "zip", limit_bytes))


def by_zipfile(write: Callable[[zipfile.ZipFile], object], stream: bool = False, **options: Any) -> bytes:
    """What the standard library writes; `stream` to a pipe, so that sizes come behind the data."""
    file = Pipe() if stream else io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        write(archive)
    return file.getvalue()


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise io.UnsupportedOperation

    def tell(self) -> int:
        raise io.UnsupportedOperation


def write_both(archive: zipfile.ZipFile) -> None:
    for member in MEMBERS:
        archive.writestr(member.name, member.data)


@pytest.mark.parametrize("stream", [False, True], ids=["file", "pipe"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_files_come_in_the_directorys_order(tmp_path: Path, compression: int, stream: bool) -> None:
    assert members_of(tmp_path, by_zipfile(write_both, stream, compression=compression)) == MEMBERS


@pytest.mark.parametrize("stream", [False, True], ids=["file", "pipe"])
def test_zip64_fields_are_read(tmp_path: Path, stream: bool) -> None:
    def write(archive: zipfile.ZipFile) -> None:
        for member in MEMBERS:
            with archive.open(member.name, "w", force_zip64=True) as file:
                file.write(member.data)

    assert members_of(tmp_path, by_zipfile(write, stream, compression=zipfile.ZIP_DEFLATED)) == MEMBERS


def test_zip64_fields_are_found_among_others(tmp_path: Path) -> None:
    """Another extra field in front, and an entry of which only one size is in the extra field."""
    in_front = struct.pack("<HH20s", 0x5455, 20, b"more than two numbers")
    packed_bytes = len(A.packed_data())
    extra = in_front + struct.pack("<HHQQ", 1, 16, 700, packed_bytes)
    both = replace(A, told={"full_bytes": 0xFFFFFFFF, "packed_bytes": 0xFFFFFFFF}, extra=extra)
    one = replace(A, name="val/c.jpg", told={"packed_bytes": 0xFFFFFFFF}, extra=struct.pack("<HHQ", 1, 8, packed_bytes))
    assert members_of(tmp_path, zip_of(both, one, B)) == [MEMBERS[0], Member("val/c.jpg", A.data), MEMBERS[1]]


def test_a_zip64_end_record_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    data = by_zipfile(write_both)
    assert b"PK\6\6" in data
    assert members_of(tmp_path, data) == MEMBERS


def test_the_directory_may_have_another_order_than_the_data(tmp_path: Path) -> None:
    b_start = 30 + len(A.raw_name) + len(A.packed_data())
    data, turned = zip_of(A, B), zip_of(replace(B, at=b_start), replace(A, at=0))
    turned = data[: data.index(b"PK\1\2")] + turned[turned.index(b"PK\1\2") :]
    assert members_of(tmp_path, turned) == MEMBERS[::-1]


def test_a_comment_and_something_in_front_do_no_harm(tmp_path: Path) -> None:
    assert members_of(tmp_path, zip_of(A, B, front=b"#!/bin/unpack\n", comment=b"PK\5\6 by hand" * 3)) == MEMBERS


def test_an_empty_zip_has_no_members(tmp_path: Path) -> None:
    assert members_of(tmp_path, zip_of()) == []


def test_members_of_the_same_name_come_as_they_are(tmp_path: Path) -> None:
    assert members_of(tmp_path, zip_of(A, ZipEntry(A.name, b"other"))) == [MEMBERS[0], Member("val/a.jpg", b"other")]


@pytest.mark.parametrize("name", ["val/", "val"])
def test_folders_are_left_out(tmp_path: Path, name: str) -> None:
    folder = ZipEntry(name, mode=stat.S_IFDIR | 0o755, method=STORED)
    assert members_of(tmp_path, zip_of(folder, A, B)) == MEMBERS


def test_a_folder_that_has_data_is_a_member(tmp_path: Path) -> None:
    assert members_of(tmp_path, zip_of(ZipEntry("val/", b"1"))) == [Member("val", b"1")]


@pytest.mark.parametrize("packed", [b"", b"\3\0"])
def test_an_empty_file_may_be_deflated_or_not(tmp_path: Path, packed: bytes) -> None:
    assert members_of(tmp_path, zip_of(ZipEntry("a.jpg", packed=packed), B)) == [Member("a.jpg", b""), MEMBERS[1]]


@pytest.mark.parametrize("block_bytes", [1, 7, 300])
def test_it_does_not_matter_where_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr("md_assets.storage.zip_members.BLOCK_BYTES", block_bytes)
    noise = random.Random(1).randbytes(900)
    assert members_of(tmp_path, zip_of(A, ZipEntry("n", noise), B)) == [MEMBERS[0], Member("n", noise), MEMBERS[1]]


def test_position_rises_to_the_files_size(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zip_of(*(ZipEntry(f"{i}.jpg", bytes(300_000), method=STORED) for i in range(20))))
    positions: list[int] = []
    list(iter_members(path, "zip", LIMIT_BYTES, positions.append))
    data_bytes = [300_000 + 30 + len(f"{i}.jpg") for i in range(20)]
    assert positions == list(accumulate(data_bytes)) and positions[-1] < path.stat().st_size


# Members that are no plain files, names that lead elsewhere


@pytest.mark.parametrize(
    "kind",
    [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK],
    ids=lambda kind: stat.filemode(kind),
)
def test_what_is_no_file_is_refused_by_name_and_the_rest_is_read(tmp_path: Path, kind: int) -> None:
    odd = ZipEntry("val/odd.jpg", b"/etc/passwd", mode=kind | 0o777)
    refused = Member("val/odd.jpg", b"", Reason.UNSAFE_MEMBER)
    assert members_of(tmp_path, zip_of(A, odd, B)) == [MEMBERS[0], refused, MEMBERS[1]]


NAMES: dict[str | bytes, str] = {
    "../evil.jpg": "%2E%2E/evil.jpg",
    "val/../../evil.jpg": "val/%2E%2E/%2E%2E/evil.jpg",
    "/val/a.jpg": "%2Fval/a.jpg",
    "": "%2E",
    "val/a.jpg": "val/a.jpg",
    "val/line\nend.jpg": "val/line%0Aend.jpg",
    b"val/\xff\xfe.jpg": "val/%FF%FE.jpg",
    b"val/\x82.jpg": "val/%82.jpg",
    "val/é.jpg": "val/é.jpg",
    "val/a\0x.jpg": "val/a%00x.jpg",
    "val/a\0y.jpg": "val/a%00y.jpg",
    "..\\evil.jpg": "..%5Cevil.jpg",
    "C:\\evil.jpg": "C:%5Cevil.jpg",
}


@pytest.mark.parametrize("flags", [0, 1 << 11], ids=["cp437", "utf-8"])
def test_no_name_leads_outside_and_all_stay_apart(tmp_path: Path, flags: int) -> None:
    members = members_of(tmp_path, zip_of(*(ZipEntry(name, b"1", flags=flags) for name in NAMES)))
    assert [member.name for member in members] == list(NAMES.values())
    assert [m.name for m in members if m.refused] == list(NAMES.values())[:4]
    assert {m.refused for m in members} == {None, Reason.UNSAFE_MEMBER}
    assert [p.name for p in tmp_path.iterdir()] == ["archive.zip"]


@pytest.mark.parametrize(
    "odd",
    [
        ZipEntry("odd.jpg", b"x" * 20, flags=ENCRYPTED, method=STORED),
        ZipEntry("odd.jpg", b"x" * 20, flags=ENCRYPTED | SIZES_BEHIND_DATA, method=STORED),
        ZipEntry("odd.jpg", b"x" * 20, method=9),
        ZipEntry("odd.jpg", b"x" * 20, method=99),
        ZipEntry("odd.jpg", b"x" * 20, flags=1 << 5),
    ],
    ids=["encrypted", "encrypted-streamed", "deflate64", "aes", "patch"],
)
def test_what_cannot_be_unpacked_is_refused_and_the_rest_is_read(tmp_path: Path, odd: ZipEntry) -> None:
    refused = Member("odd.jpg", b"", Reason.UNREADABLE_MEMBER)
    assert members_of(tmp_path, zip_of(A, odd, B)) == [MEMBERS[0], refused, MEMBERS[1]]


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_no_source_uses_are_refused(tmp_path: Path, compression: int) -> None:
    members = members_of(tmp_path, by_zipfile(write_both, compression=compression))
    assert members == [Member(member.name, b"", Reason.UNREADABLE_MEMBER) for member in MEMBERS]


def test_a_larger_member_is_refused_unread(tmp_path: Path) -> None:
    """Its data are not even what they should be."""
    large = ZipEntry("a.jpg", b"a" * 101, packed=b"no deflate data")
    at_limit = ZipEntry("b.jpg", b"b" * 100)
    expected = [Member("a.jpg", b"", Reason.TOO_LARGE), Member("b.jpg", b"b" * 100)]
    assert members_of(tmp_path, zip_of(large, at_limit), 100) == expected


# One file in a zip


def read_member(
    folder: Path, data: bytes, name: str, read: Callable[[Any], object] = lambda file: file.read()
) -> object:
    path = folder / "annotations.zip"
    path.write_bytes(data)
    with open_zip_member(path, name) as file:
        return read(file)


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_a_file_in_a_zip_is_a_stream(tmp_path: Path, method: int) -> None:
    rows = ZipEntry("annotations/rows.jsonl", b"1\n2\n3", method=method)
    data = zip_of(ZipEntry("annotations/", mode=0, method=STORED), A, rows)
    assert read_member(tmp_path, data, "annotations/rows.jsonl", list) == [b"1\n", b"2\n", b"3"]


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ([A], "annotations.zip holds no file rows.jsonl"),
        ([ZipEntry("rows.jsonl/", mode=0, method=STORED)], "holds no file rows.jsonl"),
        ([ZipEntry("rows.jsonl", b"1"), ZipEntry("./rows.jsonl", b"2")], "holds more than one file rows.jsonl"),
        ([ZipEntry("rows.jsonl", b"1", flags=ENCRYPTED)], "no plain file, encrypted or compressed in an unknown way"),
        ([ZipEntry("rows.jsonl", b"a", mode=stat.S_IFLNK)], "no plain file, encrypted or compressed in an unknown way"),
        ([ZipEntry("rows.jsonl", b"1" * 9, told={"crc": 7})], "rows.jsonl has the wrong checksum"),
    ],
    ids=["none", "folder", "two", "encrypted", "link", "checksum"],
)
def test_what_is_not_exactly_one_whole_file_is_refused(tmp_path: Path, entries: list[ZipEntry], what: str) -> None:
    with pytest.raises(CorruptArchiveError, match=what):
        read_member(tmp_path, zip_of(*entries), "rows.jsonl")


def test_the_checksum_is_verified_even_if_the_reader_stops_early(tmp_path: Path) -> None:
    rows = ZipEntry("rows.jsonl", random.Random(1).randbytes(3_000_000), method=STORED, told={"crc": 7})
    with pytest.raises(CorruptArchiveError, match="wrong checksum"):
        read_member(tmp_path, zip_of(rows), "rows.jsonl", lambda file: file.read(10))


def test_an_error_of_the_reader_stays_its_own(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        read_member(tmp_path, zip_of(A), "val/a.jpg", fail)
