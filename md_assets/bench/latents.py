"""How fast latents are made, against the limit of the models alone and against the reference's loop.

Three ways are measured in turn, several times, on the same synthesized archives and models of the real architectures
with random weights (as fast as trained ones, and nothing needs to be fetched):
- stage: `stages.latents.encode_archives`, from its first archive to the last ledger; loading models is left out;
- limit: the models on batches that lie ready in memory;
- reference: one DataLoader with PIL transforms, `vae.encode` under autocast, `.cpu()` and writing, batch by batch.

Here: the measurement. Not here: its models and archives (`bench.latents_inputs`), the stage (`stages.latents`).
"""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from md_assets.bench.latents_inputs import ARCHITECTURES, publish_mds, write_text, write_vae
from md_assets.core.errors import SettingsError
from md_assets.core.paths import DataRoot
from md_assets.core.schema import latents_columns
from md_assets.core.settings import EncoderSettings, ImageSettings, mds_settings
from md_assets.datasets import spec_of
from md_assets.orchestration.latents_worker import keep_memory
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.storage.mds import Shard, ShardReader, ShardWriter, read_index

if TYPE_CHECKING:
    from md_assets.encoders.batches import Batch
    from md_assets.encoders.bundle import Encoders

DATASET = "jdb"

UTILIZATION_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Conditions:
    """What is measured.

    Attributes:
        models: a key of `ARCHITECTURES`.
        archives, images: how many archives of how many images each.
        resolutions_px, batch_size, num_workers, device, model_dtype: as in the settings of the same names. The
            reference's loop runs under autocast to `model_dtype`.
        rounds: how often each way is measured.
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

    @property
    def total(self) -> int:
        return self.archives * self.images


@dataclass
class Speeds:
    """Images per second of each way, one number for each round, and what the stage took of the machine.

    Attributes:
        device: its name.
        gpu_utilization: mean of the driver's figure during the stage, 0–1; None on a CPU.
        peak_bytes: of device memory during the stage, on a CPU of this process's memory at any time.
    """

    device: str
    stage: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    gpu_utilization: float | None = None
    peak_bytes: int = 0

    def ratio(self, of: str) -> float:
        """The stage's speed over another's; the median of the rounds."""
        others: list[float] = getattr(self, of)
        return statistics.median(ours / other for ours, other in zip(self.stage, others, strict=True))


def conditions_here(**given: Any) -> Conditions:
    """`Conditions` with defaults for this machine where None is given.

    Raises:
        SettingsError: there are no such models, or a number is not positive.
    """
    import torch

    automatic: dict[str, Any] = {
        "models": "default" if torch.cuda.is_available() else "mid",
        "num_workers": len(os.sched_getaffinity(0)),
    }
    chosen: dict[str, Any] = {name: automatic[name] if value is None else value for name, value in given.items()}
    conditions = Conditions(**chosen)
    if conditions.models not in ARCHITECTURES:
        raise SettingsError(f"there are no models {conditions.models!r}", f"Use one of {', '.join(ARCHITECTURES)}.")
    if min(conditions.archives, conditions.images, conditions.batch_size, conditions.rounds) < 1:
        raise SettingsError("archives, images, batch size and rounds must be positive", "Give at least 1 of each.")
    return conditions


def measure(conditions: Conditions) -> Speeds:
    """Make archives and models in a temporary folder, and measure the three ways in turn."""
    import torch

    from md_assets.encoders.bundle import Encoders

    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="md_assets-bench-") as folder,
        # in a process of its own: the memory of this one is managed as an encoding process's
        ProcessPoolExecutor(1, mp_context=spawn) as reference,
    ):
        plan = _prepared(Path(folder), conditions)
        encoders = Encoders.load(plan.encoders, plan.device)
        has_gpu = encoders.device.type == "cuda"
        if not has_gpu:
            keep_memory()
        ready = _ready_batch(plan, encoders)
        speeds = Speeds(torch.cuda.get_device_name(encoders.device) if has_gpu else str(encoders.device))
        for number in range(conditions.rounds + 1):
            slow = reference.submit(_reference, plan, str(encoders.device), conditions.total).result()
            limit = _limit(encoders, ready, conditions.total)
            with _watched(has_gpu) as watched:
                fast = _stage(plan, number, conditions.total)
            if has_gpu:
                speeds.peak_bytes = torch.cuda.max_memory_reserved(encoders.device)
                torch.cuda.empty_cache()  # room for the reference's process
            if number:  # the first round warms up caches and kernels
                speeds.limit.append(limit)
                speeds.reference.append(slow)
                speeds.stage.append(fast)
                speeds.gpu_utilization = statistics.mean(watched) if watched else None
        if not has_gpu:
            speeds.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return speeds


def report(conditions: Conditions, speeds: Speeds) -> str:
    """The result as text."""
    sizes = " and ".join(map(str, conditions.resolutions_px))
    utilization = "" if speeds.gpu_utilization is None else f"GPU utilization {speeds.gpu_utilization:.0%}, "
    median = {way: statistics.median(getattr(speeds, way)) for way in ("stage", "limit", "reference")}
    return (
        f"{conditions.models} models in {conditions.model_dtype} on {speeds.device}, {conditions.total} images at "
        f"{sizes} px, batches of {conditions.batch_size}, {conditions.num_workers} workers, medians of "
        f"{conditions.rounds} rounds:\n"
        f"  stage      {median['stage']:8.2f} images/s ({utilization}peak memory {speeds.peak_bytes / 2**30:.1f} GiB)\n"
        f"  limit      {median['limit']:8.2f} images/s; the stage reaches {speeds.ratio('limit'):.2f} of it\n"
        f"  reference  {median['reference']:8.2f} images/s; the stage is {speeds.ratio('reference'):.2f} times as fast"
    )


def _stage(plan: LatentsPlan, number: int, images: int) -> float:
    started: list[float] = []

    def archives() -> Iterator[str]:
        started.append(time.perf_counter())  # models are loaded when the first archive is taken
        yield from plan.archives

    events: list[dict[str, Any]] = []
    this_round = LatentsPlan(**{**vars(plan), "encoder_tag": f"round{number}"})
    encode_archives(this_round, events.append, archives())
    ended = time.perf_counter()
    assert sum(event.get("rows", 0) for event in events if event["event"] == "published") == images
    return images / (ended - started[0])


def _limit(encoders: Encoders, ready: Batch, images: int) -> float:
    times = -(-images // len(ready))
    started = time.perf_counter()
    for encoded in [encoders.encode(ready) for _ in range(times)]:
        encoded.rejected()  # waits for the device
    return times * len(ready) / (time.perf_counter() - started)


def _ready_batch(plan: LatentsPlan, encoders: Encoders) -> Batch:
    from md_assets.encoders.batches import Batch, PreparedBatches, RowAddress

    (shard, *_) = read_index(plan.mds_dir.data(plan.archives[0]))
    addresses = [RowAddress(plan.archives[0], shard, row) for row in range(min(plan.batch_size, shard.rows))]
    batch = PreparedBatches(encoders.preparation)[addresses]
    assert isinstance(batch, Batch)
    return batch.pin_memory() if encoders.device.type == "cuda" else batch


_loops: dict[str, _ReferenceLoop] = {}


def _reference(plan: LatentsPlan, device: str, images: int) -> float:
    """The speed of the reference's loop in this process, which keeps its models for the next call."""
    import torch

    if device not in _loops:
        _loops[device] = _ReferenceLoop(plan, torch.device(device))
    speed = _loops[device].images_per_s(images)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return speed


