"""The loopback web server: what it serves, to whom, and lists of its links."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from md_assets.demo.loopback_web import LoopbackWeb, write_link_list


@pytest.fixture
def web(tmp_path: Path) -> Iterator[LoopbackWeb]:
    for name in ("open/a.zip", "links/b.tar"):
        (tmp_path / "root" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / name).write_bytes(name.encode())
    (tmp_path / "outside").write_bytes(b"secret")
    with LoopbackWeb(tmp_path / "root", signed=["links/*"]) as web:
        yield web


def status(url: str) -> int:
    return requests.get(url).status_code


def test_head_and_get_tell_the_same_and_the_etag_changes_with_the_file(web: LoopbackWeb) -> None:
    url = f"{web.base_url}/open/a.zip"
    head, got = requests.head(url), requests.get(url)
    told = ("Content-Length", "ETag", "Last-Modified", "Accept-Ranges")
    assert [head.headers[name] for name in told] == [got.headers[name] for name in told]
    assert got.content == b"open/a.zip" and head.headers["Content-Length"] == "10"
    age_s = time.time() - parsedate_to_datetime(got.headers["Last-Modified"]).timestamp()
    assert -1 <= age_s < 60
    (web.root / "open" / "a.zip").write_bytes(b"open/b.zip!")
    assert requests.head(url).headers["ETag"] != got.headers["ETag"]


def test_a_server_may_tell_less_or_more_of_a_file(web: LoopbackWeb) -> None:
    with LoopbackWeb(web.root, headers=lambda file: {"Content-MD5": file.name}) as other:
        headers = requests.head(f"{other.base_url}/open/a.zip").headers
    assert headers["Content-MD5"] == "a.zip" and not {"ETag", "Last-Modified"} & set(headers)


def test_nothing_outside_is_served(web: LoopbackWeb) -> None:
    for path in ("/open", "/open/none", "/../outside", "/%2e%2e/outside"):
        response = requests.Session().send(requests.Request("GET", web.base_url + path).prepare())
        assert response.status_code == 404


def test_a_link_opens_its_file_until_it_expires(web: LoopbackWeb) -> None:
    url = web.signed_url("links/b.tar", time.time() + 60)
    assert requests.get(url).content == b"links/b.tar"
    assert status(f"{web.base_url}/links/b.tar") == 403
    assert status(url[:-1] + ("1" if url[-1] != "1" else "2")) == 403
    later = f"{int(time.time() + 3600):x}"
    assert status(url.replace(f"oe={parse_qs(urlsplit(url).query)['oe'][0]}", f"oe={later}")) == 403
    assert status(url.replace("links/b.tar", "open/a.zip")) == 403
    assert status(web.signed_url("links/b.tar", time.time() - 1)) == 403
    assert status(web.signed_url("open/a.zip", time.time() + 60)) == 200


def test_faults_of_a_head_are_its_own(web: LoopbackWeb) -> None:
    url = f"{web.base_url}/open/a.zip"
    web.faults.status("open/a.zip", 405, place="head", times=None)
    assert requests.head(url).status_code == 405 and status(url) == 200
    web.faults.status("open/a.zip", 503)
    assert status(url) == 503 and status(url) == 200


def test_a_list_is_a_table_of_names_and_links_in_order(web: LoopbackWeb, tmp_path: Path) -> None:
    names = ["b.tar", "ids.txt", "a.tar"]
    path = write_link_list(tmp_path / "deep" / "links.tsv", names, lambda name: f"https://cdn.org/{name}?oe=1")
    assert path.read_text().splitlines() == [
        "file_name\tcdn_link",
        *(f"{name}\thttps://cdn.org/{name}?oe=1" for name in names),
    ]
