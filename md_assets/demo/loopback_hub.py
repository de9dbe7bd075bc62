"""A Hub on this machine: serves a directory to the real huggingface_hub client, over the Hub's own protocol.

Here: starting and stopping it, for the embedded demo and for tests. Not here: the protocol
(`demo.loopback_protocol`), the repositories (`demo.loopback_tree`), the list of faults
(`demo.loopback_faults`), the miniature sources themselves. It binds to the loopback interface only.

    python -m md_assets.demo.loopback_hub --root DIR --port 8765    # then HF_ENDPOINT=http://127.0.0.1:8765
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import threading
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from md_assets.core.errors import SettingsError
from md_assets.demo.loopback_faults import Faults
from md_assets.demo.loopback_protocol import HubServer, Request
from md_assets.demo.loopback_tree import Repositories

TREE_PAGE_ENTRIES = 1000
"""Entries on one page of a tree; the Hub's own number."""

HISTORY_REQUESTS = 10_000
"""How many requests `LoopbackHub.history` remembers."""


class LoopbackHub:
    """The server, running from the start of its `with` block to the end.

    Args:
        root: has `datasets/<organisation>/<name>/…` and `models/<organisation>/<name>/…`; may change while
            served. A changed file gives its repository a new commit.
        port: 0 for any free one.
        gated: repositories whose files need a token that has been granted access.
        tokens: granted repositories by valid token. Empty: any token is valid, with access to everything.
        page_entries: entries on one page of a tree.

    Attributes:
        faults: what shall go wrong from now on.
        history: the latest requests, oldest first.
    """

    def __init__(
        self,
        root: Path | str,
        port: int = 0,
        *,
        gated: Collection[str] = (),
        tokens: Mapping[str, Collection[str]] | None = None,
        page_entries: int = TREE_PAGE_ENTRIES,
    ) -> None:
        self.repositories = Repositories(Path(root))
        self.gated = frozenset(gated)
        self.tokens = dict(tokens or {})
        self.page_entries = page_entries
        self.faults = Faults()
        self.history: deque[Request] = deque(maxlen=HISTORY_REQUESTS)
        self.signing_key = secrets.token_hex(16)
        self.stopping = threading.Event()
        self._port = port
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server: HubServer | None = None

    def __enter__(self) -> LoopbackHub:
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
            self._server = HubServer(self, self._port)
        except OSError as error:
            what = f"the loopback Hub cannot listen on 127.0.0.1:{self._port}: {error.strerror}"
            raise SettingsError(what, "Choose another port, or 0 for any free one") from error
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(0.05,), name="loopback-hub", daemon=True).start()

    def stop(self) -> None:
        """Closes the port and all connections; answers under way are cut."""
        if self._server is not None:
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def endpoint(self) -> str:
        """What `HF_ENDPOINT` must be, while it runs."""
        if self._server is None:
            raise RuntimeError("the loopback Hub is not running")
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> Counter[str]:
        """How many requests came so far, by `Request.kind`."""
        with self._lock:
            return Counter(self._counts)

    def record(self, request: Request) -> None:
        """Counts a request; called by the server."""
        with self._lock:
            self._counts[request.kind] += 1
            self.history.append(request)

    def signature(self, path: str) -> str:
        """What signs a link to the storage; not a secret worth keeping, but one that must not be shown."""
        return hashlib.sha256(f"{self.signing_key}{path}".encode()).hexdigest()[:32]


def main(arguments: Iterable[str] | None = None) -> int:
    """`python -m md_assets.demo.loopback_hub`: serves until interrupted."""
    parser = argparse.ArgumentParser(prog="md_assets.demo.loopback_hub", description="A Hub on this machine.")
    parser.add_argument("--root", type=Path, required=True, help="directory with datasets/ and models/")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes any free one")
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME", help="may be repeated")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if not options.root.is_dir():
        parser.error(f"--root: there is no directory {options.root}")
    with LoopbackHub(options.root, options.port, gated=options.gated) as hub:
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
