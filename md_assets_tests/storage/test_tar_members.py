"""Tars from outside: nothing is extracted, nothing hangs, and a broken one never passes for a shorter one."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.errors import CorruptArchiveError
from md_assets.core.ledger import Reason
from md_assets.core.spec import Member
from md_assets.storage.archives import iter_members, open_single_file
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


SPELLINGS = {
    "as BSD does": {"size": b"00000000005 "},
    "with leading spaces": {"size": b"          5\0"},
    "as POSIX.1-1988 does": {"checksum": b"%06o \0"},
    "seven digits": {"checksum": b"%07o\0"},
    "old type of a plain file": {"type": b"\0"},
    "contiguous file": {"type": b"7"},
    "base 256": {"size": b"\x80" + bytes(10) + b"\5"},
    "prefix": {"prefix": b"folder"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_headers_are_read_as_tarfile_reads_them(tmp_path: Path, spelling: str) -> None:
    fields = {"size": b"00000000005\0", "type": b"0", "prefix": b"", "checksum": b"%06o\0 ", **SPELLINGS[spelling]}
    data = bytearray(tar_of(entry("a.jpg", b"12345"), entry("b.jpg", b"2")))
    data[124:136], data[156:157], data[345 : 345 + len(fields["prefix"])] = (
        fields[f] for f in ("size", "type", "prefix")
    )
    data[148:156] = b" " * 8
    data[148:156] = fields["checksum"] % sum(data[:512])
    name = "folder/a.jpg" if fields["prefix"] else "a.jpg"
    assert [(m.name, m.data) for m in members_of(tmp_path, bytes(data))] == as_tarfile_reads(bytes(data))
    assert as_tarfile_reads(bytes(data)) == [(name, b"12345"), ("b.jpg", b"2")]


@pytest.mark.parametrize("block_bytes", [1, 511, 512, 513, 1500])
def test_it_does_not_matter_where_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr("md_assets.storage.tar_members.BLOCK_BYTES", block_bytes)
    assert members_of(tmp_path, TGZ) == MEMBERS
    assert [m.refused for m in members_of(tmp_path, TAR, 600)] == [Reason.TOO_LARGE, None, None, None]


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
