"""The committed instance on a real PostgreSQL: the backfill of `test_backfill` there, and the audit goes over it."""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from md_assets.core.paths import ARCHIVE_STAGES
from md_assets.core.verdict import AUDITED
from md_assets.orchestration.backfills import DATASET_TAG, a_daemon_runs
from md_assets_tests.end_to_end.conftest import REPOSITORY, SandboxCommands, read_output, wait_for
from md_assets_tests.end_to_end.test_backfill import DAEMON, fail_then_mend

pytestmark = [pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(900)]


def program(name: str) -> str:
    """A program of PostgreSQL, which Debian keeps off the PATH."""
    found = shutil.which(name) or next(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), None)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("postgresql is missing; make system-packages installs it")
        pytest.skip("postgresql is missing; make system-packages, as root, installs it")
    return found


def unprivileged() -> dict[str, Any]:
    """Options of a process as somebody else than root, for whom PostgreSQL does not run."""
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam("postgres" if "postgres" in (entry.pw_name for entry in pwd.getpwall()) else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def postgres() -> Iterator[Mapping[str, str]]:
    """The environment in which `deploy/dagster.postgres.yaml` finds a server with an empty database."""
    initdb, server = program("initdb"), program("postgres")
    as_user = unprivileged()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = Path(tempfile.mkdtemp(prefix="md-assets-pg-"))  # below a folder that others than root may enter
    try:
        (folder / "password").write_text("of-the-test")
        if as_user:
            for path in (folder, folder / "password"):
                os.chown(path, as_user["user"], as_user["group"])
        made = [initdb, "-D", str(folder / "data"), "-U", "dagster", "--auth=scram-sha-256", "--no-sync", "-E", "UTF8"]
        subprocess.run([*made, f"--pwfile={folder / 'password'}"], check=True, capture_output=True, cwd="/", **as_user)
        options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder, "fsync": "off"}
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (folder / "log").open("w") as log:
            command = [server, "-D", str(folder / "data"), *settings]
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **as_user)
        try:
            assert wait_for(lambda: is_open(int(port)) or process.poll() is not None, 60, pause_s=0.1)
            assert process.poll() is None, (folder / "log").read_text()
            yield {
                "MD_ASSETS_POSTGRES_HOST": "127.0.0.1",
                "MD_ASSETS_POSTGRES_PORT": port,
                "MD_ASSETS_POSTGRES_DATABASE": "postgres",
                "MD_ASSETS_POSTGRES_USER": "dagster",
                "MD_ASSETS_POSTGRES_PASSWORD": "of-the-test",
            }
        finally:
            process.send_signal(2)  # ends connections, then itself
            process.wait(60)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def instance(
    postgres: Mapping[str, str], commands: SandboxCommands, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.DagsterInstance]:
    """The committed instance, with a daemon, ended as a person ends it."""
    home = commands.sandbox.dagster_home
    shutil.copyfile(REPOSITORY / "deploy" / "dagster.postgres.yaml", home / "dagster.yaml")
    commands.sandbox_environment = {**commands.sandbox_environment, **postgres}
    for name, value in {**postgres, "DAGSTER_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.get() as instance:
        process = commands.start(sys.executable, "-c", DAEMON, "-m", "md_assets.definitions")
        assert wait_for(lambda: a_daemon_runs(instance) or process.poll() is not None, 120, pause_s=0.2)
        yield instance
        process.send_signal(2)
        assert process.wait(60) == 0, read_output(process)


def test_what_failed_is_mended_and_audited_on_postgresql(
    commands: SandboxCommands, instance: dg.DagsterInstance
) -> None:
    fail_then_mend(commands, instance, *ARCHIVE_STAGES)

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
