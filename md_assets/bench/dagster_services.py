"""Dagster's services as an installation runs them, each a process of its own: code server, daemon, webserver.

Here: starting and ending them, their memory, a question to the webserver. Not here: what is measured with them
(`bench.scale`).
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from md_assets.core.errors import MdAssetsError
from md_assets.storage.child_process import die_with_parent

START_S = 120.0
"""A service that has not begun to answer by then does not start; it takes 5 s on an idle machine."""

END_S = 60.0
"""For so long a service may take to end by itself."""

LOG_TAIL_BYTES = 2_000

_MEMORY = re.compile(r"^(VmRSS|VmHWM):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process in MiB: now, and the most that it ever had."""

    now_mib: float
    peak_mib: float


@dataclass(frozen=True)
class Service:
    """A running service.

    Attributes:
        name: for people.
        process: its own process; what it starts is not part of it.
        log: the file that takes its output.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def memory(self) -> Memory:
        """See `Memory`.

        Raises:
            MdAssetsError: it has ended.
        """
        self.check()
        kib = dict(_MEMORY.findall(Path(f"/proc/{self.process.pid}/status").read_text()))
        return Memory(int(kib["VmRSS"]) / 1024, int(kib["VmHWM"]) / 1024)

    def check(self) -> None:
        """Make sure that it runs.

        Raises:
            MdAssetsError: it has ended; with the end of its output.
        """
        if self.process.poll() is not None:
            said = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
            raise MdAssetsError(f"{self.name} has ended with exit code {self.process.returncode}: {said}")

    def wait_until(self, ready: Callable[[], bool], limit_s: float = START_S) -> None:
        """Wait until `ready`.

        Raises:
            MdAssetsError: it has ended, or is not ready in time.
        """
        end = time.monotonic() + limit_s
        while not ready():
            self.check()
            if time.monotonic() > end:
                raise MdAssetsError(f"{self.name} did not start in {limit_s:.0f} s", f"See {self.log}")
            time.sleep(0.2)


@contextmanager
def started(name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Iterator[Service]:
    """A service until the block ends, ended as a person ends it, by SIGINT.

    Args:
        name: for people, and of its log in `folder`.
        command: after the Python interpreter.
        environment: beside that of this process.
    """
    path = folder / f"{name.replace(' ', '_')}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_of_its_own,
        )
    try:
        yield Service(name, process, path)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _of_its_own() -> None:
    """In the child: it does not outlive this process, and takes SIGINT even if this process was told to ignore it."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processor_s(pid: int, *, children: bool = True) -> float:
    """Processor seconds of a running process so far, user and system.

    Args:
        children: whether to add those of all that it started, running or ended.
    """
    found = dict(_processes())

    def whole_s(pid: int) -> float:
        running = (child for child, process in found.items() if process.parent == pid)
        return found[pid].own_s + found[pid].ended_s + sum(map(whole_s, running))

    return whole_s(pid) if children else found[pid].own_s


@dataclass(frozen=True)
class _Process:
    """Processor seconds of a process, and of those that it started and has waited for."""

    parent: int
    own_s: float
    ended_s: float


def _processes() -> Iterator[tuple[int, _Process]]:
    """All that run, by their ID."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            # After the name in brackets, which may have spaces; see proc(5), fields 4 and 14 to 17.
            fields = path.read_text().rpartition(")")[2].split()
            user, system, ended_user, ended_system = (int(field) / os.sysconf("SC_CLK_TCK") for field in fields[11:15])
            yield int(path.parent.name), _Process(int(fields[1]), user + system, ended_user + ended_system)


def code_server(module: str, port: int) -> list[str]:
    """The command of a code server; runs that are launched are its children."""
    return ["-m", "dagster", "api", "grpc", "-m", module, "-p", str(port), "-h", "localhost"]


def daemon(code_port: int) -> list[str]:
    """The command of the daemon, all of whose intervals are Dagster's own."""
    return ["-m", "dagster._daemon", "run", "--grpc-port", str(code_port), "--grpc-host", "localhost"]


def webserver(code_port: int, port: int) -> list[str]:
    """The command of the webserver."""
    command = ["-m", "dagster_webserver", "-h", "localhost", "-p", str(port)]
    return [*command, "--grpc-port", str(code_port), "--grpc-host", "localhost"]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether something takes connections at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def ask(port: int, query: str, **variables: Any) -> Any:
    """The webserver's answer to a GraphQL query.

    Raises:
        MdAssetsError: it does not understand it.
    """
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(
        f"http://localhost:{port}/graphql", body, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request) as response:
        answer = json.loads(response.read())
    if answer.get("errors"):
        raise MdAssetsError(f"the webserver says: {answer['errors'][0]['message']}")
    return answer["data"]
