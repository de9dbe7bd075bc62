"""Archives from outside: nothing is extracted, nothing hangs, and a broken one never passes for a shorter one."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.spec import Member
from md_assets.storage.archives import iter_members, open_single_file

LIMIT_BYTES = 1_000_000
FILES = [("./000/a.jpg", b"a" * 700), ("./000/b.jpg", b"b" * 512), ("./000/empty.jpg", b""), ("./000/c.jpg", b"c" * 3)]
MEMBERS = [Member(name.removeprefix("./"), data) for name, data in FILES]


def entry(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, errors="surrogateescape") as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


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


@pytest.mark.parametrize("data", [TAR, TGZ, gzip.compress(TAR[:1000]) + gzip.compress(TAR[1000:])])
def test_files_come_in_order_with_safe_names(tmp_path: Path, data: bytes) -> None:
    assert members_of(tmp_path, data) == MEMBERS


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_flavour_of_tar_is_read(tmp_path: Path, format: int) -> None:
    name = "/".join(["x" * 70, "y" * 70, "grün.jpg"])
    assert members_of(tmp_path, tar_of(entry(name, b"1"), format=format)) == [Member(name, b"1")]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole(tmp_path: Path, format: int) -> None:
    name = "000/" + "猫" * 400 + ".jpg"
    assert members_of(tmp_path, tar_of(entry(name, b"1"), format=format)) == [Member(name, b"1")]


def test_folders_are_left_out(tmp_path: Path) -> None:
    folder = entry("000", type=tarfile.DIRTYPE)
    assert members_of(tmp_path, tar_of(folder, entry("000/a.jpg", b"1"))) == [Member("000/a.jpg", b"1")]


def test_position_rises_to_the_files_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(*(entry(f"{i}.jpg", bytes(300_000)) for i in range(20))))
    positions: list[int] = []
    list(iter_members(path, "tar", LIMIT_BYTES, positions.append))
    assert len(positions) == 20 and positions == sorted(positions)
    assert 0 < positions[0] < positions[-1] <= path.stat().st_size


def test_a_format_that_is_not_read_yet_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="zip"):
        list(iter_members(tmp_path / "a.zip", "zip", LIMIT_BYTES))


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
        for member in members_of(folder, bytes(data)):
            assert not member.name.startswith("/") and ".." not in member.name.split("/")
    except CorruptArchiveError as error:
        assert error.reason in ("truncated", "corrupt", "not_an_archive")


def fit_checksum(data: bytearray, start: int = 0) -> None:
    header = data[start : start + 512]
    header[148:156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(header)


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
        (TGZ + b"garbage", "corrupt"),
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


# One file in a tar


def single(tmp_path: Path, data: bytes, read: Callable[[Any], object] = lambda file: file.read()) -> object:
    path = tmp_path / "rows.jsonl.tgz"
    path.write_bytes(data)
    with open_single_file(path) as file:
        return read(file)


def test_a_single_file_is_streamed_by_line(tmp_path: Path) -> None:
    data = tar_of(entry("data", type=tarfile.DIRTYPE), entry("data/rows.jsonl", b"1\n2\n3"))
    assert single(tmp_path, gzip.compress(data), lambda file: list(file)) == [b"1\n", b"2\n", b"3"]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (tar_of(), "holds no file"),
        (tar_of(entry("link", type=tarfile.SYMTYPE, linkname="x")), "holds no file"),
        (tar_of(entry("a", b"1"), entry("b", b"2")), "holds more than one file"),
        (gzip.compress(tar_of(entry("a", b"1" * 5000)))[:-6], "is cut off"),
        (tar_of(entry("a", b"1" * 5000))[:3000], "unexpected end of data"),
    ],
    ids=["none", "link", "two", "tgz-cut", "tar-cut"],
)
def test_what_is_not_exactly_one_whole_file_is_refused(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(CorruptArchiveError, match=what):
        single(tmp_path, data)


def test_a_cut_is_found_even_if_the_reader_stops_early(tmp_path: Path) -> None:
    data = gzip.compress(tar_of(entry("a", b"1\n" * 5000)))
    with pytest.raises(CorruptArchiveError, match="cut off"):
        single(tmp_path, data[:-1], lambda file: file.readline())


def test_an_error_of_the_reader_stays_its_own(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        single(tmp_path, tar_of(entry("a", b"1")), fail)


# Members that are no plain files, names that lead elsewhere


@pytest.mark.parametrize(
    ("type", "fields"),
    [
        (tarfile.SYMTYPE, {"linkname": "/etc/passwd"}),
        (tarfile.LNKTYPE, {"linkname": "000/a.jpg"}),
        (tarfile.FIFOTYPE, {}),
        (tarfile.CHRTYPE, {"devmajor": 1, "devminor": 5}),
        (tarfile.BLKTYPE, {}),
        (b"Z", {}),
    ],
    ids=["symlink", "hard-link", "fifo", "character-device", "block-device", "unknown"],
)
def test_what_is_no_file_is_refused_by_name_and_the_rest_is_read(
    tmp_path: Path, type: bytes, fields: dict[str, object]
) -> None:
    data = tar_of(entry("000/a.jpg", b"1"), entry("000/odd.jpg", type=type, **fields), entry("000/b.jpg", b"2"))
    assert members_of(tmp_path, data) == [
        Member("000/a.jpg", b"1"),
        Member("000/odd.jpg", b"", Reason.UNSAFE_MEMBER),
        Member("000/b.jpg", b"2"),
    ]


NAMES = {
    "../evil.jpg": "%2E%2E/evil.jpg",
    "000/../../evil.jpg": "000/%2E%2E/%2E%2E/evil.jpg",
    "/000/a.jpg": "%2F000/a.jpg",
    "/../x": "%2F%2E%2E/x",
    "000/a.jpg": "000/a.jpg",
    "000/line\nend.jpg": "000/line%0Aend.jpg",
    "000/\udcff\udcfe.jpg": "000/%FF%FE.jpg",
    "000/a..b.jpg": "000/a..b.jpg",
    "000/%2E%2E.jpg": "000/%252E%252E.jpg",
}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_name_leads_outside_and_all_stay_apart(tmp_path: Path, format: int) -> None:
    data = tar_of(*(entry(name, b"1") for name in NAMES), format=format)
    members = members_of(tmp_path, data)
    assert [member.name for member in members] == list(NAMES.values())
    assert {m.name for m in members if m.refused} == {
        s for n, s in NAMES.items() if ".." in n.split("/") or n[0] == "/"
    }
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["archive.tgz"]


def test_nothing_is_written_whatever_an_archive_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    link = entry("out", type=tarfile.SYMTYPE, linkname="..")
    assert len(members_of(tmp_path, tar_of(link, entry("out/evil.jpg", b"1"), entry("000/a.jpg", b"1")))) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["archive.tgz"]


def test_a_sparse_file_is_read_with_its_holes_and_judged_by_its_full_size(tmp_path: Path) -> None:
    """As GNU tar writes it with --sparse: the map in the header, then the pieces that are no holes."""
    header = bytearray(tar_of(entry("sparse.jpg", b"x" * 512))[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0%011o\0" % (4096, 512)
    header[483:495] = b"%011o\0" % 8192
    fit_checksum(header)
    data = bytes(header) + b"x" * 512 + TAR
    holed = bytes(4096) + b"x" * 512 + bytes(8192 - 4096 - 512)
    assert members_of(tmp_path, data) == [Member("sparse.jpg", holed), *MEMBERS]
    assert members_of(tmp_path, data, 8000)[0] == Member("sparse.jpg", b"", Reason.TOO_LARGE)
