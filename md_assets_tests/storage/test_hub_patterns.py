"""Files of the Hub whose exact names are not known beforehand: paths with `*`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from md_assets.core.errors import SourceError
from md_assets.core.source import HubFile, RemoteFile
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.storage.hub import HubClient, Listing

REPO = "org/caps"
NAMES = (
    "README.md",
    "data/test-00000-of-00002-6b0f.parquet",
    "data/train-00000-of-00013-d3ab.parquet",
    "data/train-00001-of-00013-8c1e.parquet",
    "data/train-00010-of-00013.parquet",
    "parts/1/sa_000000.tar",
    "parts/1/sa_000001.tar",
    "parts/2/odd [1]+.tar",
    "parts/2/sa_000001.tar",
)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    for name in NAMES:
        path = tmp_path / "datasets" / REPO / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    with LoopbackHub(tmp_path) as hub:
        yield hub


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("data/train-00000-of-00013*.parquet", "data/train-00000-of-00013-d3ab.parquet"),
        ("data/train-00010-of-00013*.parquet", "data/train-00010-of-00013.parquet"),  # `*` may stand for nothing
        ("*sa_000000.tar", "parts/1/sa_000000.tar"),
        ("parts/2/sa*.tar", "parts/2/sa_000001.tar"),
        ("*d [1]+*", "parts/2/odd [1]+.tar"),  # nothing but `*` means anything else
        ("*ADME.md", "README.md"),
    ],
)
def test_a_pattern_is_the_one_file_that_matches(hub: LoopbackHub, pattern: str, path: str) -> None:
    client = HubClient(hub.endpoint)
    assert client.locate(HubFile(REPO, pattern)) == client.locate(HubFile(REPO, path))
    assert hub.requests == {"listing": 1}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (
            "data/train-00002-of-00013*.parquet",
            "no files that match (data/test-00000-of-00002-6b0f.parquet, data/train",
        ),
        ("*sa_000001.tar", "2 files that match (parts/1/sa_000001.tar, parts/2/sa_000001.tar)"),
        ("*sa_00000?.tar", "no files that match (parts/1/sa_000000.tar, parts/1/sa_000001.tar, parts/2/odd"),
        ("*", "9 files that match (README.md, data/test-00000-of-00002-6b0f.parquet, data/train-00000-of-00013-d3ab"),
        ("*.webp", "no files that match at revision"),
    ],
)
def test_none_and_several_are_not_found_with_the_pattern_and_candidates(
    hub: LoopbackHub, pattern: str, says: str
) -> None:
    with pytest.raises(SourceError) as caught:
        HubClient(hub.endpoint).locate(HubFile(REPO, pattern))
    assert caught.value.reason == "not_found" and not caught.value.transient
    assert f"{REPO}:{pattern}: " in caught.value.what and says in caught.value.what
    assert caught.value.what.count("parquet") + caught.value.what.count("tar") <= 7


def listing_of(paths: list[str]) -> Callable[..., Listing]:
    files = {path: RemoteFile(path, "", 1, None, path, "c") for path in paths}
    return lambda *_: Listing(REPO, "dataset", "c", files)


def test_thousands_of_files_are_located_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """14,000 plain paths, as of diffdb, and 1,000 patterns over as many, as of a mirror of sa1b: ≈ 0.5 s here."""
    client = HubClient("http://127.0.0.1:9")
    paths = [f"diffusiondb-large-part-{1 + (n > 10_000)}/part-{n:06}.zip" for n in range(1, 14_001)]
    paths += [f"parts/sa_{n:06}.tar" for n in range(1_000)]
    monkeypatch.setattr(client, "listing", listing_of(paths))
    begun_s = time.process_time()
    assert [client.locate(HubFile(REPO, path)).name for path in paths] == paths
    assert [client.locate(HubFile(REPO, f"*sa_{n:06}.tar")).name for n in range(1_000)] == paths[14_000:]
    assert time.process_time() - begun_s < 10
