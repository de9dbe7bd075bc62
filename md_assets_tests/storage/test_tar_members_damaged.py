"""Broken tars: nothing hangs or fills memory, and none passes for a shorter one."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.spec import Member
from md_assets.storage.archives import iter_members
from md_assets_tests.storage.made_archives import as_tarfile_reads, entry, fit_checksum, tar_of

LIMIT_BYTES = 1_000_000
FILES = [("./000/a.jpg", b"a" * 700), ("./000/b.jpg", b"b" * 512), ("./000/empty.jpg", b""), ("./000/c.jpg", b"c" * 3)]
MEMBERS = [Member(name.removeprefix("./"), data) for name, data in FILES]
TAR = tar_of(*(entry(name, data) for name, data in FILES))
TGZ = gzip.compress(TAR, mtime=0)


def members_of(path: Path, data: bytes, limit_bytes: int = LIMIT_BYTES) -> list[Member]:
    file = path / "archive.tgz"
    file.write_bytes(data)
    return list(iter_members(file, "tar", limit_bytes))


def refusal_of(path: Path, data: bytes) -> CorruptArchiveError:
    with pytest.raises(CorruptArchiveError) as caught:
        members_of(path, data)
    return caught.value


# Cut and damaged


@pytest.mark.parametrize("data", [TAR, TGZ], ids=["tar", "tgz"])
def test_cut_anywhere_it_fails_or_has_every_member(tmp_path: Path, data: bytes) -> None:
    """A tar cut inside the padding behind its end mark has lost nothing."""
    for size in range(min(len(data), len(TAR.rstrip(b"\0")) + 1100)):
        try:
            members = members_of(tmp_path, data[:size])
        except CorruptArchiveError as error:
            assert error.reason == "truncated", size
        else:
            assert data is TAR and members == MEMBERS, size


@pytest.mark.parametrize("compressed", [False, True])
def test_members_that_came_before_the_cut_do_not_hide_it(tmp_path: Path, compressed: bool) -> None:
    noise = random.Random(1).randbytes(900_000)
    data = tar_of(*(entry(f"{i}.jpg", noise) for i in range(5)))
    path = tmp_path / "archive.tgz"
    path.write_bytes(gzip.compress(data, 1)[:-1] if compressed else data[:-11_000])
    members = iter_members(path, "tar", LIMIT_BYTES)
    assert next(members) == Member("0.jpg", noise)
    with pytest.raises(CorruptArchiveError, match=r"^archive\.tgz is .*\. Run the archive again"):
        list(members)


def test_one_flipped_byte_of_a_tgz_is_always_found_or_harmless(tmp_path: Path) -> None:
    """Harmless are the header's time, flags and operating system."""
    for position in range(len(TGZ)):
        data = bytearray(TGZ)
        data[position] ^= 0x41
        try:
            assert members_of(tmp_path, bytes(data)) == MEMBERS and position < 10
        except CorruptArchiveError as error:
            assert error.reason in ("truncated", "corrupt", "not_an_archive")


def test_a_member_that_is_cut_is_not_given(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(TAR[:1000])
    with pytest.raises(CorruptArchiveError, match="cut off"):
        next(iter_members(path, "tar", LIMIT_BYTES))


def test_one_flipped_byte_of_a_header_is_always_found(tmp_path: Path) -> None:
    for position in (*range(0, 512, 3), *range(1536, 2048, 3)):
        data = bytearray(TAR)
        data[position] ^= 0x41
        assert refusal_of(tmp_path, bytes(data)).reason == ("not_an_archive" if position < 512 else "corrupt")


HEADER_BYTES = list(range(512)) + list(range(1536, 2048))


@given(st.lists(st.tuples(st.sampled_from(HEADER_BYTES), st.integers(0, 255)), min_size=1, max_size=12), st.booleans())
@settings(max_examples=400, deadline=2000)
def test_a_header_of_anything_gives_members_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], checksum_fits: bool
) -> None:
    data = bytearray(TAR)
    for position, value in changes:
        data[position] = value
    if checksum_fits:
        for start in (0, 1536):
            fit_checksum(data, start)
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    try:
        members = members_of(folder, bytes(data))
    except CorruptArchiveError as error:
        assert error.reason in ("truncated", "corrupt", "not_an_archive")
        return
    assert not any(member.name.startswith("/") or ".." in member.name.split("/") for member in members)
    expected = as_tarfile_reads(bytes(data))
    assert [(m.name, m.data) for m in members if not m.refused][: len(expected)] == expected


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"<!DOCTYPE html><title>403</title>", "not_an_archive"),
        (b"\r\n  <html>" + b"x" * 20_000, "not_an_archive"),
        (gzip.compress(b"<html>" + b"x" * 20_000), "not_an_archive"),
        (b"version https://git-lfs.github.com/spec/v1\n" * 50, "not_an_archive"),
        (b"PK\x03\x04" + bytes(range(256)) * 8, "not_an_archive"),
        (b"\x1f\x8b" + b"x" * 2000, "corrupt"),
        (TGZ[:-8] + bytes(4) + TGZ[-4:], "corrupt"),
        (TGZ + 9 * b"garbage", "corrupt"),
    ],
    ids=["empty", "page", "page-behind-space", "gzipped-page", "lfs-pointer", "zip", "no-gzip", "crc", "tail"],
)
def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path, data: bytes, reason: str) -> None:
    error = refusal_of(tmp_path, data)
    assert error.reason == reason
    assert "archive.tgz" in str(error) and "\n" not in str(error)


