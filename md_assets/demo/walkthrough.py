"""The demo: materializes the miniature JourneyDB through Dagster, and opens the UI on what it made.

Here: the sandbox (folders, environment, Hub, encoders) and the order of the steps. Not here: what a step does; every
one is an ordinary Dagster run of the ordinary assets.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from md_assets.core.errors import MdAssetsError, SettingsError
from md_assets.core.paths import DATA_ROOT_VARIABLE, DataRoot
from md_assets.core.settings import DEFAULT_TEXT_ENCODER, DEFAULT_VAE
from md_assets.datasets import spec_of
from md_assets.demo.journeydb import ARCHIVES, SAMPLES_PER_ARCHIVE, write_miniature_journeydb
from md_assets.demo.loopback_hub import LoopbackHub

if TYPE_CHECKING:
    import dagster as dg

DATASET = "jdb"
DEFAULT_FOLDER = "demo_data"

BY_HAND = ARCHIVES[-1]
"""The archive that the demo leaves for the reader to materialize in the UI."""

STEPS: Sequence[tuple[str, tuple[str, str] | None]] = (
    ("archive", None),
    ("annotations", None),
    ("raw", ("train/000", "train/001")),
    ("raw", ("valid/000", "valid/000")),
    ("mds", ("train/000", "train/001")),
    ("mds", ("valid/000", "valid/000")),
    ("latents", ("train/000", "train/001")),
    ("latents", ("valid/000", "valid/000")),
    ("mds_index", None),
    ("latents_index", None),
)
"""Asset and range of partitions (first, last) of each run, in order."""


_RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""The runs' logs are for the UI; the terminal gets a line for each run."""


@dataclass(frozen=True)
class Sandbox:
    """The demo's own folder: sources, encoders, data and Dagster's records; nothing outside it is written.

    Attributes:
        path: absolute.
    """

    path: Path

    @property
    def hub_root(self) -> Path:
        return self.path / "hub"

    @property
    def data(self) -> DataRoot:
        return DataRoot(self.path / "datadir")

    @property
    def _vae(self) -> Path:
        # Folders called like the real repositories: a mirror, so its latents lie where training configs look.
        return self.path / "models" / DEFAULT_VAE

    @property
    def _text_encoder(self) -> Path:
        return self.path / "models" / DEFAULT_TEXT_ENCODER.rpartition(":")[2]

    def prepare(self, samples: int = SAMPLES_PER_ARCHIVE, size_px: int = 1024) -> None:
        """Write the sources and the encoders, unless they are there; see `journeydb.miniature_archive`."""
        from md_assets.demo.tiny_encoders import write_tiny_open_clip, write_tiny_vae

        self.dagster_home.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(__file__).with_name("dagster.yaml"), self.dagster_home / "dagster.yaml")
        write_miniature_journeydb(self.hub_root, samples=samples, size_px=size_px)
        for folder, write in ((self._vae, write_tiny_vae), (self._text_encoder, write_tiny_open_clip)):
            if not folder.exists():
                unfinished = folder.with_name(f".{folder.name}.new")
                shutil.rmtree(unfinished, ignore_errors=True)
                write(unfinished)
                unfinished.rename(folder)

    @property
    def dagster_home(self) -> Path:
        return self.path / "dagster_home"

    def environment(self, endpoint: str) -> dict[str, str]:
        """What the demo's processes need to find each other."""
        return {
            DATA_ROOT_VARIABLE: str(self.data.path),
            "DAGSTER_HOME": str(self.dagster_home),
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(self.path / "hf_home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "MD_ASSETS_VAE": str(self._vae),
            "MD_ASSETS_TEXT_ENCODER": f"openclip:local-dir:{self._text_encoder}",
        }


def run_demo(folder: Path) -> int:
    """Materialize the miniature JourneyDB; a second time, find everything done.

    Args:
        folder: of the sandbox.

    Returns: 0 when everything is published and its checks passed, else 1.
    """
    from md_assets.stages.status import stage_dirs
    from md_assets.terminal import print_archives

    started = time.monotonic()
    sandbox = Sandbox(folder.absolute())
    print(f"demo in {folder}: writing a miniature JourneyDB and two tiny encoders …", flush=True)
    sandbox.prepare()
    with LoopbackHub(sandbox.hub_root) as hub, environment_variables(sandbox.environment(hub.endpoint)):
        print(f"a Hub that serves it answers at {hub.endpoint}", flush=True)
        done, passed_over = _materialize()
        samples = _samples_seen_by_loader(sandbox.data)
    print_archives(spec_of(DATASET), stage_dirs(sandbox.data, DATASET))
    print(f"\nThe training loader sees {samples} samples in an epoch over train and valid.")
    if done == 0:
        print(f"Nothing was done twice: all {passed_over} archive stages had been published before.")
    print(f"Done in {time.monotonic() - started:.0f} s. {done} archive stages published, {passed_over} passed over.")
    print(f"\nSee it in Dagster's UI, with the Hub answering; {BY_HAND} is left for you to materialize:\n")
    print(f"    {ui_command(folder)}\n")
    return 0


def ui_command(folder: Path) -> str:
    """What to type here to open the UI on a sandbox."""
    program = Path(sys.argv[0])
    if shutil.which(program.name) == str(program):
        command = program.name
    else:  # an environment that is not activated
        command = str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)
    return f"{command} demo --ui" + ("" if folder == Path(DEFAULT_FOLDER) else f" --folder {folder}")


