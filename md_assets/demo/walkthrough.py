"""The demo: materializes the miniatures of all datasets through Dagster, and opens the UI on what it made.

Here: the order of the steps, and running them. Not here: the folder and the sources (`demo.sandbox`), what a step does:
every one is an ordinary Dagster run of the ordinary assets.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from md_assets.core.errors import MdAssetsError, SettingsError
from md_assets.core.paths import DataRoot
from md_assets.core.settings import DEFAULT_TEXT_ENCODER, DEFAULT_VAE
from md_assets.core.spec import DatasetSpec
from md_assets.datasets import spec_of
from md_assets.demo.sandbox import MINIATURES, Sandbox, environment_variables

if TYPE_CHECKING:
    import dagster as dg

DEFAULT_FOLDER = "demo_data"

BY_HAND = "valid/000"
"""JourneyDB's archive that the demo leaves for the reader to materialize in the UI."""

Range = tuple[str, str]
"""The first and the last of neighbouring partitions."""

RANGES: Mapping[str, Range] = {
    **{slug: (miniature.archives[0], miniature.archives[-1]) for slug, miniature in MINIATURES.items()},
    "jdb": ("train/000", "train/001"),
}
"""Partitions that the demo materializes, by dataset. One range for each: an encoding process takes long to start."""


def archives_of_demo(slug: str) -> tuple[str, ...]:
    """The archives of `RANGES`."""
    archives, (first, last) = spec_of(slug).archives, RANGES[slug]
    return archives[archives.index(first) : archives.index(last) + 1]


def steps(spec: DatasetSpec) -> Iterator[tuple[str, Range | None]]:
    """Assets of a dataset in the order in which they are materialized, each with its range; None: no partitions."""
    partitions = RANGES[spec.slug]
    yield "archive", None
    if spec.annotations:
        yield "annotations", None
    for name in ("raw", "mds", "latents"):
        yield name, partitions
    for name in ("mds", "latents"):
        yield f"{name}_index", None
    for subset in spec.subsets:
        for name in (f"mds_{subset.name}", f"latents_{subset.name}"):
            yield name, partitions
            yield f"{name}_index", None
    for name in dict.fromkeys(extra.asset for extra in spec.raw_only):
        yield name, None


_RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
"""The runs' logs are for the UI; the terminal gets a line for each run."""


def run_demo(folder: Path) -> int:
    """Materialize the miniatures; a second time, find everything done.

    Args:
        folder: of the sandbox.

    Returns: 0 when everything is published and its checks passed, else 1.
    """
    from md_assets.stages.status import stage_dirs
    from md_assets.terminal import print_archives

    started = time.monotonic()
    sandbox = Sandbox(folder.absolute())
    print(f"demo in {folder}: writing miniatures of {len(MINIATURES)} datasets and two tiny encoders …", flush=True)
    sandbox.prepare()
    with sandbox.served() as environment, environment_variables(environment):
        print(f"a Hub that serves them answers at {environment['HF_ENDPOINT']}, a web server beside it", flush=True)
        done, passed_over = _materialize()
        samples = samples_of_an_epoch(sandbox.data)
    for slug in MINIATURES:
        print_archives(spec_of(slug), stage_dirs(sandbox.data, spec_of(slug)))
    shares = ", ".join(f"{slug} {count}" for slug, count in samples.items())
    print(f"\nThe training loader mixes all of them: {sum(samples.values())} samples in an epoch, {shares}.")
    if done == 0:
        print(f"Nothing was done twice: all {passed_over} archive stages had been published before.")
    print(f"Done in {time.monotonic() - started:.0f} s. {done} archive stages published, {passed_over} passed over.")
    print(f"\nSee it in Dagster's UI, with the sources answering; jdb {BY_HAND} is left for you to materialize:\n")
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
    """Serve the sources and Dagster's UI on a sandbox until interrupted.

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
    with sandbox.served() as environment:
        command = [sys.executable, "-m", "dagster", "dev", "-m", "md_assets.definitions", "-p", str(port)]
        print(f"Dagster's UI: http://127.0.0.1:{port}/asset-groups (Ctrl-C ends it and the sources)", flush=True)
        # A session of its own: Ctrl-C in the terminal reaches `dagster dev` only through us, once.
        process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
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
    """Run all steps, with a line for each dataset; returns how many archive stages were published and passed over.

    Raises:
        MdAssetsError: a run failed.
    """
    import dagster as dg

    published = passed_over = 0
    with dg.DagsterInstance.get() as instance:
        for slug in MINIATURES:
            print(f"  {slug}:", end="", flush=True)
            for name, partition_range in steps(spec_of(slug)):
                started = time.monotonic()
                result = materialize(instance, f"{slug}/{name}", partition_range)
                if not result.success:
                    print()
                    raise MdAssetsError(f"{slug}/{name} failed: {failure_of(result)}", "See the run in the UI")
                for event in result.get_asset_materialization_events():
                    if event.partition is not None:
                        over = event.materialization.metadata["passed_over"].value
                        passed_over += bool(over)
                        published += not over
                print(f" {name} {time.monotonic() - started:.1f} s", end="", flush=True)
            print()
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


def latents_directories(data: DataRoot) -> Mapping[str, Sequence[Path]]:
    """The directories of latents that a training config names, by dataset; splits of which nothing is done left out."""
    from md_assets.core.encoder_tag import encoder_tag

    tag = encoder_tag(DEFAULT_VAE, DEFAULT_TEXT_ENCODER)
    indexes = {slug: map(data.latents(slug, tag).index, spec_of(slug).splits or ("",)) for slug in MINIATURES}
    return {slug: [index.parent for index in paths if index.exists()] for slug, paths in indexes.items()}


def samples_of_an_epoch(data: DataRoot) -> dict[str, int]:
    """Samples of each dataset that the training loader gives in one epoch over all of them."""
    from md_assets.loader import build_latents_dataloader

    streams = [directory for directories in latents_directories(data).values() for directory in directories]
    loader = build_latents_dataloader(
        streams, batch_size=16, image_size=512, drop_last=False, num_workers=0, with_keys=True
    )
    seen = Counter(_dataset_of(key) for batch in loader for key in batch["key"])
    return {slug: seen[slug] for slug in MINIATURES}


def _dataset_of(key: str) -> str:
    """The miniature that a sample is of; the archives' IDs of no two are alike."""
    (slug,) = (s for s, m in MINIATURES.items() if any(key.startswith(f"{archive}/") for archive in m.archives))
    return slug
