"""The Hugging Face Hub as a source: which files a repository has at which commit, and fetching one of them.

Here: listings, pins, what the Hub's refusals mean. Not here: the transfer itself (`storage.http`), repetition
(`storage.retry`). Files come by plain HTTP, never by xet, whose transfers have been seen to hang without a
time-out; plain HTTP resumes by range.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from md_assets.core.errors import SourceError
from md_assets.core.source import BytesProgress, Checksum, HubFile, RemoteFile
from md_assets.storage.http import connection_error, download, redact_url
from md_assets.storage.part_file import Digest
from md_assets.storage.retry import TransferPolicy, asked_wait_s, retrying, server_says, status_error

if TYPE_CHECKING:
    import requests

RepoType = Literal["dataset", "model"]

DEFAULT_ENDPOINT = "https://huggingface.co"
"""huggingface_hub's own default, see its `constants.py`."""

TRUNCATED_FROM_FILES = 50_000
"""From so many files on the Hub may leave some out of a repository's description; its tree has them all.
Same number as `VERY_LARGE_REPO_THRESHOLD` of huggingface_hub's `_snapshot_download.py`."""

CANDIDATES_NAMED = 5
"""Files that the error of a path with `*` names."""

TOKEN_REMEDY = "set HF_TOKEN to a token of that account (https://huggingface.co/settings/tokens) or run `hf auth login`"


@dataclass(frozen=True)
class Listing:
    """All files of a repository at one commit.

    Attributes:
        repo, repo_type: which repository.
        revision: the commit, 40 hexadecimal digits.
        files: by path inside the repository, in the Hub's order.
    """

    repo: str
    repo_type: RepoType
    revision: str
    files: Mapping[str, RemoteFile] = field(repr=False)

    def matching(self, pattern: str) -> list[str]:
        """The paths that `pattern` stands for; its `*` means any characters, `/` too."""
        pieces = pattern.split("*")
        rarest = max(pieces, key=len)  # searching for it first makes a thousand patterns a matter of a second
        whole = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        return [path for path in self.files if rarest in path and whole.fullmatch(path)]

    def like(self, pattern: str) -> list[str]:
        """Some paths that may have been meant by a `pattern` that none matches: same folder, same suffix."""
        folder = pattern.partition("*")[0].rpartition("/")[0]
        suffix = pattern.rpartition("*")[2].rpartition(".")[2]
        alike = (path for path in self.files if path.startswith(folder) and path.endswith(suffix))
        return list(islice(alike, CANDIDATES_NAMED + 1))


