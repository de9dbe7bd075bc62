"""The bad-input table, a row a test, in every container: what becomes of a sample, and what an archive never does."""

import gzip
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.ledger import Ledger, Reason
from md_assets.core.names import sample_key
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings
from md_assets.core.source import BytesProgress, HubFile, RemoteFile
from md_assets.core.spec import DatasetSpec, Member, OrphanCaption, Rejected, Sample
from md_assets.stages.mds import convert_archive
from md_assets.stages.once import published
from md_assets.stages.raw import fetch_archive
from md_assets.stages.verify import counts_balance
from md_assets.storage.image_pool import ImagePool
from md_assets.storage.mds import iter_rows
from md_assets.storage.raw_tar import RawSample, iter_raw_tar
from md_assets_tests.stages.conftest import png
from md_assets_tests.storage.made_archives import (
    CONTAINERS,
    LAYOUT,
    SIZES_BEHIND_DATA,
    ZipEntry,
    archive_of,
    entry,
    not_utf_8,
    parquet_of,
    tar_of,
    zip_of,
)
from md_assets_tests.storage.made_images import encoded, photo

ARCHIVE = "000"
IMAGES = ImageSettings(max_image_pixels=1_000_000, max_member_bytes=2_000_000)
Picture = Callable[..., bytes]


def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Sample | Rejected | OrphanCaption]:
    """An image, followed by its caption as `.txt` or with it in a column."""
    image: Sample | None = None
    for member in members:
        key = sample_key(archive, member.name.removesuffix(".txt"))
        if not member.name.endswith(".txt"):
            if image:
                yield image
            image = None
            if member.refused:
                yield Rejected(key, member.refused)
            else:
                image = Sample(key, member.data, member.fields.get("caption"))
        elif image and image.key == key:
            yield Sample(key, image.image, member.data.decode("utf-8", "replace"))
            image = None
        else:
            yield OrphanCaption(key)
    if image:
        yield image


class Copies:
    """Fetches from this machine."""

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> RemoteFile:
        shutil.copyfile(remote.url, destination)
        return remote


@dataclass
class Source:
    """A dataset of one archive in one kind of container, and what the stages publish of it."""

    folder: Path
    container: str

    @property
    def file(self) -> Path:
        return self.folder / f"source/{ARCHIVE}.{self.container}"

    @property
    def root(self) -> DataRoot:
        return DataRoot(self.folder / "data")

    @property
    def spec(self) -> DatasetSpec:
        layout = LAYOUT if self.container == "parquet" else None
        return DatasetSpec("invented", "Invented", "", (ARCHIVE,), CONTAINERS[self.container],
                           lambda archive: HubFile("an/other", archive), read_samples, parquet=layout)  # fmt: skip

    def put(self, data: bytes) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(data)

    def put_members(self, members: Sequence[tuple[str, bytes]]) -> None:
        self.put(archive_of(self.container, members))

    def locate(self) -> RemoteFile:
        digest = hashlib.sha256(self.file.read_bytes()).hexdigest()
        return RemoteFile(self.file.name, str(self.file), self.file.stat().st_size, None, digest, "")

    def raw(self) -> Ledger:
        """Runs the stage, whose ledger balances and is the published one."""
        outcome = fetch_archive(self.spec, ARCHIVE, self.locate, self.root, IMAGES, fetcher=Copies(), pool=ImagePool(0))
        ledger = outcome.ledger
        assert ledger.read == ledger.kept + sum(map(len, ledger.rejected.values()))
        assert ledger.kept == len(self.samples(ledger)) and ledger == published(self.root.raw("invented"), ARCHIVE)
        return ledger

    def samples(self, ledger: Ledger) -> list[RawSample]:
        return list(iter_raw_tar(self.root.raw("invented").data(ARCHIVE), ledger.files[0]))

    def published_files(self) -> dict[str, bytes]:
        """Every file below the data root, hidden ones too."""
        files = (path for path in self.root.path.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root.path)): path.read_bytes() for path in files}


