"""Errors that users read. Each is one sentence that names what failed and ends with the remedy.

Here: the exception classes only. Not here: reasons for which one *sample* is rejected; these are data,
see `core.ledger.Reason`.
"""

from __future__ import annotations

from typing import Any


class MdAssetsError(Exception):
    """Base of every error that md_assets raises on purpose; its text is meant for the user.

    Args:
        what: what happened, naming dataset, archive and member as far as they are known.
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = one_line(what)
        self.remedy = one_line(remedy)
        super().__init__(f"{self.what}. {self.remedy}" if self.remedy else self.what)

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors come back from worker processes; pickle would call __init__ with the finished text.
        return _restored, (type(self), self.args, self.__dict__)


class ArchiveError(MdAssetsError):
    """One archive failed; nothing of it was published and what was published before is untouched.

    Args:
        dataset, archive: which one, as in its partition key.
        what, remedy: see `MdAssetsError`.
        reason: a short stable word for tables and retries, like `truncated` or `not_found`.
        transient: whether the same attempt may succeed later without anybody's action.
    """

    def __init__(
        self, dataset: str, archive: str, what: str, remedy: str = "", *, reason: str, transient: bool = False
    ) -> None:
        self.dataset = dataset
        self.archive = archive
        self.reason = reason
        self.transient = transient
        super().__init__(f"{dataset} {archive}: {what}", remedy)


class SourceError(MdAssetsError):
    """A remote file could not be listed or fetched.

    Args:
        what, remedy: see `MdAssetsError`.
        reason: `gated`, `unauthorized`, `not_found`, `rate_limited`, `server_error`, `timeout`,
            `connection`, `size_mismatch`, `checksum_mismatch`, `link_expired`, `disk_full` or `busy`.
        transient: whether waiting may help (429, 5xx, time-outs, cut connections).
        retry_after_s: how long the server asked to wait, in seconds, where it said so.
    """

    def __init__(
        self, what: str, remedy: str = "", *, reason: str, transient: bool, retry_after_s: float | None = None
    ) -> None:
        self.reason = reason
        self.transient = transient
        self.retry_after_s = retry_after_s
        super().__init__(what, remedy)


class CorruptArchiveError(MdAssetsError):
    """An archive's container is broken (cut off, wrong format, HTML page); no sample of it can be trusted.

    Args:
        what, remedy: see `MdAssetsError`.
        reason: `truncated`, `corrupt` or `not_an_archive`.
    """

    def __init__(self, what: str, remedy: str = "", *, reason: str) -> None:
        self.reason = reason
        super().__init__(what, remedy)


class DamagedError(MdAssetsError):
    """Files that a stage has published are not what their ledger or index says."""


class SettingsError(MdAssetsError):
    """A setting, environment variable or command-line value is wrong."""


def _restored(kind: type[MdAssetsError], args: tuple[Any, ...], attributes: dict[str, Any]) -> MdAssetsError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


def one_line(text: str) -> str:
    """`text` on a single line without trailing period, control characters made visible.

    Member names come from archives that nobody checked; they must not break a log line.
    """
    flat = " ".join(text.split()).rstrip(". ")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in flat)