def run_ui(folder: Path, port: int) -> int:
    """Serve the Hub and Dagster's UI on a sandbox until interrupted.

    Args:
        folder: of the sandbox; sources and encoders are written if they are not there.
        port: of the UI.

    Returns: the exit code of `dagster dev`, 0 after Ctrl-C.
    """
    _refuse_taken(port)
    sandbox = Sandbox(folder.absolute())
    sandbox.prepare()
    process: subprocess.Popen[bytes] | None = None
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        if process is not None:
            process.send_signal(signal.SIGINT)

    # Before `dagster dev` starts: it would inherit an ignored SIGINT, which shells give to background jobs.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with LoopbackHub(sandbox.hub_root) as hub:
        command = [sys.executable, "-m", "dagster", "dev", "-m", "md_assets.definitions", "-p", str(port)]
        print(f"Dagster's UI: http://127.0.0.1:{port}/asset-groups (Ctrl-C ends it and the Hub)", flush=True)
        environment = {**os.environ, **sandbox.environment(hub.endpoint)}
        # A session of its own: Ctrl-C in the terminal reaches `dagster dev` only through us, once.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        code = process.wait()
        return 0 if interrupted else code


def _refuse_taken(port: int) -> None:
    """Say that a port is taken before Dagster's services have started."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SettingsError(
                f"port {port} cannot be used for the UI: {error.strerror}", "Choose another one with --port"
            ) from error


def _materialize() -> tuple[int, int]:
    """Run all steps; returns how many archive stages were published and how many passed over.

    Raises:
        MdAssetsError: a run failed.
    """
    import dagster as dg

    published = passed_over = 0
    with dg.DagsterInstance.get() as instance:
        for name, partition_range in STEPS:
            label = f"{DATASET}/{name}" + (f" {' … '.join(dict.fromkeys(partition_range))}" if partition_range else "")
            started = time.monotonic()
            result = materialize(instance, f"{DATASET}/{name}", partition_range)
            if not result.success:
                raise MdAssetsError(f"{label} failed: {failure_of(result)}", "See the run in the UI")
            for event in result.get_asset_materialization_events():
                if event.partition is not None:
                    over = event.materialization.metadata["passed_over"].value
                    passed_over += bool(over)
                    published += not over
            print(f"  {label}  {time.monotonic() - started:.1f} s", flush=True)
    return published, passed_over


def materialize(
    instance: dg.DagsterInstance,
    asset: str,
    partition_range: tuple[str, str] | None = None,
    resources: Mapping[str, Mapping[str, object]] | None = None,
) -> dg.ExecuteInProcessResult:
    """Run one asset in this process, as a run of `instance` like any other.

    Args:
        asset: its key, e.g. `jdb/raw`.
        partition_range: first and last partition; None for an asset without partitions.
        resources: fields of resources that differ from their defaults, e.g. `{"images": {"jpeg_quality": 90}}`.
    """
    import dagster as dg

    from md_assets.definitions import defs

    job = defs.resolve_implicit_global_asset_job_def()
    run_config = {**_QUIET, "resources": {name: {"config": fields} for name, fields in (resources or {}).items()}}
    return job.get_subset(asset_selection={dg.AssetKey(asset.split("/"))}).execute_in_process(
        instance=instance,
        tags=dict(zip(_RANGE_TAGS, partition_range, strict=True)) if partition_range else {},
        run_config=run_config,
        raise_on_error=False,
    )


def failure_of(result: dg.ExecuteInProcessResult) -> str:
    """What a failed run says."""
    for event in result.get_step_failure_events():
        data = event.step_failure_data
        if data.user_failure_data and data.user_failure_data.description:
            return data.user_failure_data.description
        if data.error:
            return data.error.message.strip()
    return "unknown"


def _samples_seen_by_loader(data: DataRoot) -> int:
    """Samples that the training loader gives in one epoch over both splits' merged indexes."""
    from md_assets.core.encoder_tag import encoder_tag
    from md_assets.loader import build_latents_dataloader

    latents = data.latents(DATASET, encoder_tag(DEFAULT_VAE, DEFAULT_TEXT_ENCODER)).path
    splits = [latents / split for split in spec_of(DATASET).splits]
    loader = build_latents_dataloader(splits, batch_size=16, image_size=512, drop_last=False, num_workers=0)
    return sum(len(batch["image_latents"]) for batch in loader)


@contextmanager
def environment_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the time of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