class _ReferenceLoop:
    """The reference's way on the same models: everything of a batch one after the other."""

    def __init__(self, plan: LatentsPlan, device: Any) -> None:
        import open_clip
        from diffusers import AutoencoderKL

        self._plan, self._device = plan, device
        self._vae = AutoencoderKL.from_pretrained(plan.encoders.vae, subfolder="vae").to(device).eval()
        name = plan.encoders.text_encoder.removeprefix("openclip:")
        self._text = open_clip.create_model(name).to(device).eval()
        self._tokenize = open_clip.get_tokenizer(name)

    def images_per_s(self, images: int) -> float:
        import torch
        from torch.utils.data import DataLoader

        plan, settings = self._plan, self._plan.encoders
        dtype = getattr(torch, settings.model_dtype)
        autocast = torch.autocast(self._device.type, dtype=dtype, enabled=dtype != torch.float32)
        shards = [shard for archive in plan.archives for shard in read_index(plan.mds_dir.data(archive))]
        rows: Any = _ReferenceRows(shards, settings.image_resolutions, self._tokenize)
        columns = latents_columns(settings.image_resolutions, save_images=False)
        with tempfile.TemporaryDirectory() as out, ShardWriter(Path(out, "shards"), columns) as writer:
            started = time.perf_counter()
            for batch in DataLoader(rows, batch_size=plan.batch_size, num_workers=plan.num_workers):
                with torch.no_grad(), autocast:
                    arrays = {"caption_latents": self._states(batch["tokens"].to(self._device)).half().cpu().numpy()}
                    for px in settings.image_resolutions:
                        latents = self._vae.encode(batch[f"image_{px}"].to(self._device)).latent_dist.sample()
                        latents = latents * self._vae.config.scaling_factor
                        arrays[f"latents_{px}"] = latents.half().cpu().numpy()
                for i, key in enumerate(batch["key"]):
                    stored = {column: array[i].tobytes() for column, array in arrays.items()}
                    sizes = {column: int(batch[column][i]) for column in ("width", "height")}
                    writer.write({"key": key, "caption": batch["caption"][i], **sizes, **stored})
        return images / (time.perf_counter() - started)

    def _states(self, tokens_BL: Any) -> Any:
        text = self._text
        x_BLD = text.token_embedding(tokens_BL) + text.positional_embedding
        return text.ln_final(text.transformer(x_BLD, attn_mask=text.attn_mask))


