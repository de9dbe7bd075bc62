"""What the loopback Hub answers: the Hub's paths, headers and error codes.

Here: requests and answers. Not here: starting it (`demo.loopback_hub`), sending files and carrying out faults
(`demo.loopback_http`), what the repositories hold (`demo.loopback_tree`).

Paths, headers and codes are those that huggingface_hub 0.36 reads: `hf_api.py`, `file_download.py`,
`utils/_http.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

from md_assets.demo.loopback_http import Handler
from md_assets.demo.loopback_tree import Entry, RepoKind, Tree

if TYPE_CHECKING:
    from md_assets.demo.loopback_hub import LoopbackHub

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = re.compile(rf"/api/(?P<kind>datasets|models)/{_REPO}(?:/(?P<verb>revision|tree)/(?P<rev>[^/]+)/?(?P<path>.*))?")
_RESOLVE = re.compile(rf"/(?:(?P<kind>datasets)/)?{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
_CDN = re.compile(rf"/cdn/(?P<kind>datasets|models)/{_REPO}/(?P<sha>[0-9a-f]{{64}})/(?P<path>.+)")


class HubHandler(Handler):
    """Answers for a `LoopbackHub`."""

    @property
    def hub(self) -> LoopbackHub:
        return cast("LoopbackHub", self.loopback)

    def _route(self) -> None:
        """Finds out what is asked for. Kinds in the history: `listing`, `tree`, `head` (of a file), `resolve`, `cdn`
        (the bytes of an LFS file), `whoami` and `other`; names are `organisation/name/path` as far as there are any."""
        url = urlsplit(self.path)
        if match := _API.fullmatch(url.path):
            self._repository(match, parse_qs(url.query))
        elif match := _RESOLVE.fullmatch(url.path):
            self._resolve(match)
        elif match := _CDN.fullmatch(url.path):
            self._cdn(match, url.path, parse_qs(url.query))
        elif url.path == "/api/whoami-v2":
            self._whoami()
        else:
            self._record("other", url.path)
            self._error(404, "", "Not found")

    # What is asked for

    def _repository(self, match: re.Match[str], query: Mapping[str, list[str]]) -> None:
        kind, repo = cast(RepoKind, match["kind"]), unquote(match["repo"])
        self._record("tree" if match["verb"] == "tree" else "listing", repo)
        if self._fails(self.hub.faults.take("listing", repo)) or not self._may_see(kind, repo):
            return
        revision = unquote(match["rev"] or "main")
        tree = self.hub.repositories.at(kind, repo, revision)
        if tree is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif match["verb"] == "tree":
            self._tree(tree, unquote(match["path"]).strip("/"), query)
        else:
            blobs = query.get("blobs", ["false"])[0].lower() == "true"
            gated = "manual" if repo in self.hub.gated else False
            self._json(
                {
                    "_id": tree.commit[:24],
                    "id": repo,
                    "author": repo.partition("/")[0],
                    "sha": tree.commit,
                    "private": False,
                    "gated": gated,
                    "disabled": False,
                    "downloads": 0,
                    "likes": 0,
                    "tags": [],
                    # Not the files' own times: the same content must give the same answer.
                    "createdAt": "2024-01-01T00:00:00.000Z",
                    "lastModified": "2024-01-01T00:00:00.000Z",
                    "siblings": [_sibling(entry, blobs) for entry in tree.entries.values()],
                }
            )

    def _tree(self, tree: Tree, folder: str, query: Mapping[str, list[str]]) -> None:
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        rows = list(_tree_rows(tree, folder, recursive))
        if not rows and folder:
            self._error(404, "EntryNotFound", f"{folder} does not exist on this revision")
            return
        start = int(query.get("cursor", ["0"])[0])
        stop = start + min(int(query.get("limit", ["1000000"])[0]), self.hub.page_entries)
        headers = {}
        if stop < len(rows):
            others = "".join(f"&{key}={quote(value[0])}" for key, value in query.items() if key != "cursor")
            page = f"{self.hub.endpoint}{urlsplit(self.path).path}?cursor={stop}{others}"
            headers["Link"] = f'<{page}>; rel="next"'
        self._json(rows[start:stop], headers)

    def _resolve(self, match: re.Match[str]) -> None:
        kind: RepoKind = "datasets" if match["kind"] else "models"
        repo, revision, path = unquote(match["repo"]), unquote(match["rev"]), unquote(match["path"])
        self._record("head" if self.command == "HEAD" else "resolve", f"{repo}/{path}")
        if self._fails(self.hub.faults.take("resolve", f"{repo}/{path}")) or not self._may_see(kind, repo):
            return
        token = self._token()
        granted = token is not None and (not self.hub.tokens or repo in self.hub.tokens[token])
        if repo in self.hub.gated and not granted:
            text = f"Access to {kind[:-1]} {repo} is restricted and you are not in the authorized list"
            self._error(401 if token is None else 403, "GatedRepo", text)
            return
        found = self.hub.repositories.resolve(kind, repo, revision, path)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        commit, entry = found
        if entry is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry.blob_id}"', "Accept-Ranges": "bytes"}
        if entry.sha256 is None:
            self._file(entry.file, headers, f"{repo}/{path}")
            return
        location = quote(f"/cdn/{kind}/{repo}/{entry.sha256}/{path}")
        query = f"Expires=4102444800&Signature={self.hub.signature(location)}"
        headers["Location"] = f"{self.hub.endpoint}{location}?{query}"
        headers["X-Linked-Size"] = str(entry.size_bytes)
        headers["X-Linked-ETag"] = f'"{entry.sha256}"'
        self._answer(302, b"", headers)

    def _cdn(self, match: re.Match[str], signed: str, query: Mapping[str, list[str]]) -> None:
        kind, repo, path = cast(RepoKind, match["kind"]), unquote(match["repo"]), unquote(match["path"])
        self._record("cdn", f"{repo}/{path}")
        entry = self.hub.repositories.blob(kind, repo, path, match["sha"])
        xml = {"Content-Type": "application/xml"}
        if query.get("Signature") != [self.hub.signature(signed)]:
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>", xml)
        elif entry is None:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>", xml)
        else:
            self._file(entry.file, {"ETag": f'"{match["sha"]}"', "Accept-Ranges": "bytes"}, f"{repo}/{path}")

    def _whoami(self) -> None:
        self._record("whoami", "")
        if self._token() is None:
            self._error(401, "", "Invalid username or password.")
        else:
            self._json({"type": "user", "id": "0", "name": "loopback", "fullname": "Loopback", "orgs": []})

    # Who asks

    def _token(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        valid = scheme == "Bearer" and token and (not self.hub.tokens or token in self.hub.tokens)
        return token if valid else None

    def _may_see(self, kind: RepoKind, repo: str) -> bool:
        """Whether the repository exists for the one who asks; has answered if not."""
        if self.headers.get("Authorization") and self._token() is None:
            self._error(401, "", "Invalid credentials in Authorization header")
            return False
        if not self.hub.repositories.exists(kind, repo):
            # To those without a token the Hub does not tell whether it is missing or private.
            self._error(404 if self._token() else 401, "RepoNotFound", "Repository not found")
            return False
        return True

    def _error(self, status: int, code: str, text: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": text}
        self._json({"error": text}, {key: value for key, value in headers.items() if value}, status)


def _sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        size = entry.size_bytes
        row |= {"size": size, "blobId": entry.blob_id}
        if entry.sha256 is not None:
            row["lfs"] = {"sha256": entry.sha256, "size": size, "pointerSize": entry.pointer_bytes}
    return row


def _tree_rows(tree: Tree, folder: str, recursive: bool) -> Iterator[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    told: set[str] = set()
    for path, entry in tree.entries.items():
        if not path.startswith(prefix):
            continue
        *parents, _ = path[len(prefix) :].split("/")
        for depth in range(1, (len(parents) if recursive else min(1, len(parents))) + 1):
            directory = prefix + "/".join(parents[:depth])
            if directory not in told:
                told.add(directory)
                oid = hashlib.sha1(f"{tree.commit}{directory}".encode(), usedforsecurity=False).hexdigest()
                yield {"type": "directory", "oid": oid, "size": 0, "path": directory}
        if parents and not recursive:
            continue
        size = entry.size_bytes
        row: dict[str, Any] = {"type": "file", "oid": entry.blob_id, "size": size, "path": path}
        if entry.sha256 is not None:
            row["lfs"] = {"oid": entry.sha256, "size": size, "pointerSize": entry.pointer_bytes}
        yield row
