"""A Hub on this machine: serves a directory to the real huggingface_hub client, over the Hub's own protocol.

Here: what it serves and to whom, for the embedded demo and for tests. Not here: the protocol
(`demo.loopback_protocol`), the server (`demo.loopback_http`), the repositories (`demo.loopback_tree`), the list of
faults (`demo.loopback_faults`), the miniature sources themselves. It binds to the loopback interface only.

    python -m md_assets.demo.loopback_hub --root DIR --port 8765    # then HF_ENDPOINT=http://127.0.0.1:8765
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from md_assets.demo.loopback_http import Loopback
from md_assets.demo.loopback_protocol import HubHandler
from md_assets.demo.loopback_tree import Repositories

TREE_PAGE_ENTRIES = 1000
"""Entries on one page of a tree; the Hub's own number."""


class LoopbackHub(Loopback):
    """The server, running from the start of its `with` block to the end.

    Args:
        root: has `datasets/<organisation>/<name>/…` and `models/<organisation>/<name>/…`; may change while
            served. A changed file gives its repository a new commit.
        port: 0 for any free one.
        gated: repositories whose files need a token that has been granted access.
        tokens: granted repositories by valid token. Empty: any token is valid, with access to everything.
        page_entries: entries on one page of a tree.
    """

    handler = HubHandler
    what = "the loopback Hub"

    def __init__(
        self,
        root: Path | str,
        port: int = 0,
        *,
        gated: Collection[str] = (),
        tokens: Mapping[str, Collection[str]] | None = None,
        page_entries: int = TREE_PAGE_ENTRIES,
    ) -> None:
        super().__init__(port)
        self.repositories = Repositories(Path(root))
        self.gated = frozenset(gated)
        self.tokens = dict(tokens or {})
        self.page_entries = page_entries

    @property
    def endpoint(self) -> str:
        """What `HF_ENDPOINT` must be, while it runs."""
        return self.address


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
