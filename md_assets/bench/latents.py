"""How fast latents are made, against the limit of the models alone and against the reference's loop.

Three ways are measured in turn, several times, on the same synthesized archives and models of the real architectures
with random weights (as fast as trained ones, and nothing needs to be fetched), after a small archive has gone all three
of them:
- stage: `stages.latents.encode_archives`, from its first archive to the last ledger; loading models is left out;
- limit: the models on batches that lie ready in memory;
- reference: one DataLoader with PIL transforms, `vae.encode` under autocast, `.cpu()` and writing, batch by batch.

Here: the measurement. Not here: its models and archives (`bench.latents_inputs`), the reference's loop
(`bench.latents_reference`), the stage (`stages.latents`).
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from md_assets.bench.latents_inputs import ARCHITECTURES, publish_mds, write_text, write_vae
from md_assets.bench.latents_reference import Speed, Stopwatch, reference_speed
from md_assets.core.errors import SettingsError
from md_assets.core.paths import DataRoot
from md_assets.core.settings import EncoderSettings, ImageSettings, mds_settings
from md_assets.datasets import spec_of
from md_assets.orchestration.latents_worker import keep_memory
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.storage.child_process import die_with_parent
from md_assets.storage.mds import read_index

if TYPE_CHECKING:
    from md_assets.encoders.batches import Batch
    from md_assets.encoders.bundle import Encoders

DATASET = "jdb"

WAYS = ("stage", "limit", "reference")

WARM_UP = "train/199"
"""An archive of one batch."""

PACKAGES = ("torch", "diffusers", "open_clip_torch")
"""Whose versions decide the speed."""

UTILIZATION_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Conditions:
    """What is measured.

    Attributes:
        models: a key of `ARCHITECTURES`.
        archives, images: how many archives of how many images each.
        resolutions_px, batch_size, num_workers, device: as in the settings of the same names.
        model_dtype: of the models; the reference's loop runs under autocast to it, or without where it is float32.
        rounds: how often each way is measured.
        price_per_hour: of the device, in any currency; None for no costs in the report.
    """

    models: str
    archives: int = 2
    images: int = 64
    resolutions_px: tuple[int, ...] = (256, 512)
    batch_size: int = 32
    num_workers: int = 2
    device: str = "auto"
    model_dtype: str = "bfloat16"
    rounds: int = 3
    price_per_hour: float | None = None

    @property
    def total(self) -> int:
        return self.archives * self.images


@dataclass
class Speeds:
    """Images per second of each way, one number for each round, and what the stage took of the machine.

    Attributes:
        device: its name.
        cpu_s: way -> seconds of processor time for an image, workers included, one number for each round. On a CPU they
            say what a way costs, whatever else runs there; they do not tell waiting.
        gpu_utilization: mean of the driver's figure during the stage, 0–1; None on a CPU.
        peak_bytes: of device memory that the stage took, its models included; on a CPU of this process's memory at any
            time.
    """

    device: str
    stage: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    gpu_utilization: float | None = None
    peak_bytes: int = 0

    def add(self, way: str, speed: Speed) -> None:
        """Another round of one way."""
        getattr(self, way).append(speed.images_per_s)
        self.cpu_s.setdefault(way, []).append(speed.cpu_s)

    def ratio(self, of: str) -> float:
        """The stage's speed over another's; the median of the rounds."""
        others: list[float] = getattr(self, of)
        return statistics.median(ours / other for ours, other in zip(self.stage, others, strict=True))

    def cpu_ratio(self, of: str) -> float:
        """The same by processor time."""
        times = zip(self.cpu_s["stage"], self.cpu_s[of], strict=True)
        return statistics.median(other / ours for ours, other in times)


def conditions_here(**given: Any) -> Conditions:
    """`Conditions` with defaults for this machine where None is given.

    Raises:
        SettingsError: there are no such models, or a number is not positive.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    automatic: dict[str, Any] = {
        "models": "default" if has_gpu else "mid",
        "model_dtype": "bfloat16" if has_gpu else "float32",  # as the stage takes it
        "num_workers": len(os.sched_getaffinity(0)),
        "price_per_hour": None,
    }
    chosen: dict[str, Any] = {name: automatic[name] if value is None else value for name, value in given.items()}
    conditions = Conditions(**{**chosen, "resolutions_px": tuple(chosen.get("resolutions_px", (256, 512)))})
    if conditions.models not in ARCHITECTURES:
        raise SettingsError(f"there are no models {conditions.models!r}", f"Use one of {', '.join(ARCHITECTURES)}.")
    if min(conditions.archives, conditions.images, conditions.batch_size, conditions.rounds) < 1:
        raise SettingsError("archives, images, batch size and rounds must be positive", "Give at least 1 of each.")
    if conditions.price_per_hour is not None and not conditions.price_per_hour > 0:
        raise SettingsError(f"a price of {conditions.price_per_hour} is not positive", "Leave it out, or correct it.")
    return conditions


