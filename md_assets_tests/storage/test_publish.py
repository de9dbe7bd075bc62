"""The publish protocol: killed between any two steps, nothing half made is ever visible, and the next run mends all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import Ledger, OutputFile
from md_assets.core.paths import DataRoot, StageDir
from md_assets.storage.publish import (
    BusyError,
    clear_leftovers,
    is_busy,
    output_file,
    publish,
    read_ledger,
    read_numbers,
    scratch,
    with_files,
    workspace,
    write_atomically,
)

ARCHIVE = "train/000"
SHARDS = ("index.json", "shard.00000.mds", "shard.00001.mds")


def ledger(stage: str, content: str, files: tuple[OutputFile, ...] = ()) -> Ledger:
    whole = Ledger(
        dataset="jdb",
        archive=ARCHIVE,
        stage=stage,
        read=1,
        kept=1,
        rejected={},
        bytes_in=1,
        bytes_out=0,
        seconds=0.0,
        source={},
        inputs={"content": content},
        settings={},
        versions={},
        files=(),
    )
    return with_files(whole, files)


def make_and_publish(stage_dir: StageDir, content: str) -> None:
    """What a stage does: a file or a directory made in a workspace, then published."""
    with workspace(stage_dir.ledger(ARCHIVE)) as own:
        if stage_dir.stage == "raw":
            made = scratch(own, "out") / "000.tar"
            made.write_text(content)
            files: tuple[OutputFile, ...] = (output_file(made, f"{ARCHIVE}.tar"),)
        else:
            made = scratch(own, "shards")
            for name in SHARDS:
                (made / name).write_text(f"{content} {name}")
            files = tuple(output_file(made / name, f"{ARCHIVE}/{name}") for name in SHARDS)
        publish(stage_dir, made, ledger(stage_dir.stage, content, files))


def visible(stage_dir: StageDir) -> str | None:
    """What a reader finds: nothing, or whole data of one content; anything else fails."""
    found = read_ledger(stage_dir.ledger(ARCHIVE))
    if found is None:
        return None
    for file in found.files:
        assert output_file(stage_dir.path / file.path, file.path) == file
    if stage_dir.stage == "mds":
        assert sorted(p.name for p in stage_dir.data(ARCHIVE).iterdir()) == list(SHARDS)
    return found.inputs["content"]


def stage_dir_in(root: Path, stage: str) -> StageDir:
    return DataRoot(root).raw("jdb") if stage == "raw" else DataRoot(root).mds("jdb")


def entries(stage_dir: StageDir) -> list[str]:
    return sorted(p.name for p in stage_dir.ledger(ARCHIVE).parent.iterdir())


def finished(stage: str) -> list[str]:
    return ["000.json", "000.tar"] if stage == "raw" else ["000", "000.json"]


@pytest.mark.parametrize("stage", ["raw", "mds"])
def test_what_is_published_is_found_and_replaced_whole(tmp_path: Path, stage: str) -> None:
    stage_dir = stage_dir_in(tmp_path, stage)
    assert visible(stage_dir) is None
    for content in ("old", "new", "new"):
        make_and_publish(stage_dir, content)
        assert visible(stage_dir) == content and entries(stage_dir) == finished(stage)


def test_a_ledger_tells_size_and_hash_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    file = output_file(tmp_path / "a", "train/a")
    assert (file.path, file.bytes) == ("train/a", 3_000_000)
    assert with_files(ledger("raw", ""), (file, file)).bytes_out == 6_000_000


def test_an_edited_ledger_is_an_error_and_an_absent_one_is_none(tmp_path: Path) -> None:
    stage_dir = stage_dir_in(tmp_path, "raw")
    assert read_ledger(tmp_path / "none.json") is None
    make_and_publish(stage_dir, "old")
    path = stage_dir.ledger(ARCHIVE)
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "settings": {"quality": 1}}))
    with pytest.raises(MdAssetsError, match="was edited"):
        read_ledger(path)


# Kills


KILLS = """
import builtins, json, os, shutil, sys
from pathlib import Path