@pytest.fixture(params=CONTAINERS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return Source(tmp_path, request.param)


def keys(ledger: Ledger) -> dict[str, list[str]]:
    """The rejected keys by reason, without the archive."""
    return {
        reason: [key.removeprefix(f"{ARCHIVE}/") for key in rejected] for reason, rejected in ledger.rejected.items()
    }


# Images

JPEG = encoded(photo(300, 300), "JPEG")
PICTURES: dict[str, tuple[bytes, str | None]] = {
    "truncated": (JPEG[: len(JPEG) // 2], Reason.UNDECODABLE),
    "zero bytes": (b"", Reason.UNDECODABLE),
    "text": (b"this is no image, whatever it is called", Reason.UNDECODABLE),
    "bomb": (png(30_000, 30_000), Reason.TOO_LARGE),
    "more pixels than the limit": (png(1001, 1000), Reason.TOO_LARGE),
    "more bytes than the limit": (JPEG + bytes(2_000_000), Reason.TOO_LARGE),
    "255x256": (png(255, 256), Reason.TOO_SMALL),
    "256x256": (encoded(photo(256, 256), "JPEG"), None),
    "257x256": (encoded(photo(257, 256), "JPEG"), None),
    "3000x256": (encoded(photo(3000, 256), "JPEG"), None),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_bad_image_is_rejected_alone(source: Source, kind: str) -> None:
    data, reason = PICTURES[kind]
    source.put_members([("a.jpg", JPEG), ("odd.jpg", data), ("z.jpg", JPEG)])
    ledger = source.raw()
    assert keys(ledger) == ({reason: ["odd"]} if reason else {})
    assert [sample.key for sample in source.samples(ledger)] == ["000/a", *([] if reason else ["000/odd"]), "000/z"]


def test_memory_stays_bounded_at_bombs(tmp_path: Path) -> None:
    """30,000 × 30,000 pixels are 900 MB at the least. In a process of its own, because peaks do not come down."""
    code = f"""
import pathlib
from md_assets_tests.stages.conftest import png
from md_assets_tests.stages.test_raw_bad_input import CONTAINERS, JPEG, Source
from md_assets_tests.storage.memory import peak_mib
for number, bomb in enumerate((JPEG, png(30_000, 30_000))):  # the first brings in what any image needs
    for container in CONTAINERS:
        source = Source(pathlib.Path({str(tmp_path)!r}) / f"{{container}}{{number}}", container)
        source.put_members([("odd.jpg", bomb), ("z.jpg", JPEG)])
        print(source.raw().rejected, peak_mib(), sep=";")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line.split(";") for line in done.stdout.splitlines()]
    assert [rejected for rejected, _ in lines] == ["{}"] * 4 + ["{'too_large': ['000/odd']}"] * 4
    assert int(lines[-1][1]) - int(lines[3][1]) < 20


def test_of_a_key_that_comes_twice_the_first_sample_is_kept(source: Source, picture: Picture) -> None:
    source.put_members([("a.jpg", picture(1)), ("b.jpg", picture(2)), ("a.jpg", picture(3)), ("./a.jpeg", picture(4))])
    ledger = source.raw()
    assert keys(ledger) == {Reason.DUPLICATE_KEY: ["a", "a"]}
    assert [(s.key, s.jpeg) for s in source.samples(ledger)] == [("000/a", picture(1)), ("000/b", picture(2))]


@pytest.mark.parametrize("members", [[], [("a.jpg", b"no image"), ("b.jpg", b"")]], ids=["empty", "no image"])
def test_an_archive_without_a_usable_sample_is_published_and_its_check_says_so(
    source: Source, members: list[tuple[str, bytes]]
) -> None:
    source.put_members(members)
    ledger = source.raw()
    assert (ledger.read, ledger.kept, keys(ledger)) == (
        len(members), 0, {Reason.UNDECODABLE: ["a", "b"]} if members else {}
    )  # fmt: skip
    verdict = counts_balance(source.root.raw("invented"), ARCHIVE, None)
    assert not verdict.passed and verdict.what == f"no sample is kept, of {len(members)} that were read"


# Members and their names

KEPT = {"line\nend.jpg": "line%0Aend", b"\xff\xfe.jpg": "%FF%FE", "deep/er.jpg": "deep/er"}
OUTSIDE = {"../evil.jpg": "%2E%2E/evil", "a/../../evil.jpg": "a/%2E%2E/%2E%2E/evil", "/abs.jpg": "%2Fabs"}


def odd_members(container: str, image: bytes) -> tuple[bytes, list[str]]:
    """An archive of members of every name and type, and the names of those whose type is no plain file's."""
    if container == "zip":
        types = {"link.jpg": stat.S_IFLNK, "fifo.jpg": stat.S_IFIFO, "device.jpg": stat.S_IFCHR}
        entries = [ZipEntry(name, image) for name in (*KEPT, *OUTSIDE)]
        entries += [ZipEntry(name, b"/etc/passwd", mode=kind | 0o777) for name, kind in types.items()]
        return zip_of(*entries), list(types)
    types_of_tar: dict[str, dict[str, Any]] = {
        "link.jpg": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        "hard.jpg": {"type": tarfile.LNKTYPE, "linkname": "deep/er.jpg"},
        "fifo.jpg": {"type": tarfile.FIFOTYPE},
        "device.jpg": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
    }
    names = [name if isinstance(name, str) else os.fsdecode(name) for name in (*KEPT, *OUTSIDE)]
    odd = [entry(name, **fields) for name, fields in types_of_tar.items()]
    data = tar_of(*(entry(name, image) for name in names), *odd)
    return gzip.compress(data, 1) if container == "tgz" else data, list(types_of_tar)


@pytest.mark.parametrize("container", ["tar", "tgz", "zip"])
def test_nothing_is_written_outside_and_samples_are_judged_by_their_safe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source = Source(tmp_path, container)
    data, odd = odd_members(container, JPEG)
    source.put(data)
    ledger = source.raw()
    assert keys(ledger) == {Reason.UNSAFE_MEMBER: [*OUTSIDE.values(), *(name[:-4] for name in odd)]}
    assert [sample.key for sample in source.samples(ledger)] == [f"000/{name}" for name in KEPT.values()]
    assert {s.jpeg for s in source.samples(ledger)} == {JPEG}
    assert_only_published(tmp_path, container)


def assert_only_published(folder: Path, container: str) -> None:
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()}
    assert written == {f"source/000.{container}", "data/invented/raw/000.tar", "data/invented/raw/000.json"}
    assert not Path("/abs.jpg").exists()


def test_names_of_rows_lead_nowhere_either(tmp_path: Path) -> None:
    source = Source(tmp_path, "parquet")
    names = [name if isinstance(name, bytes) else name.encode() for name in (*KEPT, *OUTSIDE)]
    columns = {"name": not_utf_8(*names), "image": [JPEG] * len(names), "caption": [""] * len(names)}
    nameless = pa.table({"name": pa.array([None], pa.string()), "image": [JPEG], "caption": [""]})
    source.put(parquet_of(pa.concat_tables([pa.table(columns), nameless])))
    ledger = source.raw()
    assert keys(ledger) == {Reason.UNSAFE_MEMBER: [*OUTSIDE.values(), "row 7"]}
    assert [sample.key for sample in source.samples(ledger)] == [f"000/{name}" for name in KEPT.values()]
    assert_only_published(tmp_path, "parquet")


def test_an_encrypted_member_of_a_zip_is_rejected_alone(tmp_path: Path) -> None:
    source = Source(tmp_path, "zip")
    source.put(zip_of(ZipEntry("a.jpg", JPEG), ZipEntry("odd.jpg", JPEG, flags=1), ZipEntry("z.jpg", JPEG)))
    ledger = source.raw()
    assert keys(ledger) == {Reason.UNREADABLE_MEMBER: ["odd"]} and ledger.kept == 2


# Containers


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    """Another byte of the first picture, which only the container's checksum tells."""
    at = data.index(JPEG[:100]) + 90
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def flipped_header(data: bytes) -> bytes:
    """Another byte of the second header: a plain tar has no other checksum."""
    at = data.index(b"ustar", 600) - 200
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


MEMBERS = [("a.jpg", JPEG), ("b.jpg", JPEG)]
WHOLE = {container: archive_of(container, MEMBERS) for container in CONTAINERS} | {
    "zip": zip_of(*(ZipEntry(*member, method=0, flags=SIZES_BEHIND_DATA) for member in MEMBERS)),
    "tgz": gzip.compress(tar_of(*(entry(*member) for member in MEMBERS)), 0, mtime=0),
}
"""Archives that hold the pictures' bytes as they are, so that they can be damaged."""

DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "truncated": (cut, "truncated", "cut off|unexpected end of data"),
    "checksum": (flipped, "corrupt", "CRC|checksum"),
    "page": (lambda _: b"<!DOCTYPE html><title>Link expired</title>", "not_an_archive", "it is a web page"),
    "empty": (lambda _: b"", "truncated", "it is empty"),
    "noise": (lambda _: b"noise" * 400, "not_an_archive", "no usable"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_archive_fails_and_succeeds_once_it_is_mended(source: Source, kind: str) -> None:
    damage, reason, says = DAMAGE[kind]
    if (source.container, kind) == ("tar", "checksum"):
        damage, says = flipped_header, "checksum"
    for files in ({}, None):  # nothing was published, then something was
        files = source.published_files() if files is None else files
        source.put(damage(WHOLE[source.container]))
        with pytest.raises(ArchiveError, match=says) as caught:
            source.raw()
        assert caught.value.reason == reason and caught.value.remedy and not caught.value.transient
        assert str(caught.value).startswith("invented 000: ") and "\n" not in str(caught.value)
        assert source.published_files() == files
        source.put(WHOLE[source.container])
        ledger = source.raw()
        assert (ledger.read, ledger.kept) == (2, 2)


# Captions

CAPTIONS = {
    "empty": ("", None),
    "white space": (" \t\r\n ", None),
    "NUL only": ("\0", None),
    "long": ("long " * 20_000, "long " * 20_000),
    "NUL": ("a\0b", "ab"),
    "odd": ("<b>cat</b> 🐈‍⬛\nhttps://example.org/?a=1&b=2", "<b>cat</b> 🐈‍⬛\nhttps://example.org/?a=1&b=2"),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions_that_an_archive_carries(source: Source, kind: str) -> None:
    upstream, stored = CAPTIONS[kind]
    if source.container == "parquet":
        source.put(archive_of("parquet", [("odd", JPEG), ("z", JPEG), ("none", JPEG)], [upstream, "a caption"]))
    else:
        text = upstream.encode()
        source.put_members(
            [("odd.jpg", JPEG), ("odd.txt", text), ("z.jpg", JPEG), ("z.txt", b"a caption"), ("none.jpg", JPEG)]
        )
    assert source.raw().kept == 3
    ledger = convert_archive(source.spec, ARCHIVE, source.root, IMAGES).ledger
    assert ledger.balances and keys(ledger) == {Reason.NO_CAPTION: ["odd", "none"] if stored is None else ["none"]}
    rows = iter_rows(source.root.mds("invented").data(ARCHIVE))
    expected = {} if stored is None else {"000/odd": stored}
    assert {row["key"]: row["caption"] for row in rows} == {**expected, "000/z": "a caption"}


@pytest.mark.parametrize("container", ["tar", "tgz", "zip"])
def test_a_caption_without_image_is_counted_and_no_sample(tmp_path: Path, container: str) -> None:
    source = Source(tmp_path, container)
    source.put_members([("absent.txt", b"a caption"), ("a.jpg", JPEG), ("a.txt", b"another")])
    ledger = source.raw()
    assert (ledger.read, ledger.kept, ledger.details["orphan_captions"]) == (1, 1, 1)