def measure(conditions: Conditions, say: Callable[[str], None] = lambda line: None) -> Speeds:
    """Make archives and models in a temporary folder, and measure the three ways in turn.

    Args:
        conditions: see there.
        say: takes a line of text after each round.
    """
    import torch

    from md_assets.encoders.bundle import Encoders

    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="md_assets-bench-") as folder,
        # in a process of its own: the memory of this one is managed as an encoding process's
        ProcessPoolExecutor(1, spawn, die_with_parent) as reference,
    ):
        plan = _prepared(Path(folder), conditions)
        encoders = Encoders.load(plan.encoders, plan.device)
        has_gpu = encoders.device.type == "cuda"
        if not has_gpu:
            keep_memory()
        ready = _ready_batch(plan, encoders)
        speeds = Speeds(torch.cuda.get_device_name(encoders.device) if has_gpu else _processor())
        for number in range(conditions.rounds + 1):
            of_round, images = (plan, conditions.total) if number else (_warm_up(plan), conditions.batch_size)
            slow = reference.submit(reference_speed, of_round, str(encoders.device), images).result()
            limit = _limit(encoders, ready, images)
            if has_gpu:
                torch.cuda.reset_peak_memory_stats(encoders.device)
                before_bytes = torch.cuda.memory_allocated(encoders.device)
            with _watched(has_gpu) as watched:
                fast = _stage(of_round, number, images)
            if has_gpu:
                speeds.peak_bytes = torch.cuda.max_memory_allocated(encoders.device) - before_bytes
                torch.cuda.empty_cache()  # room for the reference's process
            if number:
                for way, speed in zip(WAYS, (fast, limit, slow), strict=True):
                    speeds.add(way, speed)
                speeds.gpu_utilization = statistics.mean(watched) if watched else None
                each = [f"{way} {s.images_per_s:.2f}" for way, s in zip(WAYS, (fast, limit, slow), strict=True)]
                say(f"round {number}: {', '.join(each)} images/s")
        if not has_gpu:
            speeds.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return speeds


def report(conditions: Conditions, speeds: Speeds) -> str:
    """The result as text."""
    sizes = " and ".join(map(str, conditions.resolutions_px))
    utilization = "" if speeds.gpu_utilization is None else f"GPU utilization {speeds.gpu_utilization:.0%}, "
    median = {way: statistics.median(getattr(speeds, way)) for way in WAYS}
    cpu = ""
    if speeds.gpu_utilization is None:
        of = {way: statistics.median(speeds.cpu_s[way]) * 1e3 for way in WAYS}
        cpu = (
            f"\n  by processor time: {of['stage']:.0f}, {of['limit']:.0f} and {of['reference']:.0f} ms an image; "
            f"{speeds.cpu_ratio('limit'):.2f} of the limit, {speeds.cpu_ratio('reference'):.2f} times the reference"
        )
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    cost = (
        ""
        if conditions.price_per_hour is None
        else (
            f"\n  at {conditions.price_per_hour:g} an hour, a million images cost "
            f"{conditions.price_per_hour * 1e6 / 3600 / median['stage']:,.2f} by the stage, "
            f"{conditions.price_per_hour * 1e6 / 3600 / median['reference']:,.2f} by the reference's loop"
        )
    )
    return (
        f"{conditions.models} models in {conditions.model_dtype} on {speeds.device}, {conditions.total} images at "
        f"{sizes} px, batches of {conditions.batch_size}, {conditions.num_workers} workers, medians of "
        f"{conditions.rounds} rounds, {versions}:\n"
        f"  stage      {median['stage']:8.2f} images/s ({utilization}peak memory {speeds.peak_bytes / 2**30:.1f} GiB)\n"
        f"  limit      {median['limit']:8.2f} images/s; the stage reaches {speeds.ratio('limit'):.2f} of it\n"
        f"  reference  {median['reference']:8.2f} images/s; the stage is {speeds.ratio('reference'):.2f} times as fast"
        f"{cpu}{cost}"
    )


