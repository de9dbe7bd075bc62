"""The Hub's client: the real huggingface_hub against the loopback Hub."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from huggingface_hub import hf_hub_download, snapshot_download

from md_assets.core.errors import SourceError
from md_assets.core.source import Checksum, HubFile
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.storage import hub as hub_module
from md_assets.storage.hub import HubClient
from md_assets.storage.retry import TransferPolicy

ARCHIVE = random.Random(2).randbytes(300_000)
README = b"# Gated things\n"
POLICY = TransferPolicy(connect_timeout_s=2, stall_timeout_s=0.5, listing_timeout_s=2, attempts=3, first_delay_s=0.01)
GATED = HubFile("org/gated", "data/000.tgz")


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own login must not reach a test."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    for repo in ("datasets/org/gated", "datasets/org/free", "models/org/model"):
        folder = tmp_path / "root" / repo
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "000.tgz").write_bytes(ARCHIVE)
        (folder / "README.md").write_bytes(README)
    tokens = {"hf_granted": ["org/gated"], "hf_stranger": []}
    with LoopbackHub(tmp_path / "root", gated=["org/gated"], tokens=tokens) as hub:
        yield hub


def client(hub: LoopbackHub, token: str | None = None, **options: object) -> HubClient:
    return HubClient(hub.endpoint, token, policy=POLICY, **options)  # type: ignore[arg-type]


def test_listing_tells_content_size_and_pinned_address_in_one_request(hub: LoopbackHub) -> None:
    listing = client(hub).listing("org/free")
    assert hub.requests == {"listing": 1}
    assert list(listing.files) == ["README.md", "data/000.tgz"]
    sha256 = hashlib.sha256(ARCHIVE).hexdigest()
    archive = listing.files["data/000.tgz"]
    assert archive.checksum == Checksum("sha256", sha256) and archive.content_id == sha256
    assert archive.size_bytes == len(ARCHIVE) and archive.revision == listing.revision
    assert archive.url == f"{hub.endpoint}/datasets/org/free/resolve/{listing.revision}/data/000.tgz"
    assert archive.name == "org/free:data/000.tgz"
    readme = listing.files["README.md"]
    assert readme.checksum is None and readme.size_bytes == len(README)
    assert readme.content_id == hashlib.sha1(b"blob %d\0" % len(README) + README).hexdigest()


def test_listing_is_remembered_until_refreshed_and_shared_by_threads(hub: LoopbackHub, tmp_path: Path) -> None:
    one = client(hub)
    threads = [threading.Thread(target=one.listing, args=("org/free",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = one.revision("org/free")
    one.locate(HubFile("org/free", "README.md"))
    assert hub.requests["listing"] == 1
    (tmp_path / "root/datasets/org/free/README.md").write_bytes(b"mended")
    assert one.revision("org/free") == before
    assert one.revision("org/free", refresh=True) != before
    assert hub.requests["listing"] == 2


def test_very_large_repository_is_listed_by_its_tree(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    described = client(hub).listing("org/free")
    monkeypatch.setattr(hub_module, "TRUNCATED_FROM_FILES", 2)
    assert client(hub).listing("org/free") == described
    assert hub.requests == {"listing": 2, "tree": 1}


@pytest.mark.parametrize("repo_type", ["dataset", "model"])
def test_fetches_archive_and_small_file(hub: LoopbackHub, tmp_path: Path, repo_type: str) -> None:
    one, repo = client(hub), "org/free" if repo_type == "dataset" else "org/model"
    for path, content in (("data/000.tgz", ARCHIVE), ("README.md", README)):
        file = one.locate(HubFile(repo, path, repo_type))  # type: ignore[arg-type]
        assert one.fetch(file, tmp_path / "out" / path) == file
        assert (tmp_path / "out" / path).read_bytes() == content
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["000.tgz", "README.md", "data"]
    assert hub.requests["listing"] == 1 and hub.requests["resolve"] == 2


@pytest.mark.parametrize("path", ["data/000.tgz", "README.md"])
def test_damage_is_found_in_lfs_and_other_files(hub: LoopbackHub, tmp_path: Path, path: str) -> None:
    one = client(hub)
    hub.faults.corrupt(f"*/{path}")
    one.fetch(one.locate(HubFile("org/free", path)), tmp_path / "healed")
    hub.faults.corrupt(f"*/{path}", times=None)
    with pytest.raises(SourceError) as caught:
        one.fetch(one.locate(HubFile("org/free", path)), tmp_path / "damaged")
    assert caught.value.reason == "checksum_mismatch" and f"org/free:{path}" in str(caught.value)
    assert not (tmp_path / "damaged").exists()


def test_fetch_is_pinned_to_the_listed_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    one = client(hub)
    archive, readme = (
        one.listing("org/free").files["data/000.tgz"],
        one.listing("org/free").files["README.md"],
    )
    (tmp_path / "root/datasets/org/free/README.md").write_bytes(b"mended since")
    one.fetch(archive, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == ARCHIVE
    with pytest.raises(SourceError, match="org/free has no revision") as caught:
        one.fetch(readme, tmp_path / "r")
    assert caught.value.reason == "not_found" and readme.revision in str(caught.value)


def test_gated_without_token_and_with_a_strangers(hub: LoopbackHub, tmp_path: Path) -> None:
    for token, lacks in ((None, "no token is set"), ("hf_stranger", "has not been granted access")):
        one = client(hub, token)
        with pytest.raises(SourceError) as caught:
            one.fetch(one.locate(GATED), tmp_path / "a")
        text = str(caught.value)
        assert caught.value.reason == "gated" and not caught.value.transient
        assert "org/gated:data/000.tgz" in text and lacks in text
        assert f"{hub.endpoint}/datasets/org/gated," in text and "HF_TOKEN" in text
        assert "\n" not in text
    granted = client(hub, "hf_granted")
    granted.fetch(granted.locate(GATED), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == ARCHIVE


def test_token_and_endpoint_come_from_the_environment_at_call_time(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = HubClient(policy=POLICY)
    assert one.endpoint == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    assert one.endpoint == hub.endpoint
    one.fetch(one.locate(GATED), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == ARCHIVE
    assert all(request.with_token for request in hub.history)


def test_refused_token(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        client(hub, "hf_typo").listing("org/free")
    assert caught.value.reason == "unauthorized" and not caught.value.transient
    text = str(caught.value)
    assert "refuses the token" in text and "HF_TOKEN" in text and "hf_typo" not in text
    file = client(hub).locate(HubFile("org/free", "README.md"))
    with pytest.raises(SourceError) as caught:
        client(hub, "hf_typo").fetch(file, tmp_path / "a")
    assert caught.value.reason == "unauthorized"


@pytest.mark.parametrize("token", [None, "hf_granted"])
def test_missing_repository_revision_and_file_are_named(hub: LoopbackHub, token: str | None) -> None:
    cases = [
        (lambda: client(hub, token).listing("org/lost"), ["org/lost"]),
        (
            lambda: client(hub, token, revisions={"org/free": "v9"}).listing("org/free"),
            ["org/free", "'v9'", "pin"],
        ),
        (
            lambda: client(hub, token).locate(HubFile("org/free", "data/999.tgz")),
            ["org/free:data/999.tgz", client(hub).revision("org/free")],
        ),
    ]
    for ask, named in cases:
        with pytest.raises(SourceError) as caught:
            ask()
        assert caught.value.reason == "not_found" and not caught.value.transient
        for text in named:
            assert text in str(caught.value)


def test_401_means_a_token_is_missing_or_does_not_reach(hub: LoopbackHub) -> None:
    for token, headers, text in (
        (None, {}, "org/free needs a token"),
        ("hf_granted", {"X-Error-Code": "RepoNotFound"}, "does not exist, or the token does not reach it"),
    ):
        hub.faults.status("org/free", 401, headers, place="listing")
        with pytest.raises(SourceError, match=text) as caught:
            client(hub, token).listing("org/free")
        assert caught.value.reason == "unauthorized" and "HF_TOKEN" in caught.value.remedy


def test_file_that_vanished_after_the_listing_is_named(hub: LoopbackHub, tmp_path: Path) -> None:
    one = client(hub)
    file = one.locate(HubFile("org/free", "README.md"))
    hub.faults.status("*/README.md", 404, {"X-Error-Code": "EntryNotFound"})
    with pytest.raises(SourceError, match=r"org/free:README.md: .* no such file at revision [0-9a-f]{40}"):
        one.fetch(file, tmp_path / "a")


def test_name_that_is_none(hub: LoopbackHub) -> None:
    with pytest.raises(SourceError, match="a/b/c: not the name of a repository") as caught:
        client(hub).listing("a/b/c")
    assert caught.value.reason == "not_found" and hub.requests.total() == 0


@pytest.mark.parametrize("headers", [{"Retry-After": "33"}, {"RateLimit": '"api";r=0;t=33'}])
def test_rate_limited_listing_waits_as_asked(hub: LoopbackHub, headers: dict[str, str]) -> None:
    slept_s: list[float] = []
    hub.faults.status("org/free", 429, headers, place="listing", times=2)
    client(hub, sleep=slept_s.append).listing("org/free")
    assert len(slept_s) == 2 and all(33 <= s <= 34 for s in slept_s)
    hub.faults.status("org/free", 429, headers, place="listing", times=None)
    with pytest.raises(SourceError, match=r"rate limit is reached.*3 attempts.*HF_TOKEN") as caught:
        client(hub, sleep=slept_s.append).listing("org/free")
    assert caught.value.reason == "rate_limited" and caught.value.retry_after_s == 33


@pytest.mark.parametrize("status", [500, 503])
def test_failing_hub_is_asked_again(hub: LoopbackHub, status: int) -> None:
    hub.faults.status("org/free", status, place="listing", times=2)
    assert client(hub).listing("org/free").files
    hub.faults.status("org/free", status, place="listing", times=3)
    with pytest.raises(SourceError, match=f"HTTP {status}") as caught:
        client(hub).listing("org/free")
    assert caught.value.reason == "server_error" and caught.value.transient


def test_page_instead_of_a_listing(hub: LoopbackHub) -> None:
    hub.faults.html("org/free", place="listing", times=None)
    with pytest.raises(SourceError, match=r"does not answer like the Hub.*HF_ENDPOINT"):
        client(hub).listing("org/free")


def test_unreachable_and_silent_hub(tmp_path: Path) -> None:
    with LoopbackHub(tmp_path) as hub:
        gone = hub.endpoint
    with pytest.raises(SourceError, match="does not accept connections") as caught:
        HubClient(gone, policy=POLICY).listing("org/free")
    assert caught.value.reason == "connection" and caught.value.transient


def test_offline_mode_is_named(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import reset_sessions

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    reset_sessions()
    try:
        with pytest.raises(SourceError, match="HF_HUB_OFFLINE") as caught:
            client(hub).listing("org/free")
    finally:
        monkeypatch.undo()
        reset_sessions()
    assert not caught.value.transient and hub.requests.total() == 0


@pytest.mark.parametrize("load", [hf_hub_download, snapshot_download])
def test_rate_limit_that_surfaces_as_missing_file_is_recognised(hub: LoopbackHub, tmp_path: Path, load: object) -> None:
    headers = {"RateLimit": '"resolvers";r=0;t=12'}
    hub.faults.status("*", 429, headers, times=None)
    hub.faults.status("*", 429, headers, place="listing", times=None)
    arguments = ("org/model", "README.md") if load is hf_hub_download else ("org/model",)
    with pytest.raises(FileNotFoundError) as caught:
        load(*arguments, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")  # type: ignore[operator]
    error = client(hub).explain(caught.value, "org/model", "model", "README.md")
    assert error is not None and error.reason == "rate_limited" and error.retry_after_s == 12
    assert client(hub).explain(KeyError("x"), "org/model") is None
    assert client(hub).explain(requests.ReadTimeout(), "org/model").reason == "timeout"  # type: ignore[union-attr]


def test_expired_storage_link_is_renewed(hub: LoopbackHub, tmp_path: Path) -> None:
    one = client(hub)
    hub.faults.status("*/000.tgz", 403, place="body")
    one.fetch(one.locate(HubFile("org/free", "data/000.tgz")), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == ARCHIVE
    assert hub.requests["resolve"] == 2


def test_forbidden_and_disabled(hub: LoopbackHub) -> None:
    for message, expected in (
        ("Please enable access in your token settings", "unauthorized"),
        ("Access to this resource is disabled.", "not_found"),
    ):
        hub.faults.status("org/free", 403, {"X-Error-Message": message}, place="listing")
        with pytest.raises(SourceError) as caught:
            client(hub, "hf_granted").listing("org/free")
        assert caught.value.reason == expected and "org/free" in str(caught.value)


def test_no_secret_is_shown(hub: LoopbackHub, tmp_path: Path) -> None:
    one = client(hub, "hf_granted")
    assert repr(one) == f"HubClient(endpoint='{hub.endpoint}')"
    file = one.locate(GATED)
    assert hub.history[-1].with_token
    hub.faults.cut("*", 0, times=None)
    shown = []
    with pytest.raises(SourceError) as caught:
        one.fetch(file, tmp_path / "a")
    shown += traceback.format_exception(caught.value)
    hub.faults.status("*", 403, {"X-Error-Message": "hf_granted may not"}, place="listing", times=None)
    with pytest.raises(SourceError, match="may not") as caught:
        one.listing("org/free")
    shown += traceback.format_exception(caught.value)
    for text in shown:
        assert "hf_granted" not in text and "Signature" not in text


def test_import_is_cheap() -> None:
    program = (
        "import sys, md_assets.storage.hub, md_assets.demo.loopback_hub\n"
        "print(sorted({'huggingface_hub', 'requests', 'torch', 'tqdm', 'yaml'} & set(sys.modules)))"
    )
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
