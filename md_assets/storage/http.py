"""Fetching one remote file to disk over HTTP, so that what has the final name is whole and verified.

Here: requests, ranges, resumption, time-outs. Not here: the incomplete file and its checks
(`storage.part_file`), which files there are (`storage.hub`), when to repeat (`storage.retry`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from md_assets.core.errors import SourceError
from md_assets.core.source import BytesProgress, RemoteFile
from md_assets.storage.free_space import require_space
from md_assets.storage.part_file import Digest, MismatchError, PartFile, verified_size
from md_assets.storage.retry import TransferPolicy, retrying, status_error

if TYPE_CHECKING:
    import requests

__all__ = ["Digest", "Downloaded", "Explain", "TransferPolicy", "connection_error", "download", "redact_url"]

CHUNK_BYTES = 64 * 1024
"""Read and written at a time; urllib3 drops up to so many bytes that came before a cut or stall."""

Explain = Callable[["requests.Response"], SourceError | None]
"""Gives a source's own error for an answer with an error status, or None for the general one."""


@dataclass(frozen=True)
class Downloaded:
    """What `download` did.

    Attributes:
        path: the destination, whole and verified.
        remote: the file as it turned out: with its size, and where the source did not tell the content, its sha256
            as `content_id`.
        fetched_bytes: bytes that came over the network in this call, of all attempts.
        attempts: requests made; 0 when the file was there already.
    """

    path: Path
    remote: RemoteFile
    fetched_bytes: int
    attempts: int