def test_a_member_may_be_called_like_a_tag(tmp_path: Path) -> None:
    assert members_of(tmp_path, tar_of(entry("<3.jpg", b"1"))) == [Member("<3.jpg", b"1")]


@pytest.mark.parametrize("tail", [bytes(1), bytes(512), bytes(3_000_000)])
def test_zeros_behind_the_end_are_padding(tmp_path: Path, tail: bytes) -> None:
    assert members_of(tmp_path, TAR + tail) == MEMBERS
    assert members_of(tmp_path, TGZ + tail) == MEMBERS


@pytest.mark.parametrize("tail", [b"x", bytes(2_000_000) + b"x", TAR])
def test_anything_else_behind_the_end_is_not(tmp_path: Path, tail: bytes) -> None:
    assert refusal_of(tmp_path, TAR + tail).reason == "corrupt"


def test_a_hole_does_not_end_an_archive(tmp_path: Path) -> None:
    """A block of zeros is the end mark; where a file has a hole, members would be missing."""
    assert refusal_of(tmp_path, TAR[:1536] + bytes(512) + TAR[2048:]).reason == "corrupt"


# Headers that promise too much


def huge(size_field: bytes, type: bytes = tarfile.REGTYPE) -> bytes:
    data = bytearray(tar_of(entry("a.jpg", b"1")))
    data[124:136] = size_field
    data[156:157] = type
    fit_checksum(data)
    return bytes(data)


BASE_256 = b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7
NEGATIVE = b"\xff" * 12
OCTAL_8_GIB = b"77777777777\0"


@pytest.mark.parametrize("type", [b"0", b"5", b"L", b"K", b"x", b"g", b"S", b"Z", b"1"])
@pytest.mark.parametrize("size_field", [BASE_256, NEGATIVE, OCTAL_8_GIB, b"garbagegarba"])
def test_sizes_that_cannot_be_neither_hang_nor_fill_memory(tmp_path: Path, size_field: bytes, type: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(huge(size_field, type) + bytes(2000))
    tracemalloc.start()
    try:
        members = list(iter_members(path, "tar", LIMIT_BYTES))
    except CorruptArchiveError:
        members = []
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 20_000_000
    assert all(not member.data for member in members)  # a link of any size has no data


@pytest.mark.parametrize("size", ["-512", "9223372036854775807", "abc", str(2**70)])
def test_sizes_of_pax_headers_are_not_believed_either(tmp_path: Path, size: str) -> None:
    info, _ = entry("a.jpg", b"1")
    info.pax_headers = {"size": size}
    data = tar_of((info, b"1"), entry("b.jpg", b"2"), format=tarfile.PAX_FORMAT)
    assert refusal_of(tmp_path, data).reason in ("corrupt", "truncated")


def test_a_name_may_not_fill_memory(tmp_path: Path) -> None:
    data = tar_of(entry("x" * 3_000_000, b"1"))
    assert "a header of 3000001 bytes" in str(refusal_of(tmp_path, gzip.compress(data)))


def test_a_larger_member_is_refused_unread_and_the_next_one_is_right(tmp_path: Path) -> None:
    data = tar_of(entry("a.jpg", b"a" * 101), entry("b.jpg", b"b" * 100))
    assert members_of(tmp_path, data, 100) == [Member("a.jpg", b"", Reason.TOO_LARGE), Member("b.jpg", b"b" * 100)]


@pytest.mark.slow
def test_memory_holds_one_member_however_large_the_refused_ones_and_many_the_others(tmp_path: Path) -> None:
    """512 MiB of zeros in a tgz of 2 MB, then 30,000 small files."""
    path = tmp_path / "a.tgz"
    with gzip.open(path, "wb", compresslevel=1) as file, tarfile.open(fileobj=file, mode="w|") as tar:
        info = tarfile.TarInfo("big.jpg")
        info.size = 2**29
        tar.addfile(info, Zeros())
        for number in range(30_000):
            tar.addfile(tarfile.TarInfo(f"{number}.jpg"))
    code = f"""
import pathlib
from md_assets.storage.archives import iter_members
from md_assets_tests.storage.memory import peak_mib
names = sum(1 for _ in iter_members(pathlib.Path({str(path)!r}), "tar", 2**28))
print(names, peak_mib())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, peak_mib = map(int, done.stdout.split())
    assert count == 30_001 and peak_mib < 120


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)
