"""When a failed request to a source is repeated, how long to wait before, and when to give up.

Here: the policy (time-outs, numbers of attempts, delays), what a server's headers ask for, and the one loop
that listings and downloads share. Not here: requests themselves, see `storage.http` and `storage.hub`.
"""

from __future__ import annotations

import logging
import math
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

from md_assets.core.errors import SourceError, one_line

T = TypeVar("T")

_log = logging.getLogger(__name__)

SERVER_BUSY = frozenset({408, 425, 429})
"""Answers below 500 that mean "later": RFC 9110 §15.5.9, RFC 8470 §5.2, RFC 6585 §4."""


@dataclass(frozen=True)
class TransferPolicy:
    """How patient a transfer is. All times in seconds.

    Attributes:
        connect_timeout_s: for opening a connection, > 0. 10 s is what huggingface_hub uses for metadata
            (`HF_HUB_ETAG_TIMEOUT`).
        stall_timeout_s: a transfer in which no byte arrives for so long is cut and resumed, > 0. It says
            nothing about the whole transfer, which may take hours. 30 s is well above the pauses between
            two storage hops and well below what a person would wait.
        listing_timeout_s: for the answer to a listing, > 0. A listing of 16,000 files (DiffusionDB) is
            computed by the server before its first byte comes, so this is longer than a stall.
        attempts: consecutive attempts without progress before giving up, ≥ 1. 6 attempts with the delays
            below bridge about half a minute, longer where the server says how long to wait.
        attempts_in_all: attempts of one file even when each makes some progress, ≥ `attempts`. 200 lets an
            11 GB SA-1B tar pass a proxy that cuts every 64 MB.
        first_delay_s: wait before the second attempt, ≥ 0; doubled each time, then shortened at random by
            up to a half, so that many processes do not come back together.
        max_delay_s: upper bound of that doubling. 300 s is the Hub's rate-limit window.
        max_asked_wait_s: a server that asks to wait longer than this is not waited for; the error carries
            the time instead, so that an orchestrator can come back. Twice the Hub's window.
    """

    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    listing_timeout_s: float = 120.0
    attempts: int = 6
    attempts_in_all: int = 200
    first_delay_s: float = 1.0
    max_delay_s: float = 300.0
    max_asked_wait_s: float = 600.0

    def __post_init__(self) -> None:
        if min(self.connect_timeout_s, self.stall_timeout_s, self.listing_timeout_s) <= 0:
            raise ValueError("time-outs must be above 0 s")
        if not 1 <= self.attempts <= self.attempts_in_all:
            raise ValueError("attempts must be at least 1 and at most attempts_in_all")
        if min(self.first_delay_s, self.max_delay_s, self.max_asked_wait_s) < 0:
            raise ValueError("delays must not be negative")


