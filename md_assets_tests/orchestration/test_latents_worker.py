"""The encoding process: as `accelerate launch` starts it, with Dagster's Pipes, and when it is killed."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster_pipes
import pytest

from md_assets.encoders.bundle import share_cpu
from md_assets.orchestration import latents_worker
from md_assets.orchestration.latents_launch import ACCELERATE_CONFIG, launch_command
from md_assets.orchestration.latents_worker import EventLog, Forwarder, dealt, events_path, main, progress_line
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.storage.mds import iter_rows
from md_assets_tests.stages.test_latents import assert_same_rows

COUNTS = {f"train/{i:03}": 6 + i for i in range(6)}

WORKER = "md_assets.orchestration.latents_worker"


@pytest.fixture
def plan(latents_plan) -> LatentsPlan:
    return latents_plan(COUNTS, batch_size=4, num_workers=1)


@pytest.fixture
def events_dir(tmp_path: Path) -> Path:
    path = tmp_path / "events"
    path.mkdir()
    return path


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For calling `main` in this process: no launcher to watch, and SIGTERM as it was afterwards."""
    monkeypatch.setattr(latents_worker, "_end_with_launcher", lambda launcher: None)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def arguments(plan: LatentsPlan, events_dir: Path) -> list[str]:
    file = events_dir.parent / "plan.json"
    file.write_text(plan.to_json())
    return [str(file), str(events_dir)]


def events_of(events_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(events_dir.glob("*.jsonl")) for line in file.read_text().splitlines()]


def test_alone_it_encodes_everything(plan: LatentsPlan, events_dir: Path, alone) -> None:
    missing = replace(plan, archives=(*plan.archives, "train/099"))
    assert main(arguments(missing, events_dir)) == 0
    events = events_of(events_dir)
    assert {e["archive"] for e in events if e["event"] == "published"} == set(COUNTS)
    assert [e["archive"] for e in events if e["event"] == "failed"] == ["train/099"]
    assert events[-1] == {"event": "done"}
    assert all(plan.current(archive) for archive in COUNTS)


def test_an_encoder_that_cannot_be_loaded_is_fatal(plan: LatentsPlan, events_dir: Path, alone, capfd) -> None:
    broken = replace(plan, encoders=replace(plan.encoders, vae="/nowhere"))
    assert main(arguments(broken, events_dir)) == 1
    fatal, done = events_of(events_dir)
    assert fatal["event"] == "fatal"
    assert fatal["error"].startswith("the VAE /nowhere cannot be loaded")
    assert "\n" not in fatal["error"]
    assert done == {"event": "done"}
    assert "Traceback" in capfd.readouterr().err


def launched(plan: LatentsPlan, events_dir: Path, processes: int) -> list[str]:
    """The command line of a launch."""
    config = events_dir.parent / "accelerate.yaml"
    config.write_text(ACCELERATE_CONFIG)
    return [*launch_command(processes, config), *arguments(plan, events_dir)]


