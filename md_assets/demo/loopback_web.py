"""A plain web server on this machine: a directory with ranges, ETags and signed links, and lists of such links.

Here: paths, signatures, lists. Not here: connections, ranges and faults (`demo.loopback_http`), the Hub
(`demo.loopback_hub`). It binds to the loopback interface only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from email.utils import formatdate
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

from md_assets.demo.loopback_http import Handler, Loopback


def etag_and_date(file: Path) -> dict[str, str]:
    """What a web server tells of a file besides its size."""
    stat = file.stat()
    return {
        "ETag": f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"',
        "Last-Modified": formatdate(stat.st_mtime, usegmt=True),
        "Accept-Ranges": "bytes",
    }


class _WebHandler(Handler):
    """Answers for a `LoopbackWeb`. Kinds in the history: `head` and `get`; names are paths without leading `/`."""

    def _route(self) -> None:
        web, url = cast("LoopbackWeb", self.loopback), urlsplit(self.path)
        name = unquote(url.path).lstrip("/")
        is_head = self.command == "HEAD"
        self._record(self.command.lower(), name)
        if (is_head and self._fails(web.faults.take("head", name))) or self._fails(web.faults.take("resolve", name)):
            return
        file = web.root / name
        if not web.admits(url.path, parse_qs(url.query)):
            self._answer(403, b"URL signature mismatch or expired", {"Content-Type": "text/plain"})
        elif ".." in Path(name).parts or not file.is_file():
            self._answer(404, b"not found", {"Content-Type": "text/plain"})
        else:
            self._file(file, web.headers(file), name)


class LoopbackWeb(Loopback):
    """The server, running from the start of its `with` block to the end.

    Args:
        root: what it serves; may change while served.
        port: 0 for any free one.
        signed: globs of paths that only a signed link opens.
        headers: file -> what is told of it besides its size.
    """

    handler = _WebHandler
    what = "the loopback web server"

    def __init__(
        self,
        root: Path | str,
        port: int = 0,
        *,
        signed: Collection[str] = (),
        headers: Callable[[Path], Mapping[str, str]] = etag_and_date,
    ) -> None:
        super().__init__(port)
        self.root = Path(root)
        self.signed = tuple(signed)
        self.headers = headers

    @property
    def base_url(self) -> str:
        """The address of `root`, without trailing slash, while it runs."""
        return self.address

    def signed_url(self, path: str, expires_s: float) -> str:
        """A link that opens `path` until `expires_s` (Unix time), told as SA-1B's links do: `oe`, hexadecimal."""
        expiry = f"{int(expires_s):x}"
        link = f"/{quote(path)}"
        return f"{self.base_url}{link}?oe={expiry}&sig={self.signature(f'{link}?{expiry}')}"

    def admits(self, link: str, query: Mapping[str, list[str]]) -> bool:
        """Whether a request may have its file: no signature is needed, or its signature is right and not expired."""
        if "sig" not in query and not any(fnmatchcase(unquote(link).lstrip("/"), glob) for glob in self.signed):
            return True
        expiry = query.get("oe", [""])[0]
        return query.get("sig") == [self.signature(f"{link}?{expiry}")] and int(expiry, 16) > time.time()


def write_link_list(path: Path, names: Iterable[str], link: Callable[[str], str]) -> Path:
    """Write a list of links as SA-1B has it: tab-separated, `file_name` and `cdn_link`, in the order of `names`.

    Args:
        path: of the list; its directory is made.
        names: of files.
        link: name -> address, of `LoopbackWeb.signed_url` for instance.
    """
    rows = [("file_name", "cdn_link"), *((name, link(name)) for name in names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\t{address}\n" for name, address in rows))
    return path
