"""The raw stage and its sources: links that expire, a mirror instead, kept archives, and room on the disk."""

from __future__ import annotations

import hashlib
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress
from md_assets.core.settings import ImageSettings
from md_assets.core.source import HubFile, LinkedFile
from md_assets.core.spec import DatasetSpec
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.demo.journeydb import write_tgz
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.loopback_web import LoopbackWeb, write_link_list
from md_assets.stages.once import Outcome
from md_assets.stages.raw import fetch_archive
from md_assets.storage.hub import HubClient
from md_assets.storage.image_pool import ImagePool
from md_assets.storage.sources import Sources
from md_assets_tests.stages.conftest import POLICY

ARCHIVE, FILE, MIRROR, LIST = "sa_000000", "sa_000000.tar", "org/mirror", "MD_ASSETS_SA1B_LINKS"
SPEC = replace(
    JDB,
    slug="linked",
    archives=(ARCHIVE,),
    splits=(),
    annotations=(),
    locate=lambda archive: LinkedFile(f"{archive}.tar", LIST, HubFile(MIRROR, f"*{archive}.tar")),
)
OTHER = ImageSettings(jpeg_quality=90)


@dataclass
class Linked:
    """An archive behind a link and at a mirror, and the raw stage run on it."""

    web: LoopbackWeb
    hub: LoopbackHub
    root: DataRoot
    list_path: Path
    spec: DatasetSpec = SPEC

    @property
    def upstream(self) -> Path:
        return self.web.root / FILE

    def write_list(self, expires_in_s: float) -> None:
        expires_s = time.time() + expires_in_s
        write_link_list(self.list_path, [FILE], lambda name: self.web.signed_url(name, expires_s))

    def raw(self, images: ImageSettings | None = None, attempts: int = 2, **options: Any) -> Outcome:
        policy = replace(POLICY, attempts=attempts, attempts_in_all=max(attempts, 1))
        sources = Sources(HubClient(self.hub.endpoint, policy=policy))
        options = {"pool": ImagePool(0), "fetcher": sources, **options}
        locate = self.spec.locate
        return fetch_archive(
            self.spec, ARCHIVE, lambda: sources.locate(locate(ARCHIVE)), self.root, images or ImageSettings(), **options
        )

    def failure(self, *arguments: Any, **options: Any) -> ArchiveError:
        with pytest.raises(ArchiveError) as caught:
            self.raw(*arguments, **options)
        assert str(caught.value).startswith(f"linked {ARCHIVE}: ") and "sig=" not in str(caught.value)
        return caught.value

    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.root.path.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root.path)): path.read_bytes() for path in paths}

    def all_requests(self) -> int:
        return self.web.requests.total() + self.hub.requests.total()


@pytest.fixture
def linked(tmp_path: Path, picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Linked]:
    members = [(f"./sa_{number}.jpg", picture(number, 600, 520)) for number in range(5)]
    write_tgz(tmp_path / "web" / FILE, members)
    mirror = tmp_path / "hub" / "datasets" / MIRROR / "deep"
    mirror.mkdir(parents=True)
    shutil.copy(tmp_path / "web" / FILE, mirror / FILE)
    monkeypatch.setenv(LIST, str(tmp_path / "links.tsv"))
    with LoopbackWeb(tmp_path / "web", signed=["*"]) as web, LoopbackHub(tmp_path / "hub") as hub:
        world = Linked(web, hub, DataRoot(tmp_path / "data"), tmp_path / "links.tsv")
        world.write_list(60)
        yield world


def test_what_came_by_a_link_is_known_by_the_sha256_of_its_bytes(linked: Linked) -> None:
    ledger = linked.raw().ledger
    sha256 = hashlib.sha256(linked.upstream.read_bytes()).hexdigest()
    assert (ledger.read, ledger.kept) == (5, 5)
    assert ledger.source == {"name": f"{LIST}:{FILE}", "content_id": sha256, "revision": ""}
    assert ledger.inputs == {"archive": sha256} and ledger.bytes_in == linked.upstream.stat().st_size
    assert linked.all_requests() == 1


