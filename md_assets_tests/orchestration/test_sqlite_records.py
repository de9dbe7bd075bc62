"""What is of SQLite alone; what both storages of ours do is in `test_records`."""

from pathlib import Path

import dagster as dg
import pytest
import yaml

from md_assets.orchestration.sqlite_records import RUNS_OPEN, SqliteEvents
from md_assets_tests.orchestration.test_run_queue import DEPLOY


def test_the_logs_of_many_runs_do_not_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    storage = yaml.safe_load(DEPLOY.read_text())["storage"]
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"storage": storage}))
    with dg.DagsterInstance.get() as instance:
        events = instance.event_log_storage
        assert isinstance(events, SqliteEvents)
        for number in range(RUNS_OPEN + 3):
            with events.run_connection(f"run-{number}"):
                pass
        files = [path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        assert sorted({name for name in files if name.startswith("run-") and name.endswith(".db")}) == sorted(
            f"run-{number}.db" for number in range(3, RUNS_OPEN + 3)
        )
        with events.run_connection("run-0"):
            pass
