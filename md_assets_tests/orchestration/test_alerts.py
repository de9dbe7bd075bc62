"""Alerts at a loopback webhook: what is told, once, and what becomes of it while the webhook is away."""

import json
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import dagster as dg
import pytest
from dagster._core.events import DagsterEvent, DagsterEventType
from dagster._core.utils import make_new_run_id

from md_assets.datasets.jdb import SPEC as JDB
from md_assets.definitions import defs
from md_assets.demo.loopback_http import Handler, Loopback
from md_assets.orchestration.alerts import (
    ARCHIVES_NAMED,
    MESSAGE_CHARACTERS,
    MESSAGES_PER_TICK,
    WEBHOOK_VARIABLE,
    WebhookError,
    alert_failed_checks,
    alert_failed_runs,
    message,
    post,
)
from md_assets_tests.orchestration.conftest import Platform

MDS = dg.AssetKey(["jdb", "mds"])
SECRET = "T00/B00/s3cret"


class _WebhookHandler(Handler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        webhook = self.loopback
        assert isinstance(webhook, Webhook)
        if self.path != f"/{SECRET}":
            self._answer(404, b"no_service", {})
        elif webhook.answers and (status := webhook.answers.pop(0)) != 200:
            self._answer(status, b"", {"Location": "/elsewhere"})
        else:
            webhook.messages.append(json.loads(body))
            self._answer(200, b"ok", {})


class Webhook(Loopback):
    """Takes messages, or answers as it is told."""

    handler: ClassVar[type[Handler]] = _WebhookHandler
    what = "the webhook"

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[int] = []
        self.messages: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"{self.address}/{SECRET}"

    @property
    def texts(self) -> list[str]:
        assert all(list(message) == ["text"] for message in self.messages)
        return [message["text"] for message in self.messages]


@pytest.fixture
def webhook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    with Webhook() as webhook:
        monkeypatch.setenv(WEBHOOK_VARIABLE, webhook.url)
        monkeypatch.setattr("md_assets.orchestration.alerts.SETTLE_S", 0.0)
        yield webhook


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def tick(sensor: dg.SensorDefinition, instance: dg.DagsterInstance, cursor: str | None) -> tuple[str | None, str]:
    """The cursor after a tick, and what the tick says."""
    result = sensor.evaluate_tick(dg.build_sensor_context(instance=instance, cursor=cursor, definitions=defs))
    assert not result.run_requests
    assert SECRET not in (result.skip_message or "")
    return result.cursor, result.skip_message or ""


def fail_run(instance: dg.DagsterInstance, why: str = "its process died", **tags: str) -> str:
    job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection={MDS})
    run = instance.create_run_for_job(job, asset_selection=frozenset({MDS}), tags=tags)
    instance.report_run_failed(run, why)
    return run.run_id


def fail_check(instance: dg.DagsterInstance, run_id: str, archive: str, check: str = "shards_intact") -> None:
    evaluation = dg.AssetCheckEvaluation(
        asset_key=MDS, check_name=check, passed=False, partition=archive, description="cut off", metadata={}
    )
    event_type = DagsterEventType.ASSET_CHECK_EVALUATION.value
    instance.report_dagster_event(DagsterEvent(event_type, "job", event_specific_data=evaluation), run_id)


def test_a_failed_run_is_one_message_with_its_archives(platform: Platform, webhook: Webhook) -> None:
    cursor, _ = tick(alert_failed_runs, platform.instance, None)
    archives = ("train/000", "train/001")
    for archive in archives:
        file = JDB.locate(archive)
        path = platform.sandbox.hub_root / "datasets" / file.repo / file.path
        path.write_bytes(path.read_bytes()[:1000])
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        asset_selection=[dg.AssetKey(["jdb", "raw"])],
        tags={"dagster/asset_partition_range_start": archives[0], "dagster/asset_partition_range_end": archives[1]},
        instance=platform.instance,
        raise_on_error=False,
        run_config={"resources": {"images": {"config": {"num_workers": 0}}}},
    )
    assert not result.success

    cursor, said = tick(alert_failed_runs, platform.instance, cursor)

    assert said == "1 messages sent"
    (text,) = webhook.texts
    title, *lines = text.splitlines()
    assert title == f":red_circle: jdb/raw: run {result.run_id[:8]} failed, 2 archives in it"
    assert [line.partition(": ")[0] for line in lines] == [f"• jdb {archive}" for archive in archives]
    assert all("cut off" in line for line in lines)
    assert tick(alert_failed_runs, platform.instance, cursor) == (cursor, "0 messages sent")


