"""A loopback server's answers, byte by byte: ranges, pace, connections."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from md_assets.core.errors import SettingsError
from md_assets.demo.loopback_http import Request
from md_assets.demo.loopback_web import LoopbackWeb

LARGE = random.Random(3).randbytes(200_000)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[LoopbackWeb]:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "ä b.tar").write_bytes(LARGE)
    (tmp_path / "sub" / "x.txt").write_bytes(b"x")
    with LoopbackWeb(tmp_path) as web:
        yield web


@pytest.mark.parametrize(
    ("header", "status", "part"),
    [
        ("bytes=0-0", 206, slice(0, 1)),
        ("bytes=100-199", 206, slice(100, 200)),
        ("bytes=199990-", 206, slice(199_990, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=199999-900000", 206, slice(199_999, None)),
        ("bytes=200000-", 416, slice(0, 0)),
        ("bytes=-", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
    ],
)
def test_ranges(web: LoopbackWeb, header: str, status: int, part: slice) -> None:
    response = requests.get(f"{web.base_url}/sub/ä b.tar", headers={"Range": header})
    assert response.status_code == status and response.content == LARGE[part]
    if status == 206:
        first, last = re.fullmatch(r"bytes (\d+)-(\d+)/200000", response.headers["Content-Range"]).groups()  # type: ignore[union-attr]
        assert LARGE[int(first) : int(last) + 1] == LARGE[part]


def test_throttle_takes_its_time(web: LoopbackWeb) -> None:
    web.faults.throttle("*.tar", 500_000)
    begun_s = time.monotonic()
    assert requests.get(f"{web.base_url}/sub/ä b.tar").content == LARGE
    assert time.monotonic() - begun_s >= 0.38


def test_one_connection_serves_many_requests(web: LoopbackWeb) -> None:
    with requests.Session() as session:
        for _ in range(50):
            assert session.get(f"{web.base_url}/x.txt").status_code == 404
            assert session.get(f"{web.base_url}/sub/x.txt").content == b"x"
        pools = session.adapters["http://"].poolmanager.pools
        assert [pools[key].num_connections for key in pools.keys()] == [1]  # noqa: SIM118 — not a mapping


def test_requests_are_remembered_in_order(web: LoopbackWeb) -> None:
    requests.head(f"{web.base_url}/sub/x.txt")
    requests.get(f"{web.base_url}/sub/x.txt", headers={"Range": "bytes=0-0", "Authorization": "Bearer x"})
    assert list(web.history) == [
        Request("head", "sub/x.txt", "", False),
        Request("get", "sub/x.txt", "bytes=0-0", True),
    ]
    assert web.requests == {"head": 1, "get": 1}


def test_a_server_that_does_not_run_has_no_address_and_a_taken_port_is_named(web: LoopbackWeb, tmp_path: Path) -> None:
    port = int(web.base_url.rpartition(":")[2])
    with pytest.raises(SettingsError, match=f"the loopback web server cannot listen on 127.0.0.1:{port}"):
        LoopbackWeb(tmp_path, port).start()
    with pytest.raises(RuntimeError, match="the loopback web server is not running"):
        _ = LoopbackWeb(tmp_path).base_url