def test_a_finished_archive_is_not_redone_whatever_becomes_of_its_link(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expired, in a new list, or with the mirror instead of the list: and back."""
    first = linked.raw()
    before = linked.files()
    for expires_in_s in (-60, 120):
        linked.write_list(expires_in_s)
        assert linked.raw(pool=None) == Outcome(first.ledger, passed_over=True)
    assert linked.all_requests() == 1
    monkeypatch.delenv(LIST)
    assert linked.raw(pool=None).passed_over and linked.hub.requests == {"listing": 1}
    assert linked.files() == before


def test_what_came_from_the_mirror_is_not_redone_with_a_list(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIST)
    assert linked.raw().ledger.source["name"] == f"{MIRROR}:deep/{FILE}"
    monkeypatch.setenv(LIST, str(linked.list_path))
    linked.write_list(-60)
    assert linked.raw(pool=None).passed_over and linked.web.requests == {}
    monkeypatch.delenv(LIST)
    write_tgz(linked.hub.repositories.root / "datasets" / MIRROR / "deep" / FILE, [])
    assert not linked.raw().passed_over  # the mirror tells that its content is another


def test_an_expired_link_fails_the_archive_before_any_request_and_leaves_what_is_there(linked: Linked) -> None:
    linked.write_list(-60)
    assert linked.failure().reason == "link_expired"
    assert linked.all_requests() == 0 and linked.files() == {}
    linked.write_list(60)
    linked.raw()
    before = linked.files()
    linked.write_list(-60)
    error = linked.failure(OTHER)
    assert error.reason == "link_expired" and not error.transient and "its link expired at 20" in error.what
    assert LIST in error.remedy and linked.all_requests() == 1 and linked.files() == before
    linked.write_list(60)
    assert not linked.raw(OTHER).passed_over


def test_a_partial_download_goes_on_by_the_next_list(linked: Linked) -> None:
    linked.web.faults.cut("*", linked.upstream.stat().st_size // 2)
    assert linked.failure(attempts=1).reason == "connection"
    linked.write_list(120)
    assert linked.raw().ledger.kept == 5
    assert [request.range_header[:6] for request in linked.web.history] == ["", "bytes="]


def test_a_kept_archive_is_taken_again_even_without_a_good_link(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked.raw(keep_archive=True)
    kept = linked.root.kept_archive("linked", ARCHIVE, ".tar")
    whole = kept.read_bytes()
    linked.write_list(-60)
    outcome = linked.raw(OTHER, keep_archive=True)
    assert not outcome.passed_over and outcome.ledger.kept == 5 and linked.all_requests() == 1
    assert outcome.ledger.inputs == {"archive": hashlib.sha256(whole).hexdigest()}
    monkeypatch.delenv(LIST)
    assert not linked.raw(keep_archive=False).passed_over and linked.hub.requests == {"listing": 1}
    assert kept.read_bytes() == whole
    kept.write_bytes(whole[:-1] + b"?")
    assert linked.raw(OTHER, keep_archive=True).ledger.kept == 5 and linked.hub.requests["cdn"] == 1
    assert kept.read_bytes() == whole


def test_a_kept_archive_that_is_another_one_is_fetched_anew(linked: Linked) -> None:
    linked.raw(keep_archive=True)
    linked.root.kept_archive("linked", ARCHIVE, ".tar").write_bytes(b"another")
    assert linked.raw(OTHER, keep_archive=True).ledger.kept == 5
    assert linked.web.requests == {"get": 2}
    assert linked.root.kept_archive("linked", ARCHIVE, ".tar").read_bytes() == linked.upstream.read_bytes()


class Disk:
    """Says how much is free, counted from what lies below the data root."""

    def __init__(self, root: Path, total_bytes: int) -> None:
        self.root, self.total_bytes = root, total_bytes
        self.real = shutil.disk_usage("/")

    def __call__(self, _: object) -> object:
        return self.real._replace(free=self.total_bytes - used_bytes(self.root))


def used_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_room_for_archive_and_output_is_required_before_a_byte_is_asked_for(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LIST)
    size_bytes = linked.upstream.stat().st_size
    disk = Disk(linked.root.path, 2 * size_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", disk)
    error = linked.failure()
    assert error.reason == "disk_full" and not error.transient
    assert f"{2 * size_bytes - 1} bytes are free and {2 * size_bytes} are needed" in error.what
    assert str(linked.root.path) in error.what
    assert "md-assets prune" in error.remedy and "MD_ASSETS_DATA" in error.remedy
    assert linked.hub.requests == {"listing": 1} and linked.files() == {}
    disk.total_bytes += 1
    assert linked.raw().ledger.kept == 5


def test_what_a_partial_download_has_needs_no_room_again(linked: Linked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIST)
    size_bytes = linked.upstream.stat().st_size
    linked.hub.faults.cut("*", size_bytes // 2)
    linked.failure(attempts=1)
    assert size_bytes // 4 < used_bytes(linked.root.path) < size_bytes
    monkeypatch.setattr(shutil, "disk_usage", Disk(linked.root.path, 2 * size_bytes + 200))  # 200: its notes
    assert linked.raw().ledger.kept == 5


def test_where_only_the_answer_tells_the_size_it_is_required_then(
    linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    size_bytes = linked.upstream.stat().st_size
    disk = Disk(linked.root.path, 2 * size_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", disk)
    error = linked.failure()
    assert error.reason == "disk_full" and f"{LIST}:{FILE}" in error.what
    assert linked.web.requests == {"get": 1} and used_bytes(linked.root.path) < size_bytes
    disk.total_bytes += 300
    assert linked.raw().ledger.kept == 5
    assert linked.web.history[-1].range_header.startswith("bytes=")  # what came was kept


@pytest.mark.parametrize("archive_format", ["tar", "zip"])
def test_the_disk_holds_the_archive_and_its_output_and_no_tree(
    linked: Linked, picture: Callable[..., bytes], archive_format: Any
) -> None:
    if archive_format == "zip":
        with zipfile.ZipFile(linked.upstream, "w") as file:
            for number in range(5):
                file.writestr(f"sa_{number}.jpg", picture(number, 600, 520))
    linked.spec = replace(SPEC, archive_format=archive_format)
    most_bytes, files = 0, set[str]()

    def look(_: Progress) -> None:
        nonlocal most_bytes
        most_bytes = max(most_bytes, used_bytes(linked.root.path))
        files.update(path.name for path in linked.root.path.rglob("*") if path.is_file())

    ledger = linked.raw(report=look).ledger
    assert ledger.kept == 5 and files == {
        "archive.tar.part", "archive.tar.source.part", "archive.tar", f"{ARCHIVE}.tar",
    }  # fmt: skip
    assert ledger.bytes_in <= most_bytes <= ledger.bytes_in + ledger.bytes_out
    assert used_bytes(linked.root.path) == ledger.bytes_out + linked.root.raw("linked").ledger(ARCHIVE).stat().st_size
