"""Repetition: what is repeated, how long it waits, when it gives up."""

from __future__ import annotations

import pytest
from requests.structures import CaseInsensitiveDict

from md_assets.core.errors import SourceError
from md_assets.storage.retry import TransferPolicy, asked_wait_s, retrying, server_says, status_error

POLICY = TransferPolicy(attempts=4, first_delay_s=1.0, max_delay_s=3.0)


class Source:
    """Fails with the given errors one after the other, then succeeds; makes some progress at each."""

    def __init__(self, *errors: SourceError, progress_bytes: int = 0) -> None:
        self.errors = list(errors)
        self.progress_bytes = progress_bytes
        self.done_bytes = 0
        self.attempts = 0

    def attempt(self) -> str:
        self.attempts += 1
        self.done_bytes += self.progress_bytes
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def failure(transient: bool = True, retry_after_s: float | None = None) -> SourceError:
    return SourceError("it failed", "Wait", reason="server_error", transient=transient, retry_after_s=retry_after_s)


def test_repeats_transient_errors_with_doubled_and_bounded_delays() -> None:
    source, slept_s = Source(failure(), failure(), failure()), list[float]()
    assert retrying(source.attempt, POLICY, sleep=slept_s.append) == "done"
    assert source.attempts == 4
    for delay_s, full_s in zip(slept_s, (1.0, 2.0, 3.0), strict=True):
        assert full_s / 2 <= delay_s <= full_s


def test_gives_up_after_the_policys_attempts_and_says_how_many() -> None:
    source = Source(*[failure() for _ in range(9)])
    with pytest.raises(SourceError, match=r"it failed \(4 attempts\)\. Wait") as caught:
        retrying(source.attempt, POLICY, sleep=lambda _: None)
    assert source.attempts == 4
    assert caught.value.transient and caught.value.reason == "server_error"


def test_does_not_repeat_what_waiting_cannot_help() -> None:
    source = Source(failure(transient=False))
    with pytest.raises(SourceError):
        retrying(source.attempt, POLICY, sleep=lambda _: pytest.fail("it waited"))
    assert source.attempts == 1


def test_progress_starts_the_count_anew_up_to_the_overall_bound() -> None:
    policy = TransferPolicy(attempts=2, attempts_in_all=7, first_delay_s=0)
    source = Source(*[failure() for _ in range(6)], progress_bytes=10)
    assert retrying(source.attempt, policy, sleep=lambda _: None, progress=lambda: source.done_bytes) == "done"
    source = Source(*[failure() for _ in range(7)], progress_bytes=10)
    with pytest.raises(SourceError, match=r"7 attempts"):
        retrying(source.attempt, policy, sleep=lambda _: None, progress=lambda: source.done_bytes)


def test_waits_as_long_as_the_server_asked() -> None:
    slept_s = list[float]()
    retrying(Source(failure(retry_after_s=267)).attempt, POLICY, sleep=slept_s.append)
    assert len(slept_s) == 1 and 267 <= slept_s[0] <= 270


def test_does_not_wait_longer_than_the_policy_allows_but_tells_the_time() -> None:
    source = Source(failure(retry_after_s=3600))
    with pytest.raises(SourceError) as caught:
        retrying(source.attempt, POLICY, sleep=lambda _: pytest.fail("it waited"))
    assert caught.value.retry_after_s == 3600 and caught.value.transient


@pytest.mark.parametrize(
    ("status", "headers", "wait_s"),
    [
        (429, {}, None),
        (503, {"Retry-After": "7"}, 7),
        (503, {"retry-after": "-3"}, 0),
        (503, {"Retry-After": "soon"}, None),
        (503, {"Retry-After": "inf"}, None),
        (503, {"Retry-After": "Thu, 01 Jan 1970 00:02:00 GMT"}, 20),
        (429, {"RateLimit": '"resolvers";r=0;t=267'}, 267),
        (429, {"RateLimit": '"api";r=5;t=290, "resolvers"; r=0; t=12'}, 12),
        (429, {"RateLimit": '"resolvers";r=0;t=5', "Retry-After": "9"}, 9),
        (503, {"RateLimit": '"resolvers";r=0;t=267'}, None),
        (429, {"RateLimit": "nonsense"}, None),
    ],
)
def test_what_headers_ask_for(status: int, headers: dict[str, str], wait_s: float | None) -> None:
    assert asked_wait_s(status, CaseInsensitiveDict(headers), now_s=100.0) == wait_s


@pytest.mark.parametrize(
    ("status", "reason", "transient"),
    [
        (401, "unauthorized", False),
        (403, "unauthorized", False),
        (404, "not_found", False),
        (410, "not_found", False),
        (400, "server_error", False),
        (408, "server_error", True),
        (429, "rate_limited", True),
        (500, "server_error", True),
        (504, "server_error", True),
    ],
)
def test_every_status_has_a_reason(status: int, reason: str, transient: bool) -> None:
    error = status_error("a.tar", status, {})
    assert (error.reason, error.transient) == (reason, transient)
    assert "a.tar" in str(error) and str(status) in str(error) and error.remedy


def test_what_the_server_says_is_shown_without_secrets() -> None:
    text = server_says({"X-Error-Message": "no\nhf_abc at https://x.org/f?Signature=1 today"}, ("hf_abc",))
    assert text == ': "no *** at https://x.org/f today"'


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"stall_timeout_s": 0}, {"first_delay_s": -1}])
def test_policy_refuses_impossible_values(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        TransferPolicy(**wrong)  # type: ignore[arg-type]
