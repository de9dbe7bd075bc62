"""HTTP/1.1 on this machine: a server that can be made to misbehave, and remembers what it was asked.

Here: starting and stopping, connections, ranges, carrying out faults. Not here: which paths there are, see
`demo.loopback_hub` and `demo.loopback_web`; the list of faults (`demo.loopback_faults`).
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import socket
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar, cast

from md_assets.core.errors import SettingsError
from md_assets.demo.loopback_faults import Fault, Faults

CHUNK_BYTES = 256 * 1024
"""Sent at a time."""

HISTORY_REQUESTS = 10_000
"""How many requests `Loopback.history` remembers."""

_FLIPPED = bytes(255 - byte for byte in range(256))

Self = TypeVar("Self", bound="Loopback")


@dataclass(frozen=True)
class Request:
    """A request that came.

    Attributes:
        kind: what it asked for, in the server's own words.
        name: of what it asked for.
        range_header: its `Range`, or empty.
        with_token: whether it carried a token.
    """

    kind: str
    name: str
    range_header: str
    with_token: bool


class Loopback:
    """A server on 127.0.0.1, running from the start of its `with` block to the end.

    Args:
        port: 0 for any free one.

    Attributes:
        faults: what shall go wrong from now on.
        history: the latest requests, oldest first.
        stopping: set when it ends.
    """

    handler: ClassVar[type[Handler]]
    what: ClassVar[str]
    """What messages call it."""

    def __init__(self, port: int = 0) -> None:
        self.faults = Faults()
        self.history: deque[Request] = deque(maxlen=HISTORY_REQUESTS)
        self.stopping = threading.Event()
        self._signing_key = secrets.token_hex(16)
        self._port = port
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def __enter__(self: Self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens and answers in threads of its own.

        Raises:
            SettingsError: the port is taken.
        """
        self.stopping.clear()
        try:
            self._server = _Server(self, self._port)
        except OSError as error:
            what = f"{self.what} cannot listen on 127.0.0.1:{self._port}: {error.strerror}"
            raise SettingsError(what, "Choose another port, or 0 for any free one") from error
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.05,), name=self.what, daemon=True).start()

    def stop(self) -> None:
        """Closes the port and all connections; answers under way are cut."""
        if self._server is not None:
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def address(self) -> str:
        """`http://127.0.0.1:PORT`, while it runs."""
        if self._server is None:
            raise RuntimeError(f"{self.what} is not running")
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> Counter[str]:
        """How many requests came so far, by `Request.kind`."""
        with self._lock:
            return Counter(self._counts)

    def signature(self, link: str) -> str:
        """What signs a link of this server; not a secret worth keeping, but one that must not be shown."""
        return hashlib.sha256(f"{self._signing_key}{link}".encode()).hexdigest()[:32]

    def record(self, request: Request) -> None:
        """Counts a request; called by its handler."""
        with self._lock:
            self._counts[request.kind] += 1
            self.history.append(request)


class _Server(ThreadingHTTPServer):
    """One thread for each connection."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, loopback: Loopback, port: int) -> None:
        self.loopback = loopback
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), loopback.handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for connection in list(self._open):  # kept alive by clients, whose threads would answer on
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are none of our concern."""


class Handler(BaseHTTPRequestHandler):
    """Answers requests to a `Loopback`; subclasses say in `_route` what to."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small answers over a kept connection would wait 40 ms each
    server_version = "md-assets-loopback"

    @property
    def loopback(self) -> Loopback:
        return cast(_Server, self.server).loopback

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: see `Loopback.history`."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        try:
            self._route()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self) -> None:
        raise NotImplementedError

    def _record(self, kind: str, name: str) -> None:
        with_token = "Authorization" in self.headers
        self.loopback.record(Request(kind, name, self.headers.get("Range", ""), with_token))

    # Answers

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._answer(status, json.dumps(value).encode(), headers)

    def _fails(self, fault: Fault | None) -> bool:
        """Answers for a fault that replaces the whole answer."""
        if fault is not None and fault.stall_s and not fault.after_bytes:
            self.loopback.stopping.wait(fault.stall_s)
        if fault is not None and fault.status is not None:
            self._json({"error": f"fault {fault.status}"}, fault.headers, fault.status)
        elif fault is not None and fault.html:
            page = b"<!doctype html><title>Log in</title>"
            self._answer(200, page, {"Content-Type": "text/html; charset=utf-8"})
        else:
            return False
        return True

    def _file(self, path: Path, headers: Mapping[str, str], name: str) -> None:
        """The bytes of a file, or the part of them that is asked for.

        Args:
            path: on this machine; it exists.
            headers: besides those that tell size, range and type.
            name: what faults call it.
        """
        fault = Fault(name) if self.command == "HEAD" else self.loopback.faults.take("body", name) or Fault(name)
        if self._fails(fault):
            return
        size_bytes = path.stat().st_size
        part = _range(self.headers.get("Range", ""), size_bytes) if not fault.ignore_range else None
        if part is not None and fault.wrong_range:
            part = (0, size_bytes)
        start, stop = part or (0, size_bytes)
        if start >= stop and part is not None:
            self._answer(416, b"", {**headers, "Content-Range": f"bytes */{size_bytes}"})
            return
        with path.open("rb") as file:
            self.send_response(200 if part is None else 206)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(stop - start))
            if part is not None:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size_bytes}")
            self.end_headers()
            if self.command != "HEAD":
                file.seek(start)
                self._send(file, stop - start, fault)

    def _send(self, file: BinaryIO, count_bytes: int, fault: Fault) -> None:
        sent_bytes = 0
        step_bytes = CHUNK_BYTES
        if fault.bytes_per_s is not None:
            step_bytes = max(1, min(CHUNK_BYTES, int(fault.bytes_per_s / 50)))
        if fault.cut and not fault.after_bytes:
            count_bytes, self.close_connection = 0, True
        while sent_bytes < count_bytes and not self.loopback.stopping.is_set():
            until = fault.after_bytes if sent_bytes < fault.after_bytes else count_bytes
            chunk = file.read(min(step_bytes, until - sent_bytes, count_bytes - sent_bytes))
            if not chunk:
                break  # the file has become shorter; the client sees a cut
            self.wfile.write(chunk.translate(_FLIPPED) if fault.corrupt else chunk)
            sent_bytes += len(chunk)
            if fault.bytes_per_s is not None:
                self.loopback.stopping.wait(len(chunk) / fault.bytes_per_s)
            if sent_bytes == fault.after_bytes and fault.after_bytes:
                if fault.cut:
                    break
                self.loopback.stopping.wait(fault.stall_s)
        if sent_bytes < count_bytes:
            self.close_connection = True


def _range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """First and last-but-one position of a single range, None for a header that means the whole file."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return max(0, size_bytes - int(match[2])), size_bytes
    return int(match[1]), min(size_bytes, int(match[2]) + 1 if match[2] else size_bytes)
