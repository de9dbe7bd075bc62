"""The committed instance on a real PostgreSQL: the backfill of `test_backfill` there, and the audit goes over it."""

import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import dagster as dg
import pytest

from md_assets.core.paths import ARCHIVE_STAGES
from md_assets.core.verdict import AUDITED
from md_assets.orchestration.backfills import DATASET_TAG, a_daemon_runs
from md_assets.orchestration.records import kept_connection
from md_assets_tests.conftest import set_postgres_variables
from md_assets_tests.end_to_end.conftest import REPOSITORY, SandboxCommands, read_output, wait_for
from md_assets_tests.end_to_end.test_backfill import DAEMON, fail_then_mend

pytestmark = [pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(900)]


PARTS = ("HOST", "PORT", "DATABASE", "USER", "PASSWORD")


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """The environment in which `deploy/dagster.postgres.yaml` finds a server with an empty database; it is set."""
    with set_postgres_variables(monkeypatch) as variables:
        yield variables


def as_committed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the home of the committed instance."""
    shutil.copyfile(REPOSITORY / "deploy" / "dagster.postgres.yaml", home / "dagster.yaml")
    monkeypatch.setenv("DAGSTER_HOME", str(home))


@pytest.fixture
def instance(
    postgres: Mapping[str, str], commands: SandboxCommands, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """The committed instance, with a daemon, ended as a person ends it."""
    commands.sandbox_environment = {**commands.sandbox_environment, **postgres}
    as_committed(commands.sandbox.dagster_home, monkeypatch)
    with dg.DagsterInstance.get() as instance:
        process = commands.start(sys.executable, "-c", DAEMON, "-m", "md_assets.definitions")
        assert wait_for(lambda: a_daemon_runs(instance) or process.poll() is not None, 120, pause_s=0.2)
        yield instance
        process.send_signal(2)
        assert process.wait(60) == 0, read_output(process)


def test_what_failed_is_mended_and_audited_on_postgresql(
    commands: SandboxCommands, instance: dg.DagsterInstance
) -> None:
    assert fail_then_mend(commands, instance, *ARCHIVE_STAGES)[0] == "COMPLETED_SUCCESS"

    runs = instance.get_runs()
    assert Counter(run.status.value for run in runs if run.status.value != "SUCCESS") == {"FAILURE": 1}
    assert {run.tags[DATASET_TAG] for run in runs} == {"jdb"}
    assert not list(commands.sandbox.dagster_home.rglob("*.db")), "something still goes to SQLite"

    keys = {name: dg.AssetKey(["jdb", name]) for name in ("mds", "latents", "mds_index", "latents_index")}
    checks = [dg.AssetCheckKey(key, AUDITED) for key in keys.values()]

    def audited() -> Counter[str]:
        histories = (instance.event_log_storage.get_asset_check_execution_history(check, limit=9) for check in checks)
        return Counter(record.status.value for records in histories for record in records)

    assert audited() == {"PLANNED": 8}
    turn_on = commands.start(sys.executable, "-m", "dagster", "sensor", "start", "audit", "-m", "md_assets.definitions")
    commands.finish(turn_on)
    # Of the indexes, which were merged twice, only the newer ones are audited.
    assert wait_for(lambda: audited() == {"SUCCEEDED": 6, "PLANNED": 2}, 180, pause_s=1), audited()


def test_a_connection_is_kept_for_a_block_and_then_closed(
    postgres: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg2

    as_committed(tmp_path, monkeypatch)
    host, port, database, user, password = (postgres[f"MD_ASSETS_POSTGRES_{part}"] for part in PARTS)
    other = psycopg2.connect(host=host, port=port, dbname=database, user=user, password=password)
    other.autocommit = True
    cursor = other.cursor()

    def processes() -> set[int]:
        """Of the server, for connections beside the one that asks."""
        of_clients = (
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        cursor.execute(of_clients)
        return {pid for (pid,) in cursor.fetchall()}

    raw = dg.AssetKey(["jdb", "raw"])
    with dg.DagsterInstance.get() as instance:
        seen: set[int] = set()
        with kept_connection(instance):
            for archive in ("a0", "a1", "a2"):
                instance.report_runless_asset_event(dg.AssetMaterialization(raw, partition=archive))
                seen |= processes()
        assert len(seen) == 1
        assert wait_for(lambda: not processes(), 10, pause_s=0.05)
        assert instance.get_materialized_partitions(raw) == {"a0", "a1", "a2"}
        assert wait_for(lambda: not processes(), 10, pause_s=0.05)
    other.close()