sys.path[:0] = json.loads(sys.argv[1])
from md_assets_tests.storage.test_publish import make_and_publish, stage_dir_in, visible, entries, finished

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "fsync"}
root, stage, before, double = Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "replaced", sys.argv[5] == "double"
left, armed = 0, False


def step(event, arguments):
    # Called before each step on the disk; ends the process before the one whose turn it is.
    global left
    if armed and event in EVENTS and (event != "open" or "w" in str(arguments[1])):
        left -= 1
        if left < 0:
            os._exit(9)


def synced(descriptor, real=os.fsync):
    step("fsync", ())
    real(descriptor)


os.fsync = synced
sys.addaudithook(step)


def killed_at(number, content):
    global left, armed
    child = os.fork()
    if child == 0:
        left, armed = number, True
        make_and_publish(stage_dir, content)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def visible_after(*kills):
    global stage_dir
    shutil.rmtree(root, ignore_errors=True)
    stage_dir = stage_dir_in(root, stage)
    if before:
        make_and_publish(stage_dir, "old")
    killed = [killed_at(number, f"new {turn}") for turn, number in enumerate(kills)]
    found = visible(stage_dir)
    assert found in (None, "old" if before else None, *[f"new {turn}" for turn in range(len(kills))]), found
    make_and_publish(stage_dir, "last")
    assert visible(stage_dir) == "last"
    assert entries(stage_dir) == finished(stage), entries(stage_dir)
    return killed, found


first, seen = 0, set()
while True:
    killed, found = visible_after(first)
    seen.add(found)
    if not killed[0]:
        break
    second = first % 3  # every third pair
    while double and visible_after(first, second)[0][1]:
        second += 3
    first += 1