class _ReferenceRows:
    """Rows with their images as torchvision's transforms make them of PIL images."""

    def __init__(self, shards: Sequence[Shard], resolutions_px: Sequence[int], tokenize: Any) -> None:
        from torchvision import transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        self._transforms = {
            px: transforms.Compose(
                [
                    transforms.Resize(px, interpolation=bicubic),
                    transforms.CenterCrop(px),
                    transforms.ToTensor(),
                    transforms.Normalize([0.5], [0.5]),
                ]
            )
            for px in resolutions_px
        }
        self._addresses = [(shard, row) for shard in shards for row in range(shard.rows)]
        self._tokenize = tokenize

    def __len__(self) -> int:
        return len(self._addresses)

    def __getitem__(self, number: int) -> dict[str, Any]:
        from PIL import Image

        shard, row = self._addresses[number]
        values = ShardReader(shard)[row]
        image = Image.open(io.BytesIO(values.pop("jpg"))).convert("RGB")
        values |= {f"image_{px}": transform(image) for px, transform in self._transforms.items()}
        return {**values, "tokens": self._tokenize([values["caption"]])[0]}


def _prepared(folder: Path, conditions: Conditions) -> LatentsPlan:
    """Models and published mds archives, and a plan to encode them."""
    architecture = ARCHITECTURES[conditions.models]
    settings = mds_settings(spec_of(DATASET), ImageSettings())
    root = DataRoot(folder / "data")
    archives = tuple(f"train/{number:03}" for number in range(conditions.archives))
    for archive in archives:
        publish_mds(root, DATASET, archive, conditions.images, settings)
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