@pytest.mark.slow
def test_three_processes_share_the_work_and_report_through_pipes(plan: LatentsPlan, events_dir: Path) -> None:
    """Real processes. Together they give the rows that one process gives, and say nothing else on standard error.

    To the bit where the CPU computes with as many threads: their number decides how torch adds up."""
    context, messages = events_dir / "context.json", events_dir / "messages.json"
    fields = dagster_pipes.PipesContextData.__annotations__
    context.write_text(
        json.dumps({**dict.fromkeys(fields), "run_id": "r", "job_name": "j", "retry_number": 0, "extras": {}})
    )
    done = subprocess.run(
        launched(plan, events_dir, 3),
        env={
            **os.environ,
            "DAGSTER_PIPES_CONTEXT": dagster_pipes.encode_param({"path": str(context)}),
            "DAGSTER_PIPES_MESSAGES": dagster_pipes.encode_param({"path": str(messages)}),
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(events_dir.glob("rank-*.jsonl"))) == 3
    sent = [json.loads(line) for line in messages.read_text().splitlines()]
    assert [m["method"] for m in sent] == ["opened", *["report_custom_message"] * len(COUNTS), "closed"]
    published = [m["params"]["payload"] for m in sent[1:-1]]
    assert sorted(e["archive"] for e in published) == sorted(COUNTS)
    assert {e["event"] for e in published} == {"published"}

    alone = replace(plan, encoder_tag="alone", archives=tuple(reversed(plan.archives)), num_workers=0)
    share_cpu(3)
    encode_archives(alone, lambda event: None)
    for archive in COUNTS:  # to the bit: batches of an archive are the same whoever takes it, and when
        assert list(iter_rows(plan.latents_dir.data(archive))) == list(iter_rows(alone.latents_dir.data(archive)))


PROCESSES, BATCH_SIZES = (3, 2, 1), (1, 5, 32)

ONE_OF_SEVERAL = f"""
import os, pathlib, sys, time
from {WORKER} import main

rank, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})  # one thread each, however many there are
for processes in {PROCESSES}:
    for batch_size in {BATCH_SIZES}:
        if rank < processes:
            events = folder / f"{{processes}}x{{batch_size}}"
            (events / f"started-{{rank}}").touch()
            while len(list(events.glob("started-*"))) < processes:
                time.sleep(0.01)
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(processes)
            assert main([str(events.with_suffix(".json")), str(events)]) == 0
"""
"""The encoding process without its launcher, so that three starts do for all numbers of processes."""


@pytest.mark.slow
def test_one_result_for_any_processes_batches_and_order(plan: LatentsPlan, tmp_path: Path) -> None:
    plans = {}
    for name in (f"{processes}x{batch_size}" for processes in PROCESSES for batch_size in BATCH_SIZES):
        archives = tuple(random.Random(name).sample(plan.archives, len(plan.archives)))
        batch_size = int(name.partition("x")[2])
        plans[name] = replace(plan, archives=archives, batch_size=batch_size, num_workers=0, encoder_tag=name)
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").write_text(plans[name].to_json())
    assert len({plan.archives for plan in plans.values()}) > 5
    commands = [[sys.executable, "-c", ONE_OF_SEVERAL, str(rank), str(tmp_path)] for rank in range(3)]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    assert [process.wait(300) for process in started] == [0, 0, 0]

    assert len([log for log in tmp_path.glob("[23]x*/rank-*.jsonl") if '"published"' in log.read_text()]) > 6
    stored = {name: {a: list(iter_rows(plan.latents_dir.data(a))) for a in COUNTS} for name, plan in plans.items()}
    for name, by_archive in stored.items():
        assert by_archive == stored[f"1x{name.partition('x')[2]}"]  # to the bit
        for archive, rows in by_archive.items():
            assert len(rows) == COUNTS[archive]
            assert_same_rows(rows, stored["1x5"][archive])  # other batches: to rounding, see docs/decisions/010


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_one_of_three_killed_ends_the_launch_and_leaves_nothing_half(plan: LatentsPlan, events_dir: Path) -> None:
    big = replace(plan, encoders=replace(plan.encoders, image_resolutions=(512,)), batch_size=1)  # slow enough
    launcher = subprocess.Popen(launched(big, events_dir, 3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(e["event"] == "published" for e in events_of(events_dir)), 200)
        processes = children_of(launcher.pid)
        workers = {process: children_of(process) for process in processes}  # one that still loads has none
        assert len(processes) == 3
        os.kill(max(processes, key=lambda process: len(workers[process])), signal.SIGKILL)
        assert launcher.wait(60) != 0
    finally:
        launcher.kill()
        launcher.wait()
    wait_for(lambda: not any(map(running, processes)), 20)
    ledgers = {archive: big.latents_dir.ledger(archive).exists() for archive in COUNTS}
    assert {archive: big.latents_dir.data(archive).exists() for archive in COUNTS} == ledgers
    assert set(ledgers.values()) == {True, False}

    events: list[dict[str, Any]] = []
    encode_archives(big, events.append)  # at once: orphaned workers, which end by themselves, lock nothing
    assert {e["event"] for e in events} <= {"published", "passed_over", "progress"}
    assert {e["archive"]: e["event"] == "passed_over" for e in events if e["event"] != "progress"} == ledgers
    assert all(big.current(archive) for archive in COUNTS)
    assert [p.name for p in big.latents_dir.path.rglob(".*")] == []
    wait_for(lambda: not any(map(running, itertools.chain(*workers.values()))), 20)


def test_it_ends_with_its_launcher() -> None:
    """`accelerate` does not tell the process that it started when it is terminated itself."""
    child = f"import os, {WORKER} as w; print(os.getpid(), flush=True); w._end_with_launcher(os.getppid())"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        time.sleep(2 * latents_worker.POLL_INTERVAL_S)
        assert running(pid)
        process.kill()
    wait_for(lambda: not running(pid), 10)


def test_terminated_it_sends_its_last_events_and_ends(tmp_path: Path) -> None:
    code = f"""
import json, os, pathlib, signal, time
import {WORKER} as w
w.POLL_INTERVAL_S = 60
with w.Forwarder("jdb", pathlib.Path({str(tmp_path)!r}), 1, lambda e: print(json.dumps(e), flush=True), print) as f:
    signal.signal(signal.SIGTERM, w._Terminator(f))
    w.EventLog(pathlib.Path({str(tmp_path)!r}), 0).append({{"event": "published", "archive": "a"}})
    os.write(1, b"ready\\n")  # print holds a lock that the signal would find held
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert json.loads(process.stdout.read()) == {"event": "published", "archive": "a"}
    assert process.returncode == 128 + signal.SIGTERM


def test_each_archive_is_dealt_once(tmp_path: Path) -> None:
    archives = [str(i) for i in range(400)]
    with ThreadPoolExecutor(4) as pool:
        hands = list(pool.map(lambda _: list(dealt(archives, tmp_path / "dealt")), range(4)))
    assert sorted((a for hand in hands for a in hand), key=int) == archives
    assert all(hand == sorted(hand, key=int) for hand in hands)
    assert list(dealt(archives, tmp_path / "dealt")) == []


def test_events_are_forwarded_in_order_until_all_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_worker, "POLL_INTERVAL_S", 0.01)
    sent: list[dict[str, Any]] = []
    lines: list[str] = []
    progress = {"event": "progress", "archive": "a", "done_images": 1, "total_images": 2, "images_per_s": 1.0}

    def process(rank: int) -> None:
        log = EventLog(tmp_path, rank)
        for number in range(50):
            log.append({"event": "published", "archive": f"{rank}/{number}"})
        log.append(progress)
        log.append({"event": "done"})

    with Forwarder("jdb", tmp_path, 3, sent.append, lines.append) as forwarder:
        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
    for rank in range(3):
        own = [e["archive"] for e in sent if e["archive"].startswith(f"{rank}/")]
        assert own == [f"{rank}/{number}" for number in range(50)]
    assert sent.count(progress) == 3
    assert lines == ["jdb a: 1/2 images, 1.0 images/s, ETA 0:01"] * 3
    assert not forwarder.fatal


def test_a_line_in_the_making_is_left_for_later(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []
    events_path(tmp_path, 0).write_text('{"event": "published", "archive": "a"}\n{"event": "pub')
    forwarder = Forwarder("jdb", tmp_path, 1, sent.append, print)
    forwarder.__enter__()
    forwarder.stop()
    assert [e["archive"] for e in sent] == ["a"]


def test_a_fatal_error_of_any_process_counts(tmp_path: Path) -> None:
    EventLog(tmp_path, 0).append({"event": "done"})
    EventLog(tmp_path, 1).append({"event": "fatal", "error": "no GPU"})
    EventLog(tmp_path, 1).append({"event": "done"})
    with Forwarder("jdb", tmp_path, 2, lambda event: None, print) as forwarder:
        pass
    assert forwarder.fatal


@pytest.mark.parametrize(
    ("done", "total", "rate", "line"),
    [
        (12000, 22000, 310.4, "jdb train/000: 12,000/22,000 images, 310 images/s, ETA 0:32"),
        (100, 2000, 0.25, "jdb train/000: 100/2,000 images, 0.2 images/s, ETA 2:06:40"),
        (100, 2000, 0.0, "jdb train/000: 100/2,000 images, 0.0 images/s"),
    ],
)
def test_progress_for_people(done: int, total: int, rate: float, line: str) -> None:
    event = {"archive": "train/000", "done_images": done, "total_images": total, "images_per_s": rate}
    assert progress_line("jdb", event) == line


@pytest.mark.parametrize(("kept", "most_faults"), [(True, 100), (False, 10**9)])
def test_freed_memory_is_kept_for_the_next_batch(kept: bool, most_faults: int) -> None:
    """A fault is a page that the kernel clears; 50 MB have 12,800."""
    code = f"""
import resource
from {WORKER} import keep_memory
if {kept}:
    keep_memory()
bytearray(50_000_000)  # asked for and freed, as it would be for a batch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    bytearray(50_000_000)[::4096] = bytes(12208)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert faults <= most_faults
    assert kept or faults > 10_000  # what the default costs


def test_it_imports_neither_dagster_nor_torch_by_itself() -> None:
    code = f"import sys, {WORKER}; print([m for m in ('dagster', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
