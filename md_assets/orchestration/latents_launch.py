"""Starting the encoding processes of a run and recording what they publish, while they run.

Here: the launch through `accelerate` and Dagster Pipes, and their end. Not here: what the processes do
(`orchestration.latents_worker`, `stages.latents`).
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.pipes.context import build_external_execution_context_data

from md_assets.core.errors import ArchiveError
from md_assets.orchestration.archive_run import ArchiveRun
from md_assets.orchestration.latents_worker import Tail
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.stages.once import Outcome
from md_assets.storage.child_process import die_with_parent

WORKER_MODULE = "md_assets.orchestration.latents_worker"

ACCELERATE_CONFIG = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\n"
"""Given to the launcher so that it does not take the user's own default, which may ask for DeepSpeed or FSDP."""

WAIT_POLICY, SPINS_VARIABLE, SPINS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "10000"
"""How long torch's threads wait for each other awake before they sleep: long enough for an idle machine, and on one
that others use so short that they do not take the cores from whom they wait for (decisions/019). libgomp's own is
300,000."""

POLL_S, MESSAGES_POLL_S = 0.2, 0.05
"""Seconds between two looks at the processes, and at the file of their messages."""

TERMINATION_GRACE_S = 10.0
"""Seconds that the processes have to end by themselves before they are killed."""


def encode(
    context: dg.AssetExecutionContext,
    run: ArchiveRun,
    plan: LatentsPlan,
    num_processes: int,
    hub_environment: Mapping[str, str],
) -> None:
    """Encode the archives of `plan` in processes of their own, and record each as soon as it is published.

    Args:
        context, run: of the asset.
        plan: what to encode.
        num_processes: ≥ 1.
        hub_environment: variables that lead the processes to the same Hub as this run.

    Raises:
        dg.Failure: the processes did not work at all, e.g. because an encoder cannot be loaded.
    """
    with (
        tempfile.TemporaryDirectory(prefix="md_assets-latents-") as folder,
        _pipes_session(context, Path(folder, "messages")) as session,
    ):
        plan_path, events_dir = Path(folder, "plan.json"), Path(folder, "events")
        plan_path.write_text(plan.to_json(), encoding="utf-8")
        events_dir.mkdir()
        events = _Events(run, plan)
        config_path = Path(folder, "accelerate.yaml")
        config_path.write_text(ACCELERATE_CONFIG, encoding="utf-8")
        command = [*launch_command(num_processes, config_path), str(plan_path), str(events_dir)]
        environment = {**waiting_environment(os.environ), **hub_environment, **session.get_bootstrap_env_vars()}
        with _launched(command, environment) as process:
            while process.poll() is None:
                events.take(session.get_custom_messages())
                time.sleep(POLL_S)
    # Leaving the session reads the messages to their end, so nothing that was published goes unrecorded.
    events.take(session.get_custom_messages())
    if events.fatal:
        raise dg.Failure(f"No latents were encoded: {events.fatal}", allow_retries=False)
    for archive in events.unaccounted():
        if events.find(archive):
            continue
        error = ArchiveError(
            plan.dataset,
            archive,
            f"its encoding process ended (exit code {process.returncode}) before the archive was done",
            "Look at the run's stderr (out of memory?) and run it again",
            reason="process_died",
        )
        run.fail(error)


def launch_command(num_processes: int, config: Path) -> list[str]:
    """The command line that starts the encoding processes, to be followed by their arguments.

    Args:
        num_processes: ≥ 1.
        config: a file with `ACCELERATE_CONFIG`.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if num_processes > 1:
        command += ["--multi_gpu", "--main_process_port", "0"]  # torchrun, at any free port; works on CPUs alike
    else:
        command += ["--quiet"]  # the worker has said what was wrong; the launcher's own traceback adds nothing
    return [*command, "--num_processes", str(num_processes), "--module", WORKER_MODULE]


def waiting_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with those by which torch's threads wait for each other, unless they are there."""
    own = {} if WAIT_POLICY in environment else {SPINS_VARIABLE: SPINS}
    return {**own, **environment}


