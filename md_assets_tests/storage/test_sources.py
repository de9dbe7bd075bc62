"""Every source behind one door: who serves an address, expired links, and what an observation asks for."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from md_assets.core.errors import SourceError
from md_assets.core.source import Address, HubFile, LinkedFile, WebFile
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.loopback_web import LoopbackWeb, write_link_list
from md_assets.storage.hub import HubClient
from md_assets.storage.retry import TransferPolicy
from md_assets.storage.sources import Sources

CONTENT = random.Random(5).randbytes(600_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MIRROR = "org/mirror"
LIST, BASE = "MD_ASSETS_SA1B_LINKS", "MD_ASSETS_COCO_URL"
POLICY = TransferPolicy(connect_timeout_s=2, stall_timeout_s=0.5, attempts=2, first_delay_s=0.01)


def linked(number: int) -> LinkedFile:
    name = f"sa_{number:06}.tar"
    return LinkedFile(name, LIST, HubFile(MIRROR, f"*{name}"))


@dataclass
class World:
    """The same file by a link and at the mirror."""

    web: LoopbackWeb
    hub: LoopbackHub
    folder: Path

    def sources(self) -> Sources:
        return Sources(HubClient(self.hub.endpoint, policy=POLICY))

    def write_list(self, expires_in_s: float, *numbers: int) -> Path:
        names = [f"sa_{number:06}.tar" for number in numbers or (0,)]
        expires_s = time.time() + expires_in_s
        return write_link_list(self.folder / "l.tsv", names, lambda name: self.web.signed_url(f"t/{name}", expires_s))

    def gets(self) -> list[str]:
        return [request.range_header for request in self.web.history if request.kind == "get"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for folder in ("web/t", f"hub/datasets/{MIRROR}/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "sa_000000.tar").write_bytes(CONTENT)
    with LoopbackWeb(tmp_path / "web", signed=["t/*"]) as web, LoopbackHub(tmp_path / "hub") as hub:
        monkeypatch.setenv(LIST, str(tmp_path / "l.tsv"))
        monkeypatch.setenv(BASE, web.base_url)
        yield World(web, hub, tmp_path)


def test_a_link_gives_the_bytes_and_their_sha256(world: World, tmp_path: Path) -> None:
    world.write_list(60)
    sources = world.sources()
    remote = sources.locate(linked(0))
    assert (remote.via, remote.content_id, remote.size_bytes) == ("web", "", None)
    found = sources.fetch(remote, tmp_path / "a")
    assert found == replace(remote, content_id=SHA256, size_bytes=len(CONTENT))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert world.web.requests == {"get": 1} and world.hub.requests == {}


def test_without_a_list_the_mirror_has_it_with_the_same_content_id(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LIST)
    sources = world.sources()
    remote = sources.locate(linked(0))
    assert (remote.name, remote.via, remote.content_id) == (f"{MIRROR}:deep/sa_000000.tar", "hub", SHA256)
    assert sources.fetch(remote, tmp_path / "a") == remote
    assert world.web.requests == {} and world.hub.requests["listing"] == 1


def test_an_expired_link_is_said_so_before_any_request(world: World, tmp_path: Path) -> None:
    world.write_list(-1)
    sources = world.sources()
    with pytest.raises(SourceError, match=f"{LIST}:sa_000000.tar: its link expired at 20") as caught:
        sources.fetch(sources.locate(linked(0)), tmp_path / "a")
    assert caught.value.reason == "link_expired" and not caught.value.transient and LIST in caught.value.remedy
    assert list(world.web.history) == [] and list(world.hub.history) == []
    assert not (tmp_path / "a.part").exists()


@pytest.mark.parametrize(("lasts_s", "reason"), [(20, "link_expired"), (60, "unauthorized")])
def test_a_link_that_is_refused_midway(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasts_s: float, reason: str
) -> None:
    world.write_list(lasts_s)
    sources = world.sources()
    remote = sources.locate(linked(0))
    world.web.faults.cut("t/*", 300_000)
    later_s = time.time() + 30

    def progress(*_: int) -> None:
        world.web.faults.status("t/sa_000000.tar", 403, times=None)
        monkeypatch.setattr("md_assets.storage.links.time.time", lambda: later_s)

    with pytest.raises(SourceError) as caught:
        sources.fetch(remote, tmp_path / "a", progress)
    assert caught.value.reason == reason and "sig=" not in str(caught.value)
    assert (tmp_path / "a.part").stat().st_size > 100_000  # for the next link


def test_a_partial_download_goes_on_by_a_new_link_and_is_checked_by_its_etag(world: World, tmp_path: Path) -> None:
    def begin() -> None:
        world.write_list(60)
        world.web.faults.cut("t/*", 300_000, times=2)
        impatient = HubClient(world.hub.endpoint, policy=replace(POLICY, attempts=1, attempts_in_all=1))
        with pytest.raises(SourceError, match=r"cut|ended after"):
            Sources(impatient).fetch(world.sources().locate(linked(0)), tmp_path / "a")
        world.web.faults.clear()
        world.write_list(120)

    begin()
    sources = world.sources()
    assert sources.fetch(sources.locate(linked(0)), tmp_path / "a").content_id == SHA256
    first, second = world.gets()
    assert first == "" and second.startswith("bytes=")

    (tmp_path / "a").unlink()
    begin()
    (world.web.root / "t" / "sa_000000.tar").write_bytes(CONTENT[::-1])
    sources.fetch(sources.locate(linked(0)), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT[::-1]
    assert [bool(header) for header in world.gets()[2:]] == [False, True, False]


def test_a_page_or_nothing_by_a_link(world: World, tmp_path: Path) -> None:
    world.write_list(60, 0, 7)
    sources = world.sources()
    world.web.faults.html("t/*", times=None)
    with pytest.raises(SourceError, match=f"{LIST}:sa_000000.tar: the server answered an HTML page"):
        sources.fetch(sources.locate(linked(0)), tmp_path / "a")
    with pytest.raises(SourceError, match=f"{LIST}:sa_000007.tar: not found at the source") as caught:
        sources.fetch(sources.locate(linked(7)), tmp_path / "a")
    assert caught.value.reason == "not_found"


def test_a_web_file_is_asked_for_at_its_base(world: World, tmp_path: Path) -> None:
    (world.web.root / "a.zip").write_bytes(CONTENT)
    sources = world.sources()
    remote = sources.locate(WebFile("a.zip", BASE, "http://images.invalid"))
    assert sources.fetch(remote, tmp_path / "a") == remote and remote.size_bytes == len(CONTENT)


def test_an_observation_asks_once_for_each_repository_list_and_web_file(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.web.root / "a.zip").write_bytes(CONTENT)
    world.write_list(-60, 0, 2)  # expired, which does not matter here
    addresses: dict[str, Address] = {
        **{f"sa/{number}": linked(number) for number in range(4)},
        **{f"hub/{number}": HubFile(MIRROR, f"deep/sa_{number:06}.tar") for number in range(3)},
        "web": WebFile("a.zip", BASE, "http://images.invalid"),
        "none": WebFile("b.zip", BASE, "http://images.invalid"),
    }
    world.web.headers = lambda _: {"ETag": '"v1"'}
    ids, absent = world.sources().content_ids(addresses)
    assert ids == {"sa/0": "sa_000000.tar", "sa/2": "sa_000002.tar", "hub/0": SHA256, "web": "v1"}
    assert absent == ["sa/1", "sa/3", "hub/1", "hub/2", "none"]
    assert world.hub.requests == {"listing": 1}
    assert [f"{request.kind} {request.name}" for request in world.web.history] == [
        "head a.zip", "get a.zip.md5", "head b.zip",
    ]  # fmt: skip
    monkeypatch.delenv(LIST)
    world.web.headers = lambda _: {}
    ids, absent = world.sources().content_ids(addresses)
    assert ids == {"sa/0": SHA256, "hub/0": SHA256, "web": "a.zip"}
    assert world.hub.requests == {"listing": 2}


def test_an_observation_without_its_repository_or_server_fails(world: World) -> None:
    lost = {f"{number}": HubFile("org/lost", f"{number}.tar") for number in range(50)}
    with pytest.raises(SourceError, match="the Hub's dataset org/lost") as caught:
        world.sources().content_ids(lost)
    assert caught.value.reason in ("not_found", "unauthorized") and world.hub.requests == {"listing": 1}
    world.web.faults.status("*", 503, times=None)
    with pytest.raises(SourceError, match="HTTP 503"):
        world.sources().content_ids({"web": WebFile("a.zip", BASE, "http://images.invalid")})


def test_import_is_cheap() -> None:
    program = (
        "import sys, md_assets.storage.sources, md_assets.demo.loopback_web\n"
        "print(sorted({'huggingface_hub', 'requests', 'torch', 'tqdm', 'yaml'} & set(sys.modules)))"
    )
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