class HubClient:
    """Lists and fetches files of the Hub; may be shared by threads. Nothing happens before the first method.

    Args:
        endpoint: the Hub's address. None: `HF_ENDPOINT` at the time of each call, or huggingface.co.
        token: access token. None: `HF_TOKEN` at the time of each call, or the stored login.
        revisions: branch, tag or commit by repository, `main` for those that are not in it.
        policy: time-outs and attempts.
        sleep: waits so many seconds; replaced in tests.

    Attributes:
        policy: the policy in effect.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | None = None,
        revisions: Mapping[str, str] | None = None,
        policy: TransferPolicy | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._token = token
        self._revisions = dict(revisions or {})
        self.policy = policy or TransferPolicy()
        self._sleep = sleep
        self._listings: dict[tuple[str, str, str], Listing] = {}
        self._locks: dict[tuple[str, str, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(endpoint={redact_url(self.endpoint)!r})"

    @property
    def endpoint(self) -> str:
        """The Hub's address in effect, without trailing slash."""
        return (self._endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")

    def listing(self, repo: str, repo_type: RepoType = "dataset", *, refresh: bool = False) -> Listing:
        """All files of `repo` at its pinned revision; one request, remembered for the life of this client.

        Args:
            repo: `organisation/name`.
            repo_type: `dataset` or `model`.
            refresh: ask the Hub even if the answer is remembered.

        Raises:
            SourceError: see `explain`.
        """
        key = (self.endpoint, repo_type, repo)
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:  # so that threads that want the same repository make one request, not one each
            if refresh or key not in self._listings:
                self._listings[key] = retrying(
                    lambda: self._ask_listing(repo, repo_type), self.policy, sleep=self._sleep
                )
            return self._listings[key]

    def revision(self, repo: str, repo_type: RepoType = "dataset", *, refresh: bool = False) -> str:
        """The commit that the pin of `repo` means, from its listing. Raises as `listing` does."""
        return self.listing(repo, repo_type, refresh=refresh).revision

    def locate(self, file: HubFile) -> RemoteFile:
        """The file at its repository's pinned revision.

        Raises:
            SourceError: reason `not_found` if the repository has no such file, or not exactly one that matches a path
                with `*`, else as `listing`.
        """
        listing = self.listing(file.repo, file.repo_type)
        if "*" not in file.path:
            if file.path in listing.files:
                return listing.files[file.path]
            lacks = "no such file"
        else:
            matches = listing.matching(file.path)
            if len(matches) == 1:
                return listing.files[matches[0]]
            found, candidates = len(matches) or "no", matches or listing.like(file.path)
            lacks = f"{found} files that match" + (f" ({_some(candidates)})" if candidates else "")
        raise SourceError(
            f"{file.repo}:{file.path}: the Hub's {file.repo_type} {file.repo} has {lacks} at revision "
            f"{listing.revision}",
            f"See {self._page(file.repo, file.repo_type)}/tree/{listing.revision} for what it has",
            reason="not_found",
            transient=False,
        )

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> RemoteFile:
        """Fetches a file that `locate` or `listing` gave, and returns it; resumes, may be repeated.

        Every file is verified: one in LFS by its sha256, any other by git's own hash, its blob id.

        Raises:
            SourceError: see `explain` and `storage.http.download`.
        """
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

        digest = None
        if remote.checksum is None and remote.size_bytes is not None and _is_sha1(remote.content_id):
            digest = Digest("sha1", remote.content_id, prefix=b"blob %d\0" % remote.size_bytes)
        repo, _, path = remote.name.partition(":")
        repo_type: RepoType = "dataset" if remote.url.startswith(f"{self.endpoint}/datasets/") else "model"
        return download(
            remote,
            destination,
            session=get_session(),
            headers=build_hf_headers(token=self._token),
            policy=self.policy,
            progress=progress,
            digest=digest,
            explain=lambda response: self._refusal(response, repo, repo_type, path, remote.revision),
            sleep=self._sleep,
        ).remote

    def explain(
        self, error: BaseException, repo: str, repo_type: RepoType = "dataset", path: str = ""
    ) -> SourceError | None:
        """What an error of huggingface_hub or requests means for the user; None if it is neither's.

        Reads the status of the answer wherever it is in the chain of causes: a rate limit (429) also comes as
        `LocalEntryNotFoundError`, and must not be taken for a missing file.

        Returns:
            A `SourceError` with reason `gated` (terms not accepted), `unauthorized` (token refused),
            `not_found` (repository, revision or file), `rate_limited`, `server_error`, `timeout` or
            `connection`.
        """
        import requests

        name = f"{repo}:{path}" if path else repo
        chain: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__
        for one in chain:
            response = getattr(one, "response", None)
            status = getattr(response, "status_code", 200)
            if response is not None and status >= 400:
                pin = self._revisions.get(repo, "main")
                refusal = self._refusal(response, repo, repo_type, path, pin)
                return refusal or status_error(name, status, response.headers, secrets=self._secrets())
        for one in chain:
            if type(one).__name__ == "HFValidationError":
                return SourceError(
                    f"{name}: not the name of a repository of the Hub",
                    "Write it as organisation/name",
                    reason="not_found",
                    transient=False,
                )
            if isinstance(one, requests.exceptions.JSONDecodeError):
                return SourceError(
                    f"{name}: {redact_url(self.endpoint)} does not answer like the Hub",
                    "Check HF_ENDPOINT, and whether a proxy or login page is in the way",
                    reason="server_error",
                    transient=True,
                )
        for one in chain:
            if isinstance(one, (requests.RequestException, ConnectionError)):
                return connection_error(name, one)
        return None

    def _ask_listing(self, repo: str, repo_type: RepoType) -> Listing:
        from huggingface_hub import HfApi

        endpoint, pin = self.endpoint, self._revisions.get(repo, "main")
        api = HfApi(endpoint=endpoint, token=self._token)
        failure: SourceError | None = None
        try:
            info = api.repo_info(
                repo,
                repo_type=repo_type,
                revision=pin,
                files_metadata=True,
                timeout=self.policy.listing_timeout_s,
            )
            commit = info.sha or ""
            entries: list[Any] = list(info.siblings or [])
            if len(entries) >= TRUNCATED_FROM_FILES:
                tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=repo_type)
                entries = [entry for entry in tree if hasattr(entry, "blob_id")]
        except (OSError, ValueError) as error:
            failure = self.explain(error, repo, repo_type)
            if failure is None:
                raise
        # Raised out here, so that no traceback shows the Hub client's own error: it quotes addresses.
        if failure is not None:
            raise failure
        files = {entry.rfilename: self._remote(entry, repo, repo_type, commit) for entry in entries}
        return Listing(repo, repo_type, commit, MappingProxyType(files))

    def _remote(self, entry: Any, repo: str, repo_type: RepoType, commit: str) -> RemoteFile:
        from huggingface_hub import hf_hub_url

        lfs, path = entry.lfs, entry.rfilename
        return RemoteFile(
            name=f"{repo}:{path}",
            url=hf_hub_url(repo, path, repo_type=repo_type, revision=commit, endpoint=self.endpoint),
            size_bytes=entry.size if lfs is None else lfs.size,
            checksum=None if lfs is None else Checksum("sha256", lfs.sha256),
            content_id=entry.blob_id if lfs is None else lfs.sha256,
            revision=commit,
        )

    def _page(self, repo: str, repo_type: RepoType) -> str:
        return f"{redact_url(self.endpoint)}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"

    def _secrets(self) -> tuple[str, ...]:
        from huggingface_hub import get_token

        return tuple(filter(None, (self._token, get_token())))

    def _refusal(
        self, response: requests.Response, repo: str, repo_type: RepoType, path: str, revision: str
    ) -> SourceError | None:
        """The Hub's meaning of an error status, None where the general one will do."""
        status, headers = response.status_code, response.headers
        code, message = headers.get("X-Error-Code", ""), headers.get("X-Error-Message", "")
        name, what = (f"{repo}:{path}" if path else repo), f"the Hub's {repo_type} {repo}"
        page, has_token = self._page(repo, repo_type), bool(self._secrets())
        said = server_says(headers, self._secrets())
        if status == 429:
            limit = "Run fewer archives at a time" if has_token else "Set HF_TOKEN, its limit is higher"
            return SourceError(
                f"{name}: the Hub's rate limit is reached (HTTP 429)",
                f"{limit}; what is done stays done",
                reason="rate_limited",
                transient=True,
                retry_after_s=asked_wait_s(status, headers),
            )
        if status == 403 and response.history and not code:
            # Not the Hub but the storage behind it: a signed link ran out. Each attempt gets a new one.
            return SourceError(
                f"{name}: the Hub's storage refused its signed link (HTTP 403)",
                "Check this machine's clock, and try again",
                reason="server_error",
                transient=True,
            )
        in_a_browser = f"Check {page} in a browser"
        # The first that applies counts; waiting helps against none of them.
        meanings = (
            (
                code == "GatedRepo",
                "gated",
                f"{what} is gated and "
                + ("the token's account has not been granted access" if has_token else "no token is set"),
                f"Accept its terms at {page}, then {TOKEN_REMEDY}",
            ),
            (
                status == 401 and code != "RepoNotFound",
                "unauthorized",
                (f"the Hub refuses the token{said}" if has_token else f"{what} needs a token") + " (HTTP 401)",
                f"{in_a_browser}, then {TOKEN_REMEDY}",
            ),
            (
                status == 401 and has_token,
                "unauthorized",
                f"{what} does not exist, or the token does not reach it (HTTP 401)",
                f"{in_a_browser}, then {TOKEN_REMEDY}",
            ),
            (
                message == "Access to this resource is disabled.",
                "not_found",
                f"the Hub has disabled {what}",
                f"See {page}",
            ),
            (
                status == 403,
                "unauthorized",
                f"the Hub forbids access to {what}{said}",
                f"{in_a_browser}, and that the token may read public gated repositories",
            ),
            (
                code == "RevisionNotFound",
                "not_found",
                f"{what} has no revision {revision!r}",
                f"Correct the revision pin of {repo}; see {page}/commits/main",
            ),
            (
                code == "RepoNotFound",
                "not_found",
                f"{what} does not exist" + ("" if has_token else ", or is private and no token is set"),
                in_a_browser,
            ),
            (
                status == 404 and path,
                "not_found",
                f"{what} has no such file at revision {revision}",
                f"See {page}/tree/{revision} for what it has",
            ),
        )
        for applies, reason, meaning, remedy in meanings:
            if applies:
                return SourceError(f"{name}: {meaning}", remedy, reason=reason, transient=False)
        return None


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:CANDIDATES_NAMED]) + (", …" if len(paths) > CANDIDATES_NAMED else "")


def _is_sha1(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", text) is not None