def test_a_run_whose_process_died_is_told_with_its_reason(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    cursor, _ = tick(alert_failed_runs, instance, None)
    run_id = fail_run(instance, **{"dagster/backfill": "abcd"})
    tick(alert_failed_runs, instance, cursor)
    assert webhook.texts == [f":red_circle: jdb/mds: run {run_id[:8]} of backfill abcd failed\n• its process died"]


def test_what_was_before_a_sensor_was_turned_on_is_not_told(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    fail_run(instance)
    fail_check(instance, make_new_run_id(), "train/000")
    time.sleep(0.01)
    for sensor in (alert_failed_runs, alert_failed_checks):
        cursor, said = tick(sensor, instance, None)
        assert said == "0 messages sent"
        assert tick(sensor, instance, cursor)[1] == "0 messages sent"
    assert webhook.messages == []


def test_a_run_that_is_started_again_is_told_when_it_fails_for_good(
    instance: dg.DagsterInstance, webhook: Webhook
) -> None:
    fail_run(instance, **{"dagster/will_retry": "true"})
    last = fail_run(instance)
    cursor, said = tick(alert_failed_runs, instance, "0")
    assert said == "1 messages sent" and last[:8] in webhook.texts[0]
    fail_run(instance, **{"dagster/will_retry": "true"})
    assert tick(alert_failed_runs, instance, cursor)[0] != cursor


@pytest.mark.parametrize("sensor", [alert_failed_runs, alert_failed_checks])
def test_a_webhook_that_is_away_gets_its_messages_later(
    instance: dg.DagsterInstance, webhook: Webhook, sensor: dg.SensorDefinition
) -> None:
    cursor = tick(sensor, instance, None)[0]
    if sensor is alert_failed_runs:
        cursor = "0"
    for _ in range(3):
        fail_check(instance, fail_run(instance), "train/000")
    webhook.answers = [200, 500]
    cursor, said = tick(sensor, instance, cursor)
    assert said == "1 messages sent; the webhook answered 500. The next one is sent again at the next tick"
    webhook.stop()
    cursor, said = tick(sensor, instance, cursor)
    assert said.startswith("0 messages sent; the webhook does not answer (ConnectionError)")
    webhook._port = 0
    webhook.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WEBHOOK_VARIABLE, webhook.url)
        cursor, said = tick(sensor, instance, cursor)
        assert said == "2 messages sent"
        assert len(set(webhook.texts)) == len(webhook.texts) == 3
        assert tick(sensor, instance, cursor)[1] == "0 messages sent"


@pytest.mark.parametrize("sensor", [alert_failed_runs, alert_failed_checks])
def test_nothing_is_sent_and_nothing_forgotten_without_an_address(
    instance: dg.DagsterInstance, webhook: Webhook, sensor: dg.SensorDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    cursor, _ = tick(sensor, instance, None)
    fail_check(instance, fail_run(instance), "train/000")
    monkeypatch.delenv(WEBHOOK_VARIABLE)
    assert tick(sensor, instance, cursor) == (cursor, f"{WEBHOOK_VARIABLE} is not set")
    monkeypatch.setenv(WEBHOOK_VARIABLE, SECRET)
    assert tick(sensor, instance, cursor)[1].startswith(f"0 messages sent; {WEBHOOK_VARIABLE} is no http address")
    monkeypatch.setenv(WEBHOOK_VARIABLE, webhook.url)
    assert tick(sensor, instance, cursor)[1] == "1 messages sent"


def test_a_redirect_is_not_followed_with_the_message(webhook: Webhook) -> None:
    webhook.answers = [302]
    with pytest.raises(WebhookError, match=r"^the webhook answered 302$"):
        post(webhook.url, "text")


def test_an_error_does_not_quote_the_address() -> None:
    with pytest.raises(WebhookError) as caught:
        post(f"http://127.0.0.1:1/{SECRET}", "text")
    assert SECRET not in repr(caught.value) and caught.value.__suppress_context__


def test_failed_checks_of_a_run_are_one_message(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    cursor, _ = tick(alert_failed_checks, instance, None)
    first, second = sorted(make_new_run_id() for _ in range(2))
    for archive in ("train/000", "train/001"):
        fail_check(instance, first, archive)
    fail_check(instance, second, "train/002", "counts_balance")

    tick(alert_failed_checks, instance, cursor)

    assert webhook.texts == [
        f":red_circle: 2 checks failed in run {first[:8]}\n"
        "• jdb/mds train/001, shards_intact: cut off\n• jdb/mds train/000, shards_intact: cut off",
        f":red_circle: 1 checks failed in run {second[:8]}\n• jdb/mds train/002, counts_balance: cut off",
    ]


def test_what_the_audit_found_is_one_message(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    """Its results stand with the runs that published, but come together."""
    cursor, _ = tick(alert_failed_checks, instance, None)
    for archive in ("train/000", "train/001"):
        fail_check(instance, make_new_run_id(), archive, "audited")
    tick(alert_failed_checks, instance, cursor)
    (text,) = webhook.texts
    assert text.splitlines()[0] == ":red_circle: 2 checks failed when data on disk were audited"


def test_a_tick_sends_a_limited_number(instance: dg.DagsterInstance, webhook: Webhook) -> None:
    cursor, _ = tick(alert_failed_checks, instance, None)
    for _ in range(MESSAGES_PER_TICK + 2):
        fail_check(instance, make_new_run_id(), "train/000")
    cursor, said = tick(alert_failed_checks, instance, cursor)
    assert said == f"{MESSAGES_PER_TICK} messages sent"
    assert tick(alert_failed_checks, instance, cursor)[1] == "2 messages sent"
    assert len(set(webhook.texts)) == MESSAGES_PER_TICK + 2


def test_messages_are_bounded_and_say_how_many_are_not_named() -> None:
    short = message("title", [f"archive {number}" for number in range(100)])
    assert len(short.splitlines()) == 1 + ARCHIVES_NAMED + 1
    assert short.endswith(f"and {100 - ARCHIVES_NAMED} more")
    long = message("title" * 1000, ["reason " * 1000] * 100)
    assert MESSAGE_CHARACTERS * 0.8 < len(long) <= MESSAGE_CHARACTERS + 20


def test_nothing_in_a_message_is_markup_and_no_address_has_its_signature() -> None:
    text = message("a", ["<!channel> & more", "GET https://host/file.tar?sig=abc failed"])
    assert text == ":red_circle: a\n• &lt;!channel&gt; &amp; more\n• GET https://host/file.tar failed"
