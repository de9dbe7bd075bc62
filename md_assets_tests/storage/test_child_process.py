"""A child that asked to die with its parent does so, however the parent ends; one that did not lives on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", '''
import sys, time
from md_assets.storage.child_process import die_with_parent
if sys.argv[1] == "bound":
    die_with_parent()
print("ready", flush=True)
time.sleep(60)
''', sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""

POOL = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from md_assets.storage.child_process import end_with_parent
if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(1, context, end_with_parent if sys.argv[1] == "bound" else None)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("parent_script", [PARENT, POOL], ids=["process", "worker of a fork server"])
@pytest.mark.parametrize("binding", ["bound", "free"])
def test_a_child_dies_with_a_killed_parent_if_it_asked_to(tmp_path: Path, parent_script: str, binding: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(parent_script)
    with subprocess.Popen([sys.executable, str(script), binding], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert runs(child)
            parent.kill()
            parent.wait()
            deadline = time.monotonic() + (60 if binding == "bound" else 0.5)
            while runs(child) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert runs(child) == (binding == "free")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