def retrying(
    attempt: Callable[[], T],
    policy: TransferPolicy,
    *,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """`attempt()`, repeated while it raises a transient `SourceError`.

    Args:
        attempt: one try; must be repeatable. Only its `SourceError`s are looked at.
        policy: numbers of attempts and delays.
        sleep: waits so many seconds; replaced in tests.
        progress: bytes done so far. When a failed attempt got further than any before it, the count of
            attempts starts anew, up to `policy.attempts_in_all`.

    Raises:
        SourceError: the last one; a transient one names the number of attempts made.
    """
    in_vain, in_all, furthest = 0, 0, progress()
    while True:
        try:
            return attempt()
        except SourceError as error:
            if not error.transient:
                raise
            failure = error
        in_all += 1
        in_vain = 1 if progress() > furthest else in_vain + 1
        furthest = max(furthest, progress())
        asked_s = failure.retry_after_s
        too_long = asked_s is not None and asked_s > policy.max_asked_wait_s
        if in_vain >= policy.attempts or in_all >= policy.attempts_in_all or too_long:
            raise SourceError(
                f"{failure.what} ({in_all} attempt{'s' if in_all > 1 else ''})",
                failure.remedy,
                reason=failure.reason,
                transient=True,
                retry_after_s=asked_s,
            )
        delay_s = _delay_s(in_vain, asked_s, policy)
        _log.warning("%s; trying again in %.1f s (attempt %d)", failure.what, delay_s, in_all + 1)
        sleep(delay_s)


def _delay_s(failures: int, asked_s: float | None, policy: TransferPolicy) -> float:
    """The wait after so many failures in a row: never less than the server asked for."""
    own_s = min(policy.first_delay_s * 2.0 ** min(failures - 1, 60), policy.max_delay_s)
    if asked_s:
        return asked_s + min(own_s, 0.1 * asked_s) * random.random()
    return own_s * random.uniform(0.5, 1.0)


def asked_wait_s(status: int, headers: Mapping[str, str], now_s: float | None = None) -> float | None:
    """How long an answer asks to wait, in seconds ≥ 0, or None.

    Reads `Retry-After` (seconds or HTTP date, RFC 9110 §10.2.3) and, on a 429, `RateLimit` in the form of
    draft-ietf-httpapi-ratelimit-headers, which the Hub sends: `"resolvers";r=0;t=267` means that nothing
    remains of the quota and that it is refilled in 267 s. With both, the longer one counts.

    Args:
        status: the answer's status.
        headers: the answer's headers, case-insensitive like those of requests.
        now_s: Unix time that dates are relative to; the clock's by default.
    """
    waits_s = []
    if retry_after := headers.get("Retry-After", "").strip():
        try:
            waits_s.append(float(retry_after))
        except ValueError:
            try:
                due_s = parsedate_to_datetime(retry_after).timestamp()
            except (TypeError, ValueError):
                pass  # neither form: as if it were not there
            else:
                waits_s.append(due_s - (time.time() if now_s is None else now_s))
    if status == 429:
        listed = headers.get("RateLimit", "").split(",")
        quotas = [dict(re.findall(r";\s*([rt])\s*=\s*(\d+)", quota)) for quota in listed]
        waits_s += [float(q["t"]) for q in quotas if "t" in q and int(q.get("r", "0")) == 0]
    waits_s = [wait_s for wait_s in waits_s if math.isfinite(wait_s)]
    return max(0.0, *waits_s) if waits_s else None


def status_error(name: str, status: int, headers: Mapping[str, str], *, secrets: tuple[str, ...] = ()) -> SourceError:
    """The `SourceError` for an answer with an error status, whatever server gave it.

    Args:
        name: what was asked for, without secrets.
        status, headers: the answer's.
        secrets: texts that must not be shown even if the server repeats them.
    """
    said = server_says(headers, secrets)
    if status == 429:
        return SourceError(
            f"{name}: the server's rate limit is reached (HTTP 429)",
            "Try again later, or with fewer archives at a time",
            reason="rate_limited",
            transient=True,
            retry_after_s=asked_wait_s(status, headers),
        )
    if status >= 500 or status in SERVER_BUSY:
        return SourceError(
            f"{name}: the server failed with HTTP {status}{said}",
            "Try again later; nothing is wrong on this side",
            reason="server_error",
            transient=True,
            retry_after_s=asked_wait_s(status, headers),
        )
    if status in (404, 410):
        return SourceError(
            f"{name}: not found at the source (HTTP {status}){said}",
            "Check its name, and whether the source has moved",
            reason="not_found",
            transient=False,
        )
    if status in (401, 403):
        return SourceError(
            f"{name}: access refused (HTTP {status}){said}",
            "Check the credentials; a signed link may have expired and must then be renewed",
            reason="unauthorized",
            transient=False,
        )
    return SourceError(
        f"{name}: the server refused with HTTP {status}{said}",
        "Check the address",
        reason="server_error",
        transient=False,
    )


def server_says(headers: Mapping[str, str], secrets: tuple[str, ...] = ()) -> str:
    """The Hub's `X-Error-Message` as `: "…"`, at most 200 characters, or an empty string."""
    text = one_line(headers.get("X-Error-Message", ""))
    for secret in secrets:
        text = text.replace(secret, "***") if secret else text
    # A message may quote the address, signature and all.
    text = re.sub(r"\?\S*=\S*", "", text)
    return f': "{text[:200]}"' if text else ""
