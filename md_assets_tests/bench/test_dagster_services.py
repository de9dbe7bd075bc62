"""Services of the scale benchmark: processes that are started, looked at and ended."""

import os
import signal
from pathlib import Path

import pytest

from md_assets.bench.dagster_services import answers, free_port, processor_s, started
from md_assets.core.errors import MdAssetsError

LISTEN = "import socket, sys, time; s = socket.create_server(('localhost', int(sys.argv[1]))); print('up', flush=True)"


def test_a_service_is_waited_for_and_ended_as_a_person_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells have it for jobs in the background
    try:
        with started("a server", ["-c", f"{LISTEN}; time.sleep(60)", str(port)], tmp_path, {}) as service:
            service.wait_until(lambda: answers(port))
            memory = service.memory()
    finally:
        signal.signal(signal.SIGINT, before)
    assert 1 < memory.now_mib <= memory.peak_mib < 200
    assert service.process.returncode == -signal.SIGINT
    assert (tmp_path / "a_server.log").read_text().startswith("up\n")
    assert not answers(port)


def test_a_service_that_ends_is_told_with_its_last_words(tmp_path: Path) -> None:
    with started("a server", ["-c", "import os, sys; sys.exit(os.environ['WHY'])"], tmp_path, {"WHY": "no disk"}) as it:
        it.process.wait(30)
        with pytest.raises(MdAssetsError, match="a server has ended with exit code 1: no disk"):
            it.wait_until(lambda: False)


def test_a_service_that_does_not_come_up_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with (
        started("a server", ["-c", "import time; time.sleep(60)"], tmp_path, {}) as service,
        pytest.raises(MdAssetsError, match="did not start in 0 s"),
    ):
        service.wait_until(lambda: False, limit_s=0.1)


def test_processor_time_is_of_a_process_and_of_all_that_it_starts(tmp_path: Path) -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    then_wait = "print(1, flush=True); time.sleep(60)"
    program = f"""import subprocess, sys, time
subprocess.run([sys.executable, "-c", {burn!r}])
running = subprocess.Popen([sys.executable, "-c", {burn + then_wait!r}], stdout=-1)
running.stdout.readline()
print("up", flush=True)
time.sleep(60)"""
    with started("a parent", ["-c", program], tmp_path, {}) as service:
        service.wait_until(lambda: service.log.read_text() == "up\n")
        whole, own = (processor_s(service.process.pid, children=children) for children in (True, False))
        assert own < 0.6 <= whole - own  # 0.3 s of a child that has ended, and of one that runs
        assert whole <= processor_s(os.getpid())
