"""The loopback Hub as the real client sees it."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from md_assets.core.errors import SettingsError
from md_assets.demo.loopback_hub import LoopbackHub, main

LARGE = random.Random(3).randbytes(200_000)
FILES = {
    "README.md": b"# hi\n",
    "config.json": b"{}",
    "sub/deep/ä b.tar": LARGE,
    "sub/x.txt": b"x",
    "z.bin": b"tiny",
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "root/datasets/org/data", FILES)
    write(tmp_path / "root/datasets/org/gated", FILES)
    write(tmp_path / "root/models/org/model", FILES)
    return tmp_path / "root"


@pytest.fixture
def hub(root: Path) -> Iterator[LoopbackHub]:
    tokens = {"hf_granted": ["org/gated"], "hf_stranger": []}
    with LoopbackHub(root, gated=["org/gated"], tokens=tokens, page_entries=2) as hub:
        yield hub


def api(hub: LoopbackHub, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


@pytest.mark.parametrize(("repo", "repo_type"), [("org/data", "dataset"), ("org/model", "model")])
def test_repo_info_tells_every_file(hub: LoopbackHub, repo: str, repo_type: str) -> None:
    info = api(hub).repo_info(repo, repo_type=repo_type, files_metadata=True)
    assert info.id == repo and re.fullmatch("[0-9a-f]{40}", info.sha or "")
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert {path: file.size for path, file in files.items()} == {path: len(FILES[path]) for path in FILES}
    lfs = {path: file.lfs.sha256 for path, file in files.items() if file.lfs}
    assert lfs == {path: hashlib.sha256(FILES[path]).hexdigest() for path in ("sub/deep/ä b.tar", "z.bin")}
    # printf '{}' | git hash-object --stdin
    assert files["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert all(s.size is None for s in api(hub).repo_info(repo, repo_type=repo_type).siblings or [])


@pytest.mark.parametrize(("repo", "repo_type"), [("org/data", "dataset"), ("org/model", "model")])
def test_snapshot_download(hub: LoopbackHub, tmp_path: Path, repo: str, repo_type: str) -> None:
    folder = Path(
        snapshot_download(repo, repo_type=repo_type, endpoint=hub.endpoint, cache_dir=tmp_path / "c", token=False)
    )
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert folder.name == api(hub).repo_info(repo, repo_type=repo_type).sha


def test_hf_hub_download_and_its_own_cache(hub: LoopbackHub, tmp_path: Path) -> None:
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path / "c", "repo_type": "dataset", "token": False}
    for _ in range(2):
        for path, content in FILES.items():
            assert Path(hf_hub_download("org/data", path, **where)).read_bytes() == content
    assert hub.requests["head"] == 2 * len(FILES)
    assert hub.requests["cdn"] + hub.requests["resolve"] == len(FILES), "the second round comes from the cache"
    hf_hub_download("org/data", "README.md", local_dir=tmp_path / "local", **where)
    assert (tmp_path / "local" / "README.md").read_bytes() == FILES["README.md"]


def test_hf_hub_download_resumes(hub: LoopbackHub, tmp_path: Path) -> None:
    blobs = tmp_path / "datasets--org--data" / "blobs"
    write(blobs, {f"{hashlib.sha256(LARGE).hexdigest()}.incomplete": LARGE[:150_000]})
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path, "repo_type": "dataset", "token": False}
    assert Path(hf_hub_download("org/data", "sub/deep/ä b.tar", **where)).read_bytes() == LARGE
    assert [request.range_header for request in hub.history if request.kind == "cdn"] == ["bytes=150000-"]


def test_tree_is_paged_and_may_be_a_folders(hub: LoopbackHub) -> None:
    rows = list(api(hub).list_repo_tree("org/data", repo_type="dataset", recursive=True))
    assert sorted(row.path for row in rows) == sorted([*FILES, "sub", "sub/deep"])
    assert hub.requests["tree"] == 4  # 7 rows, 2 on a page
    large = next(row for row in rows if row.path.endswith(".tar"))
    assert (large.size, large.lfs.sha256) == (len(LARGE), hashlib.sha256(LARGE).hexdigest())
    top = [row.path for row in api(hub).list_repo_tree("org/data", repo_type="dataset")]
    assert sorted(top) == ["README.md", "config.json", "sub", "z.bin"]
    sub = [row.path for row in api(hub).list_repo_tree("org/data", "sub", repo_type="dataset")]
    assert sorted(sub) == ["sub/deep", "sub/x.txt"]
    with pytest.raises(EntryNotFoundError):
        list(api(hub).list_repo_tree("org/data", "nowhere", repo_type="dataset"))


def test_what_is_missing_is_told_as_the_hub_does(hub: LoopbackHub, tmp_path: Path) -> None:
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path, "repo_type": "dataset", "token": False}
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("org/data", "nothing", **where)
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("org/data", "README.md", revision="v1", **where)
    for token, status in ((False, 401), ("hf_granted", 404)):
        with pytest.raises(RepositoryNotFoundError) as caught:
            api(hub, token).repo_info("org/nothing", repo_type="dataset")
        assert caught.value.response.status_code == status
    for path in ("/datasets/../models/org/resolve/main/model/README.md", "/datasets/%2e%2e/x/resolve/main/y"):
        response = requests.Session().send(requests.Request("GET", hub.endpoint + path).prepare())
        assert response.status_code in (401, 404)
    assert requests.get(f"{hub.endpoint}/elsewhere").status_code == 404


def test_gated_repository(hub: LoopbackHub, tmp_path: Path) -> None:
    where = {"endpoint": hub.endpoint, "cache_dir": tmp_path, "repo_type": "dataset"}
    assert api(hub).repo_info("org/gated", repo_type="dataset").gated == "manual"
    for token, status in ((False, 401), ("hf_stranger", 403)):
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download("org/gated", "README.md", token=token, **where)
        assert caught.value.response.status_code == status
    assert Path(hf_hub_download("org/gated", "README.md", token="hf_granted", **where)).is_file()


def test_tokens(hub: LoopbackHub, root: Path) -> None:
    assert api(hub, "hf_stranger").whoami()["name"] == "loopback"
    with pytest.raises(requests.HTTPError, match="Invalid user token"):
        api(hub, "hf_typo").whoami()
    with pytest.raises(HfHubHTTPError) as caught:
        api(hub, "hf_typo").repo_info("org/data", repo_type="dataset")
    assert "Invalid credentials" in str(caught.value)
    with LoopbackHub(root, gated=["org/gated"]) as open_hub:
        url = f"{open_hub.endpoint}/datasets/org/gated/resolve/main/README.md"
        assert requests.get(url, headers={"Authorization": "Bearer hf_any"}).content == FILES["README.md"]
        assert requests.get(url).status_code == 401


def test_commit_follows_from_content_and_old_one_resolves_what_is_unchanged(
    hub: LoopbackHub, root: Path, tmp_path: Path
) -> None:
    old = api(hub).repo_info("org/data", repo_type="dataset").sha
    twin = write(tmp_path / "twin/datasets/org/data", FILES).parents[2]
    with LoopbackHub(twin) as other:
        assert api(other).repo_info("org/data", repo_type="dataset").sha == old
    (root / "datasets/org/data/README.md").write_bytes(b"# mended\n")
    new = api(hub).repo_info("org/data", repo_type="dataset").sha
    assert new != old
    base = f"{hub.endpoint}/datasets/org/data/resolve"
    assert requests.get(f"{base}/{new}/README.md").content == b"# mended\n"
    unchanged = requests.get(f"{base}/{old}/z.bin")
    assert unchanged.content == b"tiny" and unchanged.history[0].headers["X-Repo-Commit"] == old
    changed = requests.get(f"{base}/{old}/README.md")
    assert (changed.status_code, changed.headers["X-Error-Code"]) == (404, "RevisionNotFound")
    with pytest.raises(RevisionNotFoundError):
        api(hub).repo_info("org/data", repo_type="dataset", revision=old)
    (root / "datasets/org/data/README.md").write_bytes(FILES["README.md"])
    assert api(hub).repo_info("org/data", repo_type="dataset").sha == old


def test_stopped_hub_answers_nobody_even_on_open_connections(root: Path, tmp_path: Path) -> None:
    with requests.Session() as session:
        with LoopbackHub(root) as hub:
            url = f"{hub.endpoint}/datasets/org/data/resolve/main/README.md"
            assert session.get(url).ok
            port = int(hub.endpoint.rpartition(":")[2])
            with pytest.raises(SettingsError, match=f"127.0.0.1:{port}"):
                LoopbackHub(root, port).start()
        with pytest.raises(requests.ConnectionError):
            session.get(url)
    with pytest.raises(RuntimeError):
        _ = hub.endpoint


def test_command_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "md_assets.demo.loopback_hub",
        "--root",
        str(root),
        "--gated",
        "org/gated",
    ]
    folder = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        endpoint = process.stdout.readline().strip().removeprefix("HF_ENDPOINT=")
        base = f"{endpoint}/datasets/org"
        assert requests.get(f"{base}/data/resolve/main/README.md").content == FILES["README.md"]
        assert requests.get(f"{base}/gated/resolve/main/README.md").status_code == 401
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert errors == ""
    with pytest.raises(SystemExit) as caught:
        main(["--root", str(root / "nowhere")])
    assert caught.value.code == 2 and "nowhere" in capsys.readouterr().err
