"""The process that encodes, started by `accelerate launch --module md_assets.orchestration.latents_worker`.

Usage: latents_worker PLAN EVENTS. PLAN is a file with a `LatentsPlan` as JSON; EVENTS is a new, empty directory
that all processes of this launch share. In it
- `rank-<N>.jsonl` takes the events of process N (`stages.latents.Report`), one JSON object per line; besides those
  of the stage `{"event": "fatal", "error": …}` for an error that concerns the whole run, and `{"event": "done"}`
  as the last line of each;
- `dealt` counts the archives that were given out. Each is given to one process of the launch, once.

Process 0 reads all the events and sends them on to Dagster through Pipes, and progress as log lines; it ends last.
Without Pipes log lines go to standard output.

Exit code 0 when all archives were dealt with, though some may have failed; 1 after a fatal error.

Here: this process. Not here: Dagster, which must not be imported here, and the work itself (`stages.latents`).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from md_assets.core.errors import MdAssetsError, one_line
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan

Event = dict[str, Any]

POLL_INTERVAL_S = 0.5
"""Between two looks for new events, and for the launcher still being there."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""

LAST_EVENTS_S = 2.0
"""How long a terminated process may take to send its last events; a launcher kills after 30 s (torch elastic)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Encode the archives of a plan together with the other processes of this launch.

    Args:
        argv: the two arguments, see the module.

    Returns: the exit code.
    """
    plan_file, events_dir = map(Path, sys.argv[1:] if argv is None else argv)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    plan = LatentsPlan.from_json(plan_file.read_text(encoding="utf-8"))
    log = EventLog(events_dir, rank)
    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    with ExitStack() as stack:
        forwarder = None
        if rank == 0:
            forwarder = stack.enter_context(Forwarder(plan.dataset, events_dir, world, *_receivers(stack)))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _Terminator(forwarder))
        try:
            _encode(plan, log, dealt(plan.archives, events_dir / "dealt"))
        except Exception as error:
            traceback.print_exc()
            what = str(error) if isinstance(error, MdAssetsError) else f"{type(error).__name__}: {error}"
            log.append({"event": "fatal", "error": one_line(what)})
        finally:
            log.append({"event": "done"})
    # A launcher ends all processes as soon as one exits with an error, so only the last one to end does.
    return 1 if forwarder is not None and forwarder.fatal else 0


def _encode(plan: LatentsPlan, log: EventLog, archives: Iterator[str]) -> None:
    from md_assets.encoders.bundle import pick_device, share_cpu

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    share_cpu(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = pick_device(plan.device, local_rank)
    if device.type == "cpu":
        keep_memory()
    encode_archives(replace(plan, device=str(device)), log.append, archives)


def keep_memory() -> None:
    """Have this process keep freed memory instead of giving it back to the kernel; without glibc, do nothing.

    Activations on a CPU are tens of megabytes each. By default each is mapped anew, and the kernel clears it page by
    page, which takes a quarter to a third of an encoder's time (see docs/benchmarks.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def dealt(archives: Sequence[str], counter: Path) -> Iterator[str]:
    """The archives that fall to this process: all processes that share `counter` together get each once, in order.

    An archive that failed is not dealt again, so it is not tried once per process.
    """
    while True:
        with counter.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            turn = int(file.read() or 0)
            if turn >= len(archives):
                return
            file.truncate(0)
            file.write(str(turn + 1))
        yield archives[turn]


class EventLog:
    """The events of one process, as lines of a file; may be used from several threads."""

    def __init__(self, events_dir: Path, rank: int) -> None:
        self._path = events_path(events_dir, rank)
        self._lock = threading.Lock()

    def append(self, event: Event) -> None:
        """Write one event, so that a reader sees all of it or nothing."""
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")


def events_path(events_dir: Path, rank: int) -> Path:
    """Where process `rank` writes its events."""
    return events_dir / f"rank-{rank}.jsonl"


class Forwarder:
    """A thread that sends on the events of all processes, those of each in order, until each is done.

    Args:
        dataset: how log lines call it.
        events_dir: where events are written.
        world: number of processes.
        send: takes every event.
        log: takes a line of text for each progress event.

    Attributes:
        fatal: whether a process reported an error that concerns the whole run.

    A context manager; leaving it normally waits until all processes are done.
    """

    def __init__(
        self, dataset: str, events_dir: Path, world: int, send: Callable[[Event], None], log: Callable[[str], None]
    ) -> None:
        self.fatal = False
        self._dataset, self._send, self._log = dataset, send, log
        self._tails = [Tail(events_path(events_dir, rank)) for rank in range(world)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="forwards-events", daemon=True)

    def __enter__(self) -> Forwarder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._thread.join()
        else:
            self.stop()

    def stop(self) -> None:
        """Send what is there now, then end."""
        self._stop.set()
        self._thread.join(LAST_EVENTS_S)

    def _run(self) -> None:
        done = 0
        while done < len(self._tails):
            stopping = self._stop.wait(POLL_INTERVAL_S)
            for tail in self._tails:
                for event in tail.new_events():
                    done += event["event"] == "done"
                    self._forward(event)
            if stopping:
                return

    def _forward(self, event: Event) -> None:
        self.fatal |= event["event"] == "fatal"
        if event["event"] == "progress":
            self._log(progress_line(self._dataset, event))
        if event["event"] != "done":
            self._send(event)


class Tail:
    """Reads a growing file of JSON lines; a line counts once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new_events(self) -> list[Event]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            whole_lines, newline, _ = file.read().rpartition(b"\n")
        self._position += len(whole_lines) + len(newline)
        return [json.loads(line) for line in whole_lines.splitlines()]


def progress_line(dataset: str, event: Event) -> str:
    """A progress event for people: `jdb train/000: 12,000/22,000 images, 310 images/s, ETA 0:32`."""
    done, total, rate = event["done_images"], event["total_images"], event["images_per_s"]
    line = f"{dataset} {event['archive']}: {done:,}/{total:,} images, {rate:,.{0 if rate >= 10 else 1}f} images/s"
    if rate > 0:
        minutes, seconds = divmod(round((total - done) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        line += f", ETA {hours}:{minutes:02}:{seconds:02}" if hours else f", ETA {minutes}:{seconds:02}"
    return line


def _receivers(stack: ExitStack) -> tuple[Callable[[Event], None], Callable[[str], None]]:
    """What takes events and log lines: Dagster where it started this process, else nobody and standard output."""
    from dagster_pipes import PipesEnvVarParamsLoader, open_dagster_pipes

    if not PipesEnvVarParamsLoader().is_dagster_pipes_process():
        return lambda event: None, lambda line: print(line, flush=True)
    pipes = stack.enter_context(open_dagster_pipes())
    return pipes.report_custom_message, pipes.log.info


class _Terminator:
    """What SIGTERM does: send the last events and end at once; the kernel gives the held archives free.

    A process that is waited for in a model's kernel would take long to unwind, and has nothing to save.
    """

    def __init__(self, forwarder: Forwarder | None) -> None:
        self._forwarder = forwarder

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._forwarder is not None:
            self._forwarder.stop()
        os._exit(128 + number)


def _end_with_launcher(launcher: int) -> None:
    """End this process when its launcher has ended; `accelerate` does not pass on the signal that ended it."""
    while os.getppid() == launcher:
        time.sleep(POLL_INTERVAL_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