def download(
    remote: RemoteFile,
    destination: Path,
    *,
    session: requests.Session | None = None,
    headers: Mapping[str, str] | None = None,
    policy: TransferPolicy | None = None,
    progress: BytesProgress | None = None,
    digest: Digest | None = None,
    explain: Explain | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Downloaded:
    """Fetches `remote` to `destination`, resuming what an earlier call or process left.

    May be repeated: a destination that already has the announced size and checksum is not fetched again.
    A file without a published checksum is always fetched. An exception out of `progress` ends the transfer
    and leaves what there is for the next call.

    Args:
        remote: the file; its size and checksum are verified where it has them.
        destination: where it goes; its directory is made. A file there is replaced only at the end.
        session: carries proxies and connections; a fresh one by default.
        headers: sent with each request; requests itself drops `Authorization` on a redirect to another host.
        policy: time-outs and attempts.
        progress: called after each chunk with (bytes done, bytes in all, 0 when unknown).
        digest: overrides `remote.checksum`.
        explain: a source's own error texts.
        sleep: waits so many seconds; replaced in tests.

    Raises:
        SourceError: reason `size_mismatch` or `checksum_mismatch` after a second download from zero differed
            too; `disk_full`; `busy` while another process fetches to the same destination; else see
            `storage.retry.status_error` and `connection_error`.
    """
    policy = policy or TransferPolicy()
    if digest is None and remote.checksum is not None:
        digest = Digest(remote.checksum.algorithm, remote.checksum.hexdigest)
    if digest is not None and (size_bytes := verified_size(destination, remote, digest)) is not None:
        if progress is not None:
            progress(size_bytes, size_bytes)
        return Downloaded(destination, replace(remote, size_bytes=size_bytes), fetched_bytes=0, attempts=0)

    with PartFile(remote, destination, digest) as part:
        transfer = _Transfer(remote, part, session, headers or {}, policy, progress, explain)
        try:
            for last in (False, True):
                try:
                    retrying(transfer.attempt, policy, sleep=sleep, progress=lambda: part.size_bytes)
                    break
                except MismatchError:
                    # What was resumed may have been the wrong beginning, so once more without it.
                    part.clear()
                    if last:
                        raise
        finally:
            transfer.close()
        part.publish()
        content_id = remote.content_id or part.hexdigest
        found = replace(remote, size_bytes=part.size_bytes, content_id=content_id)
        return Downloaded(destination, found, transfer.fetched_bytes, transfer.attempts)


class _Transfer:
    """The requests for one file."""

    def __init__(
        self,
        remote: RemoteFile,
        part: PartFile,
        session: requests.Session | None,
        headers: Mapping[str, str],
        policy: TransferPolicy,
        progress: BytesProgress | None,
        explain: Explain | None,
    ) -> None:
        import requests  # 0.2 s, and not needed by those who only import the package

        self.remote, self.part, self.policy = remote, part, policy
        self.own_session = requests.Session() if session is None else None
        self.session = session or self.own_session or requests.Session()
        # Ranges count the bytes sent, so they must be the file's own.
        self.headers = {**headers, "Accept-Encoding": "identity"}
        self.progress, self.explain = progress, explain
        self.attempts = 0
        self.fetched_bytes = 0

    def close(self) -> None:
        if self.own_session is not None:
            self.own_session.close()

    def attempt(self) -> None:
        """One request for what is missing, up to the verified end of the file."""
        import requests

        if self.part.size_bytes == 0 or self.part.size_bytes != self.remote.size_bytes:
            self.attempts += 1
            failure: SourceError | None = None
            try:
                self._request()
            except (requests.RequestException, ConnectionError) as error:
                failure = connection_error(self.remote.name, error)
            # Raised out here, so that no traceback shows requests' own error: it quotes signed addresses.
            if failure is not None:
                raise failure
        self.part.verify()

    def _request(self) -> None:
        start = self.part.size_bytes
        headers = {**self.headers, "Range": f"bytes={start}-"} if start else self.headers
        timeout = (self.policy.connect_timeout_s, self.policy.stall_timeout_s)
        with self.session.get(self.remote.url, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code == 416 and start and _range_total(response) == start:
                return  # of a file whose size nobody announced, all was there
            total_bytes = self._check_answer(response, start)
            etag = response.headers.get("ETag", "")
            if self.part.etag != etag or not start:
                self.part.note_source(etag)
            # An hour into the transfer would be late to find out.
            needed_bytes = (total_bytes or 0) - self.part.size_bytes
            require_space(self.remote.name, self.part.destination.parent, needed_bytes)
            for chunk in response.iter_content(CHUNK_BYTES):
                if total_bytes is not None and self.part.size_bytes + len(chunk) > total_bytes:
                    raise self._mismatch(f"more than the announced {total_bytes} bytes came")
                self.part.append(chunk)
                self.fetched_bytes += len(chunk)
                if self.progress is not None:
                    self.progress(self.part.size_bytes, total_bytes or 0)
        if total_bytes is not None and self.part.size_bytes < total_bytes:
            raise SourceError(
                f"{self.remote.name}: the answer ended after {self.part.size_bytes} of {total_bytes} bytes",
                "Check the network; what came is kept and the next run goes on from there",
                reason="connection",
                transient=True,
            )

    def _check_answer(self, response: requests.Response, start: int) -> int | None:
        """The size of the whole file in bytes, None if unknown; raises unless the body continues the part."""
        status, name = response.status_code, self.remote.name
        if start and status in (206, 416) and not self._continues(response, start):
            self.part.clear()
            raise SourceError(
                f"{name}: the server did not answer the range asked for, from byte {start}",
                "Try again later",
                reason="server_error",
                transient=True,
            )
        if status not in (200, 206):
            error = self.explain(response) if self.explain is not None else None
            raise error or status_error(name, status, response.headers, secrets=self._secrets())
        if status == 200 and start:
            self.part.clear()  # the server knows no ranges and sends all
        refuse_page(name, response)
        sent_bytes = announced_size(response)
        expected_bytes = self.remote.size_bytes
        if None not in (sent_bytes, expected_bytes) and sent_bytes != expected_bytes:
            raise self._mismatch(f"{sent_bytes} bytes are sent where the source announces {expected_bytes}")
        return sent_bytes if expected_bytes is None else expected_bytes

    def _continues(self, response: requests.Response, start: int) -> bool:
        if response.status_code != 206 or _range_start(response) != start:
            return False
        # Without a checksum only the ETag tells whether the file was replaced since.
        etag = response.headers.get("ETag", "")
        return self.part.digest is not None or not (etag and self.part.etag) or etag == self.part.etag

    def _mismatch(self, what: str) -> MismatchError:
        return MismatchError(
            f"{self.remote.name}: {what}",
            "The source is inconsistent; try again after it has been mended",
            reason="size_mismatch",
        )

    def _secrets(self) -> tuple[str, ...]:
        authorization = self.headers.get("authorization") or self.headers.get("Authorization") or ""
        return tuple(authorization.split()[1:]) + tuple(filter(None, [urlsplit(self.remote.url).query]))


def connection_error(name: str, error: BaseException) -> SourceError:
    """The `SourceError` for a request without an answer, or whose answer broke off.

    Args:
        name: what was asked for, without secrets.
        error: of requests or huggingface_hub. Its text is not used: it quotes addresses with signatures.
    """
    import requests

    kinds = {type(e).__name__ for e in _chain(error)}
    remedy = "Check the network and the proxy settings; the next run goes on where this one stopped"
    if isinstance(error, requests.Timeout) or "ReadTimeoutError" in kinds:
        connecting = isinstance(error, requests.ConnectTimeout)
        what = "no connection within the time-out" if connecting else "no byte arrived within the time-out"
        return SourceError(f"{name}: {what}", remedy, reason="timeout", transient=True)
    if "OfflineModeIsEnabled" in kinds:
        remedy = "Unset HF_HUB_OFFLINE"
        return SourceError(f"{name}: offline mode is on", remedy, reason="connection", transient=False)
    if isinstance(error, ValueError):  # requests' InvalidURL, MissingSchema and their like
        remedy = "Check the address, and the environment variable or list that it comes from"
        return SourceError(f"{name}: its address is not valid", remedy, reason="connection", transient=False)
    what = "the connection failed"
    if isinstance(error, requests.exceptions.SSLError):
        what = "the TLS connection failed"
    elif isinstance(error, requests.exceptions.ProxyError):
        what = "the proxy failed"
    elif isinstance(error, requests.exceptions.ChunkedEncodingError):
        what = "the connection was cut during the transfer"
    elif "NameResolutionError" in kinds:
        what = "the server's name is not known"
    elif "NewConnectionError" in kinds:
        what = "the server does not accept connections"
    return SourceError(f"{name}: {what}", remedy, reason="connection", transient=True)


def refuse_page(name: str, response: requests.Response) -> None:
    """Raises `MismatchError` if a server answers a web page where a file called `name` was asked for."""
    is_page = response.headers.get("Content-Type", "").lower().startswith("text/html")
    if is_page and not name.lower().endswith((".html", ".htm")):
        raise MismatchError(
            f"{name}: the server answered an HTML page instead of the file",
            "Open the address in a browser: a proxy, a login page or an expired link may be in the way",
            reason="server_error",
        )


def announced_size(response: requests.Response) -> int | None:
    """The size in bytes of the whole file that an answer with status 200 or 206 is (of), None if it does not tell."""
    if response.status_code == 206:
        return _range_total(response)
    return _int(response.headers.get("Content-Length"))


def redact_url(url: str) -> str:
    """`url` without user, password, query and fragment: what may be shown."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _chain(error: BaseException) -> list[BaseException]:
    """`error` and the errors it wraps, by argument (requests), `reason` (urllib3) or cause."""
    found: list[BaseException] = []
    todo: list[object] = [error]
    while todo and len(found) < 20:
        one = todo.pop()
        if isinstance(one, BaseException) and one not in found:
            found.append(one)
            todo += [*one.args, getattr(one, "reason", None), one.__cause__]
    return found


def _range_start(response: requests.Response) -> int | None:
    match = re.match(r"bytes\s+(\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _range_total(response: requests.Response) -> int | None:
    return _int(response.headers.get("Content-Range", "").rpartition("/")[2])


def _int(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
