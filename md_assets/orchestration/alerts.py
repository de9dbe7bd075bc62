"""Alerts: failed runs and failed checks, told to a webhook; one message for each run, never one for each archive.

Off unless `MD_ASSETS_WEBHOOK_URL` is set and the sensors are turned on in the UI. The address is a secret, which is
shown nowhere. A message that the webhook does not take is sent again at the next tick.

Here: what is new, its text, posting it. Not here: why archives failed (`orchestration.failures`).
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import dagster as dg
import requests
from dagster._core.storage.asset_check_execution_record import AssetCheckExecutionRecordStatus
from dagster._core.storage.tags import WILL_RETRY_TAG

from md_assets.core.errors import one_line
from md_assets.core.verdict import AUDITED
from md_assets.orchestration.failures import said_by_run
from md_assets.storage.http import redact_url

WEBHOOK_VARIABLE = "MD_ASSETS_WEBHOOK_URL"

MESSAGES_PER_TICK = 20
"""The others wait for the next tick: Slack takes about one a second of an application."""

ARCHIVES_NAMED = 20
"""Of those that failed in a run, with their reasons; the others are counted."""

MESSAGE_CHARACTERS = 3000
"""Slack shows a text of up to 4,000 characters in one piece."""

REASON_CHARACTERS = 300

FAILED_CHECKS = 500
"""Failed results of one check that a tick looks through."""

SETTLE_S = 5.0
"""Age of a failed check before it is told: those of a run come one after the other and belong together."""

TIMEOUT_S = 10.0
"""For the webhook to answer."""


@dataclass(frozen=True)
class Alert:
    """A message that is due.

    Attributes:
        cursor: of the sensor once it is sent.
        text: with Slack's markup; empty where there is nothing to send.
    """

    cursor: str
    text: str


class WebhookError(Exception):
    """The webhook did not take a message. Its text never has the address."""


@dg.sensor(
    name="alert_failed_runs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=f"Posts each failed run with its failed archives to the webhook of {WEBHOOK_VARIABLE}, as for Slack.",
)
def alert_failed_runs(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """One tick. The cursor is the storage id of the latest failure that was told."""
    return _tick(context, newest_failure, failed_run_alerts)


@dg.sensor(
    name="alert_failed_checks",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=f"Posts failed checks, those of a run together, to the webhook of {WEBHOOK_VARIABLE}, as for Slack.",
)
def alert_failed_checks(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """One tick. The cursor is the time up to which failed checks were told."""
    checks = context.repository_def.asset_graph.asset_check_keys if context.repository_def else ()

    def alerts(instance: dg.DagsterInstance, cursor: str) -> Iterator[Alert]:
        return failed_check_alerts(instance, checks, cursor)

    return _tick(context, lambda instance: str(time.time() - SETTLE_S), alerts)


def _tick(
    context: dg.SensorEvaluationContext,
    start: Callable[[dg.DagsterInstance], str],
    alerts: Callable[[dg.DagsterInstance, str], Iterator[Alert]],
) -> dg.SensorResult:
    """Send what is due, in order, until the webhook refuses one.

    Args:
        start: instance -> the cursor of a fresh sensor; what was before it is not told.
        alerts: (instance, cursor) -> alerts after it, the oldest first.
    """
    url = os.environ.get(WEBHOOK_VARIABLE, "")
    if not url:
        # Without moving the cursor of a sensor that was on before: it goes on where the address was taken away.
        return dg.SensorResult(skip_reason=f"{WEBHOOK_VARIABLE} is not set", cursor=context.cursor)
    cursor = context.cursor or start(context.instance)
    sent = 0
    for alert in alerts(context.instance, cursor):
        try:
            if alert.text:
                post(url, alert.text)
        except WebhookError as error:
            context.log.warning(str(error))
            reason = f"{sent} messages sent; {error}. The next one is sent again at the next tick"
            return dg.SensorResult(skip_reason=reason, cursor=cursor)
        cursor, sent = alert.cursor, sent + bool(alert.text)
        if sent == MESSAGES_PER_TICK:
            break
    return dg.SensorResult(skip_reason=f"{sent} messages sent", cursor=cursor)


def post(url: str, text: str) -> None:
    """Post a message.

    Raises:
        WebhookError: the webhook did not take it.
    """
    if not url.startswith(("https://", "http://")):
        raise WebhookError(f"{WEBHOOK_VARIABLE} is no http address")
    try:
        answer = requests.post(url, json={"text": text}, timeout=TIMEOUT_S, allow_redirects=False)
    except requests.RequestException as error:
        # `from None`: the error and what it wraps quote the address.
        raise WebhookError(f"the webhook does not answer ({type(error).__name__})") from None
    if answer.status_code >= 300:
        raise WebhookError(f"the webhook answered {answer.status_code}")


def newest_failure(instance: dg.DagsterInstance) -> str:
    """The storage id of the latest failure of a run, 0 where none failed."""
    records = instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1).records
    return str(records[0].storage_id if records else 0)


def failed_run_alerts(instance: dg.DagsterInstance, cursor: str) -> Iterator[Alert]:
    """A message for each run that failed after `cursor`, but for those that Dagster starts again by itself."""
    after = dg.RunStatusChangeRecordsFilter(dg.DagsterEventType.RUN_FAILURE, after_storage_id=int(cursor))
    failures = instance.fetch_run_status_changes(after, limit=MESSAGES_PER_TICK * 5, ascending=True)
    for record in failures.records:
        run = instance.get_run_by_id(record.run_id)
        told = run is not None and run.tags.get(WILL_RETRY_TAG) != "true"
        yield Alert(str(record.storage_id), run_text(instance, run) if run is not None and told else "")


def run_text(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """What is told of a failed run."""
    assets = sorted(key.to_user_string() for key in run.asset_selection or ())
    of_run, archives = said_by_run(instance, run)
    of_backfill = f" of backfill {run.tags['dagster/backfill']}" if "dagster/backfill" in run.tags else ""
    title = f"{', '.join(assets) or run.job_name}: run {run.run_id[:8]}{of_backfill} failed"
    if not archives:
        return message(title, [of_run.why])
    # An archive's sentence begins with its dataset and ID.
    return message(f"{title}, {len(archives):,} archives in it", (cause.why for cause in archives.values()))


def failed_check_alerts(
    instance: dg.DagsterInstance, checks: Iterable[dg.AssetCheckKey], cursor: str
) -> Iterator[Alert]:
    """A message for each run with checks that failed after `cursor`, and one for what the audit found meanwhile.

    Args:
        cursor: the time up to which checks were told; or, within a span of time, its begin, its end and how many of its
            messages were sent.
    """
    begin, end, sent = (*cursor.split(), "", "")[:3]
    after, until, sent_before = float(begin), float(end or time.time() - SETTLE_S), int(sent or 0)
    found: dict[str, list[str]] = {}
    for check in sorted(checks, key=lambda key: key.to_user_string()):
        for run_id, line in _failed_between(instance, check, after, until):
            found.setdefault("" if check.name == AUDITED else run_id, []).append(line)
    for number, (run_id, lines) in enumerate(sorted(found.items()), 1):
        last = number == len(found)
        title = f"in run {run_id[:8]}" if run_id else "when data on disk were audited"
        text = message(f"{len(lines):,} checks failed {title}", lines)
        yield Alert(str(until) if last else f"{after} {until} {number}", text if number > sent_before else "")


def _failed_between(
    instance: dg.DagsterInstance, check: dg.AssetCheckKey, after: float, until: float
) -> Iterator[tuple[str, str]]:
    """Run and line of each result of a check that failed in a span of time."""
    history = instance.event_log_storage.get_asset_check_execution_history
    for record in history(check, limit=FAILED_CHECKS, status={AssetCheckExecutionRecordStatus.FAILED}):
        if record.event is not None and after < record.event.timestamp <= until:
            evaluation = record.event.get_dagster_event().asset_check_evaluation_data
            where = f"{check.asset_key.to_user_string()} {record.partition or ''}".rstrip()
            yield record.run_id, f"{where}, {check.name}: {evaluation.description or 'failed'}"


def message(title: str, lines: Iterable[str]) -> str:
    """A text of limited length: title, and a line for each archive as far as there is room."""
    lines = list(lines)
    text = f":red_circle: {_plain(title, REASON_CHARACTERS)}"
    named = 0
    for line in lines[:ARCHIVES_NAMED]:
        bullet = f"\n• {_plain(line, REASON_CHARACTERS)}"
        if len(text) + len(bullet) > MESSAGE_CHARACTERS:
            break
        text, named = text + bullet, named + 1
    return text + (f"\nand {len(lines) - named:,} more" if named < len(lines) else "")


def _plain(text: str, limit: int) -> str:
    """One line of at most `limit` characters in which nothing is markup, and no address has a query."""
    plain = re.sub(r"https?://\S+", lambda found: redact_url(found[0]), one_line(text))
    plain = plain if len(plain) <= limit else f"{plain[: limit - 1]}…"
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
