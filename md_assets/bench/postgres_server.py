"""A PostgreSQL server of one's own with an empty database, in a folder that is removed with it.

Here: starting and ending Debian's programs. Not here: Dagster's configuration for it, `deploy/dagster.postgres.yaml`,
whose variables it gives.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from md_assets.core.errors import MdAssetsError, SettingsError
from md_assets.storage.child_process import die_with_parent

START_S, STOP_S = 60, 60

PASSWORD = "on-loopback-only"


@contextmanager
def postgres_server(*, durable: bool = True) -> Iterator[dict[str, str]]:
    """A server until the block ends; gives the environment in which `deploy/dagster.postgres.yaml` finds it.

    Args:
        durable: whether commits wait for the disk, as those of any server do that is not for a test.

    Raises:
        SettingsError: PostgreSQL is not installed.
        MdAssetsError: it does not start.
    """
    initdb, server = _program("initdb"), _program("postgres")
    as_user = _unprivileged()
    port = _free_port()
    folder = Path(tempfile.mkdtemp(prefix="md-assets-pg-"))  # below a folder that others than root may enter
    try:
        (folder / "password").write_text(PASSWORD)
        if as_user:
            for path in (folder, folder / "password"):
                os.chown(path, as_user["user"], as_user["group"])
        made = [initdb, "-D", str(folder / "data"), "-U", "dagster", "--auth=scram-sha-256", "-E", "UTF8"]
        subprocess.run([*made, f"--pwfile={folder / 'password'}"], check=True, capture_output=True, cwd="/", **as_user)
        options: dict[str, Any] = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": folder}
        options |= {} if durable else {"fsync": "off"}
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (folder / "log").open("w") as log:
            command = [server, "-D", str(folder / "data"), *settings]
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", preexec_fn=die_with_parent, **as_user)
        try:
            _wait(process, port, folder / "log")
            yield {
                "MD_ASSETS_POSTGRES_HOST": "127.0.0.1",
                "MD_ASSETS_POSTGRES_PORT": str(port),
                "MD_ASSETS_POSTGRES_DATABASE": "postgres",
                "MD_ASSETS_POSTGRES_USER": "dagster",
                "MD_ASSETS_POSTGRES_PASSWORD": PASSWORD,
            }
        finally:
            process.send_signal(2)  # ends connections, then itself
            process.wait(STOP_S)
    finally:
        shutil.rmtree(folder)


def _program(name: str) -> str:
    """A program of PostgreSQL, which Debian keeps off the PATH."""
    found = shutil.which(name) or next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
    if found is None:
        raise SettingsError(f"PostgreSQL's {name} is not installed", "As root: make system-packages")
    return found


def _unprivileged() -> dict[str, Any]:
    """Options of a process as somebody else than root, for whom PostgreSQL does not run."""
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam("postgres" if "postgres" in (entry.pw_name for entry in pwd.getpwall()) else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise MdAssetsError(f"PostgreSQL did not start: {log.read_text()[-500:]}")