print(json.dumps({"steps": first, "seen": sorted(map(str, seen))}))
"""


@pytest.mark.parametrize(
    ("stage", "before", "kills"),
    [
        ("raw", "first", "single"),
        ("raw", "replaced", "single"),
        ("mds", "first", "single"),
        ("mds", "replaced", "single"),
        pytest.param("raw", "replaced", "double", marks=pytest.mark.slow),
        pytest.param("mds", "replaced", "double", marks=pytest.mark.slow),
    ],
)
def test_killed_before_any_step_on_the_disk(tmp_path: Path, stage: str, before: str, kills: str) -> None:
    """Once, or again in the run after it, at pairs of steps; then a run to the end."""
    arguments = [json.dumps([p for p in sys.path if p]), str(tmp_path / "root"), stage, before, kills]
    done = subprocess.run([sys.executable, "-c", KILLS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] > 8
    assert set(result["seen"]) == {"None", "new 0"} | ({"old"} if before == "replaced" else set())


# Workspaces


HOLDER = """
import sys, time
from pathlib import Path
from md_assets.storage.publish import workspace
with workspace(Path(sys.argv[1])) as own:
    (own / "scratch").mkdir()
    (own / "archive.tgz.part").write_text("half")
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def holder(ledger_path: Path, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the workspace."""
    command = [sys.executable, "-c", HOLDER, str(ledger_path), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_workspace_is_one_processes_and_free_once_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "train" / "000.json"
    with holder(path) as other:
        with pytest.raises(BusyError), workspace(path, wait=False):
            pass
        with workspace(tmp_path / "train" / "001.json", wait=False):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with workspace(path, wait=False) as own:
            assert (own / "archive.tgz.part").read_text() == "half"
            assert scratch(own, "scratch").is_dir() and not any((own / "scratch").iterdir())
    assert list((tmp_path / "train").iterdir()) == []


def test_whoever_waits_is_told_once_and_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "000.json"
    told: list[float] = []
    with holder(path, seconds=0.5) as other, workspace(path, on_wait=lambda: told.append(time.monotonic())) as own:
        assert own.is_dir() and list(own.iterdir()) == []  # the other one finished and took its things along
        other.wait(5)
    assert len(told) == 1
    with workspace(path, on_wait=lambda: told.append(0.0)):
        pass
    assert len(told) == 1


COUNTER = """
import sys
from pathlib import Path
from md_assets.storage.publish import workspace
counter = Path(sys.argv[1]) / "counter"
for _ in range(60):
    with workspace(Path(sys.argv[1]) / "000.json"):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_processes_exclude_each_other_while_workspaces_come_and_go(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    command = [sys.executable, "-c", COUNTER, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "240"


def test_an_error_keeps_partial_downloads_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "000.json"
    with pytest.raises(RuntimeError, match="mine"), workspace(path) as own:
        (own / "archive.tgz").write_text("whole, and found to be broken")
        (own / "archive.tgz.part").write_text("half")
        (own / "archive.tgz.source.part").write_text("id")
        (scratch(own, "out") / "000.tar").write_text("x")
        (own / "link").symlink_to(tmp_path)
        raise RuntimeError("mine")
    assert sorted(p.name for p in (tmp_path / ".000.tmp").iterdir()) == ["archive.tgz.part", "archive.tgz.source.part"]
    with pytest.raises(KeyboardInterrupt), workspace(path):
        raise KeyboardInterrupt
    assert (tmp_path / ".000.tmp" / "archive.tgz.part").read_text() == "half"
    with workspace(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_error_without_a_partial_download_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), workspace(tmp_path / "000.json") as own:
        scratch(own, "out")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_cleared_unless_somebody_works_there(tmp_path: Path) -> None:
    path = tmp_path / "000.json"
    clear_leftovers(path)
    assert list(tmp_path.iterdir()) == []
    with holder(path):
        clear_leftovers(path)
        assert (tmp_path / ".000.tmp" / "scratch").is_dir()
    clear_leftovers(path)
    assert list(tmp_path.iterdir()) == []


def test_scratch_is_empty_whatever_was_there(tmp_path: Path) -> None:
    (scratch(tmp_path, "out") / "deep").mkdir()
    assert list(scratch(tmp_path, "out").iterdir()) == []


def test_a_file_is_replaced_at_once_for_whoever_reads_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    contents = [bytes([65 + number]) * 200_000 for number in range(2)]
    write_atomically(path, contents[0], tmp_path)
    written = 0
    enough = threading.Event()
    read: set[bytes] = set()

    def keep_reading() -> None:
        while not enough.is_set():
            read.add(path.read_bytes())

    reader = threading.Thread(target=keep_reading)
    reader.start()
    while written < 100 or len(read) < 2:
        written += 1
        write_atomically(path, contents[written % 2], tmp_path)
    enough.set()
    reader.join()
    assert read == set(contents)
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"]


def test_whether_somebody_works_is_told_without_touching_anything(tmp_path: Path) -> None:
    ledger = tmp_path / "raw" / "000.json"
    assert not is_busy(ledger) and not ledger.parent.exists()
    with workspace(ledger) as own:
        before = own.stat()
        assert is_busy(ledger) and own.stat() == before
    own.mkdir()  # of one who was killed
    assert not is_busy(ledger) and own.exists()


def test_numbers_are_read_where_a_ledger_is(tmp_path: Path) -> None:
    assert read_numbers(tmp_path / "none.json") is None
    (tmp_path / "a.json").write_text(ledger("raw", "x").to_json())
    numbers = read_numbers(tmp_path / "a.json")
    assert numbers is not None and numbers.inputs == {"content": "x"} and numbers.kept == 1
    (tmp_path / "a.json").write_bytes(b"\xff")
    with pytest.raises(MdAssetsError, match=r"a\.json is no ledger"):
        read_numbers(tmp_path / "a.json")