def _processor() -> str:
    """The name of the CPU and how many cores of it this process may use."""
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = found[0].partition(":")[2].strip() if found else "a CPU"
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def _stage(plan: LatentsPlan, number: int, images: int) -> Speed:
    clocks: list[Stopwatch] = []

    def archives() -> Iterator[str]:
        clocks.append(Stopwatch())  # models are loaded when the first archive is taken
        yield from plan.archives

    events: list[dict[str, Any]] = []
    encode_archives(replace(plan, encoder_tag=f"round{number}"), events.append, archives())
    speed = clocks[0].speed(images)
    assert sum(event.get("rows", 0) for event in events if event["event"] == "published") == images
    return speed


def _limit(encoders: Encoders, ready: Batch, images: int) -> Speed:
    times = -(-images // len(ready))
    clock = Stopwatch()
    for encoded in [encoders.encode(ready) for _ in range(times)]:
        encoded.not_finite()  # waits for the device
    return clock.speed(times * len(ready))


def _ready_batch(plan: LatentsPlan, encoders: Encoders) -> Batch:
    from md_assets.encoders.batches import Batch, PreparedBatches, RowAddress

    (shard, *_) = read_index(plan.mds_dir.data(plan.archives[0]))
    addresses = [RowAddress(plan.archives[0], shard, row) for row in range(min(plan.batch_size, shard.rows))]
    batch = PreparedBatches(encoders.preparation)[addresses]
    assert isinstance(batch, Batch)
    return batch.pin_memory() if encoders.device.type == "cuda" else batch


def _warm_up(plan: LatentsPlan) -> LatentsPlan:
    """The plan for the small archive."""
    return replace(plan, archives=(WARM_UP,))


def _prepared(folder: Path, conditions: Conditions) -> LatentsPlan:
    """Models and published mds archives, and a plan to encode them."""
    architecture = ARCHITECTURES[conditions.models]
    settings = mds_settings(spec_of(DATASET), ImageSettings())
    root = DataRoot(folder / "data")
    archives = tuple(f"train/{number:03}" for number in range(conditions.archives))
    for archive in archives:
        publish_mds(root, DATASET, archive, conditions.images, settings)
    publish_mds(root, DATASET, WARM_UP, conditions.batch_size, settings)
    encoders = EncoderSettings(
        vae=str(write_vae(folder / "vae", architecture)),
        text_encoder=f"openclip:local-dir:{write_text(folder / 'text', architecture)}",
        vae_revision="random",
        text_encoder_revision="random",
        image_resolutions=conditions.resolutions_px,
        model_dtype=conditions.model_dtype,
    )
    return LatentsPlan(
        str(root.path),
        DATASET,
        archives,
        settings,
        encoders,
        "round",
        conditions.batch_size,
        conditions.num_workers,
        conditions.device,
    )


@contextmanager
def _watched(has_gpu: bool) -> Iterator[list[float]]:
    """The driver's figure of how busy this process's first GPU is, 0–1, while the block runs."""
    seen: list[float] = []
    stop = threading.Event()
    gpu = (os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]

    def watch() -> None:
        while not stop.wait(UTILIZATION_INTERVAL_S):
            try:
                said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError):
                return
            seen.append(int(said) / 100)

    thread = threading.Thread(target=watch, daemon=True)
    if has_gpu:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        if has_gpu:
            thread.join()
