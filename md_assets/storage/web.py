"""Plain web servers as a source: what a server tells of a file before it is fetched, and fetching it.

Here: base addresses, sizes, content ids, checksums beside a file. Not here: the transfer itself (`storage.http`),
repetition (`storage.retry`), lists of links (`storage.links`).
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, urlsplit

from md_assets.core.errors import SettingsError, SourceError
from md_assets.core.source import BytesProgress, Checksum, RemoteFile, WebFile
from md_assets.storage.http import Explain, announced_size, connection_error, download, redact_url, refuse_page
from md_assets.storage.retry import TransferPolicy, retrying, status_error

if TYPE_CHECKING:
    import requests

HEAD_REFUSED = frozenset({400, 403, 405, 501})
"""Answers to HEAD after which GET is tried: RFC 9110 §15.5.6 and §15.6.2, and what storage answers to a HEAD of a link
that was signed for GET."""

CHECKSUM_FILE_BYTES = 64 * 1024
"""Read at most of a `.md5` file; what is longer is none."""


@dataclass(frozen=True)
class _Answer:
    """The head of an answer, its headers by lower-case name, and the first bytes of its body."""

    size_bytes: int | None
    headers: dict[str, str]
    body: bytes


class WebClient:
    """Locates and fetches files of plain web servers; may be shared by threads. It remembers what it located.

    Args:
        policy: time-outs and attempts.
        sleep: waits so many seconds; replaced in tests.
    """

    def __init__(self, policy: TransferPolicy | None = None, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._policy = policy or TransferPolicy()
        self._sleep = sleep
        self._located: dict[tuple[str, WebFile], RemoteFile] = {}

    def locate(self, file: WebFile) -> RemoteFile:
        """The file as its server has it now: one HEAD, and at another base than the default one a look for its `.md5`.

        Raises:
            SettingsError: the variable's value is no address.
            SourceError: the file is not there, or the server does not answer.
        """
        base = os.environ.get(file.base_variable) or file.default_base
        if (base, file) not in self._located:
            self._located[base, file] = self._ask(base, file)
        return self._located[base, file]

    def fetch(
        self,
        remote: RemoteFile,
        destination: Path,
        progress: BytesProgress | None = None,
        explain: Explain | None = None,
    ) -> RemoteFile:
        """Fetches a file, and returns it as it turned out; resumes, may be repeated.

        Args:
            explain: meaning of an answer with an error status, where it has one of its own.

        Raises:
            SourceError: see `storage.http.download`.
        """
        return download(
            remote, destination, policy=self._policy, progress=progress, explain=explain, sleep=self._sleep
        ).remote

    def read(self, url: str, name: str, limit_bytes: int) -> bytes:
        """A small file.

        Args:
            name: what messages call it.

        Raises:
            SourceError: it cannot be read, or has more than `limit_bytes`.
        """
        answer = self._request("GET", url, name, limit_bytes + 1)
        if len(answer.body) > limit_bytes:
            raise SourceError(
                f"{name}: it has more than {limit_bytes} bytes",
                "Check the address",
                reason="server_error",
                transient=False,
            )
        return answer.body

    def _ask(self, base: str, file: WebFile) -> RemoteFile:
        url = _below(base, file)
        name = redact_url(url)
        answer = self._head(url, name)
        if base.rstrip("/") == file.default_base.rstrip("/"):
            checksum = file.checksum
        else:
            checksum = self._md5_beside(base, file) or _content_md5(answer.headers.get("content-md5", ""))
        etag = answer.headers.get("etag", "").removeprefix("W/").strip('"')
        modified = answer.headers.get("last-modified", "")
        dated = f"{answer.size_bytes}-{modified}" if modified else ""
        return RemoteFile(
            name=name,
            url=url,
            size_bytes=answer.size_bytes,
            checksum=checksum,
            content_id=checksum.hexdigest if checksum else etag or dated,
            revision="",
            via="web",
        )

    def _head(self, url: str, name: str) -> _Answer:
        try:
            return self._request("HEAD", url, name)
        except _HeadRefusedError:
            return self._request("GET", url, name, headers={"Range": "bytes=0-0"})

    def _md5_beside(self, base: str, file: WebFile) -> Checksum | None:
        url = _below(base, file, ".md5")
        try:
            answer = self._request("GET", url, redact_url(url), CHECKSUM_FILE_BYTES)
        except SourceError as error:
            if error.transient:
                raise  # whether there is one decides the content id, so it must not be guessed
            return None
        first = answer.body.split(maxsplit=1)[:1]
        word = first[0].decode("ascii", "replace").lower() if first else ""
        return Checksum("md5", word) if re.fullmatch("[0-9a-f]{32}", word) else None

    def _request(
        self,
        method: Literal["HEAD", "GET"],
        url: str,
        name: str,
        body_bytes: int = 0,
        headers: dict[str, str] | None = None,
    ) -> _Answer:
        return retrying(lambda: self._attempt(method, url, name, body_bytes, headers), self._policy, sleep=self._sleep)

    def _attempt(
        self, method: Literal["HEAD", "GET"], url: str, name: str, body_bytes: int, headers: dict[str, str] | None
    ) -> _Answer:
        import requests

        try:
            with requests.request(
                method,
                url,
                headers={**(headers or {}), "Accept-Encoding": "identity"},
                timeout=(self._policy.connect_timeout_s, self._policy.stall_timeout_s),
                allow_redirects=True,
                stream=True,
            ) as response:
                if method == "HEAD" and response.status_code in HEAD_REFUSED:
                    raise _HeadRefusedError
                _check(response, name, url)
                size_bytes = announced_size(response)
                body = _beginning(response, body_bytes)
                return _Answer(size_bytes, {key.lower(): value for key, value in response.headers.items()}, body)
        except (requests.RequestException, ConnectionError) as error:
            failure = connection_error(name, error)
        # Raised out here, so that no traceback shows requests' own error: it quotes signed addresses.
        raise failure


class _HeadRefusedError(Exception):
    """The server answers GET only."""


def _check(response: requests.Response, name: str, url: str) -> None:
    if response.status_code not in (200, 206):
        raise status_error(name, response.status_code, response.headers, secrets=(urlsplit(url).query,))
    refuse_page(name, response)


def _beginning(response: requests.Response, limit_bytes: int) -> bytes:
    body = b""
    if limit_bytes:
        for chunk in response.iter_content(64 * 1024):
            body += chunk
            if len(body) >= limit_bytes:
                break
    return body[:limit_bytes]


def _below(base: str, file: WebFile, suffix: str = "") -> str:
    """The address of a file below a base, which may carry a query (an access token, say)."""
    try:
        parts = urlsplit(base)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        valid = False
    if not valid:
        raise SettingsError(
            f"{file.base_variable} is no http or https address",
            f"Set it to an address below which {file.path} lies, or unset it for {file.default_base}",
        )
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(file.path)}{suffix}").geturl()


def _content_md5(header: str) -> Checksum | None:
    """RFC 1864: the base64 of the 16 bytes."""
    try:
        digest = base64.b64decode(header, validate=True)
    except (binascii.Error, ValueError):
        return None
    return Checksum("md5", digest.hex()) if len(digest) == 16 else None
