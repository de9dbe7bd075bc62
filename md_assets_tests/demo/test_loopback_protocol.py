"""The loopback Hub's answers: links, and which request takes which fault."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from md_assets.demo.loopback_hub import LoopbackHub

LARGE = random.Random(3).randbytes(200_000)
FILES = {"README.md": b"# hi\n", "config.json": b"{}", "sub/deep/ä b.tar": LARGE, "sub/x.txt": b"x", "z.bin": b"tiny"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    for path, content in FILES.items():
        file = tmp_path / "datasets" / "org" / "data" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    with LoopbackHub(tmp_path) as hub:
        yield hub


def test_head_of_both_kinds_of_file(hub: LoopbackHub) -> None:
    base = f"{hub.endpoint}/datasets/org/data/resolve/main"
    small = requests.head(f"{base}/README.md")
    assert (small.status_code, small.headers["Content-Length"], small.content) == (200, "5", b"")
    large = requests.head(f"{base}/sub/deep/ä b.tar")
    assert large.status_code == 302 and large.headers["X-Linked-Size"] == str(len(LARGE))
    assert large.headers["X-Linked-ETag"] == f'"{hashlib.sha256(LARGE).hexdigest()}"'
    unsigned = large.headers["Location"].partition("?")[0]
    assert requests.get(unsigned).status_code == 403
    assert requests.get(large.headers["Location"]).content == LARGE


def test_faults_befall_only_what_they_name_and_as_often_as_told(hub: LoopbackHub) -> None:
    base = f"{hub.endpoint}/datasets/org/data/resolve/main"
    hub.faults.status("org/data/README.md", 429, {"Retry-After": "1"}, times=2)
    assert requests.get(f"{base}/config.json").status_code == 200
    answers = [requests.get(f"{base}/README.md") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [429, 429, 200]
    assert answers[0].headers["Retry-After"] == "1" and hub.faults.pending() == 0
    hub.faults.html("*")
    assert requests.get(f"{base}/z.bin").headers["Content-Type"].startswith("text/html")
    hub.faults.corrupt("*", times=None)
    assert requests.get(f"{base}/z.bin").content == bytes(255 - byte for byte in b"tiny")
    hub.faults.clear()
    assert requests.get(f"{base}/z.bin").content == b"tiny"
