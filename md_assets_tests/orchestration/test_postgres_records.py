"""What is of PostgreSQL alone; what both storages of ours do is in `test_records`."""

import inspect
import os
import shutil
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution import asset_backfill

from md_assets.orchestration.postgres_records import DELAY_S, DELAY_VARIABLE, PostgresEvents
from md_assets_tests.conftest import set_postgres_variables
from md_assets_tests.orchestration.test_run_queue import DEPLOY


@pytest.mark.slow
@pytest.mark.postgres
def test_the_daemon_waits_for_events_on_their_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv(DELAY_VARIABLE, "7")  # so that it is put back
    monkeypatch.delenv(DELAY_VARIABLE)
    shutil.copyfile(DEPLOY.with_name("dagster.postgres.yaml"), tmp_path / "dagster.yaml")
    with set_postgres_variables(monkeypatch), dg.DagsterInstance.get() as instance:
        assert isinstance(instance.event_log_storage, PostgresEvents)
        assert os.environ[DELAY_VARIABLE] == DELAY_S
    assert DELAY_VARIABLE in inspect.getsource(asset_backfill), "Dagster has another name for it"