class _Events:
    """Takes the worker's events once each."""

    def __init__(self, run: ArchiveRun, plan: LatentsPlan) -> None:
        self._run = run
        self._plan = plan
        self._taken = 0
        self._accounted: set[str] = set()
        self.fatal = ""

    def take(self, messages: Any) -> None:
        for event in messages[self._taken :]:
            self._taken += 1
            self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        kind, archive = event["event"], event.get("archive", "")
        if kind in ("published", "passed_over"):
            self._accounted.add(archive)
            try:
                if not self._record(archive, kind == "passed_over", _picture(event)):
                    raise ArchiveError(
                        self._plan.dataset, archive, "was replaced by another run", "Run it again", reason="stale"
                    )
            except ArchiveError as error:
                self._run.fail(error)
        elif kind == "failed":
            self._accounted.add(archive)
            what = event["error"].removeprefix(f"{self._plan.dataset} {archive}: ")
            self._run.fail(
                ArchiveError(
                    self._plan.dataset, archive, what, reason=event["reason"], transient=event.get("transient", False)
                )
            )
        elif kind == "waiting":
            self._run.waiting(archive)
        elif kind == "fatal":
            self.fatal = event["error"]

    def unaccounted(self) -> list[str]:
        return [archive for archive in self._plan.archives if archive not in self._accounted]

    def find(self, archive: str) -> bool:
        """Record an archive that is published although nobody said so, as its process was killed before it could."""
        try:
            return self._record(archive, passed_over=True, picture={})
        except ArchiveError:
            return False

    def _record(self, archive: str, passed_over: bool, picture: Mapping[str, dg.MetadataValue]) -> bool:
        """Record what the ledger says; returns whether there is one, with the settings and inputs of now."""
        ledger = self._plan.current(archive)
        if ledger is not None:
            self._run.record(Outcome(ledger, passed_over=passed_over), picture)
        return ledger is not None


def _picture(event: Mapping[str, Any]) -> dict[str, dg.MetadataValue]:
    """What the VAE's decoder makes of some of an archive's latents, beside the pictures that they were made of."""
    uri = event.get("picture")
    return {"crop_and_decoded": dg.MetadataValue.md(f"![crop, decoded, crop, decoded]({uri})")} if uri else {}


@contextmanager
def _launched(command: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The launcher's process, ended when the block is left early or this process dies.

    The encoding processes end with their launcher. They stay in this process's group, so that a signal to the group
    reaches all of them.
    """
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(TERMINATION_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class WholeMessages(dg.PipesFileMessageReader):
    """Dagster's reader of a file of messages, which takes a message once its line is whole.

    Dagster's own (1.13) reads as far as the writer has come. Half a message ends its thread, and nothing that follows
    is read; a message with a picture is longer than what is written at once.
    """

    def _reader_thread(self, handler: Any, is_resource_complete: threading.Event) -> None:
        tail = Tail(Path(self._path))
        ended = False
        try:
            while not ended:
                ended = is_resource_complete.wait(MESSAGES_POLL_S)  # what was written until then is read
                for message in tail.new_events():
                    handler.handle_message(message)
        except Exception:
            handler.report_pipes_framework_exception("reader of messages", sys.exc_info())
            raise


@contextmanager
def _pipes_session(context: dg.AssetExecutionContext, messages: Path) -> Iterator[dg.PipesSession]:
    """A Pipes session for a run that records its archives itself, over a file of messages.

    `dg.open_pipes_session` insists that the step yields a result for the asset, which in a ranged run would record
    every partition of the range; this one is made of the same parts without that.
    """
    handler = dg.PipesMessageHandler(context, WholeMessages(str(messages)))
    context_data = build_external_execution_context_data(context, None)
    with (
        dg.PipesTempFileContextInjector().inject_context(context_data) as injector_params,
        handler.handle_messages() as reader_params,
    ):
        yield dg.PipesSession(
            context_data=context_data,
            message_handler=handler,
            context_injector_params=injector_params,
            message_reader_params=reader_params,
            context=context,
        )
