"""How fast images get from an archive into MDS shards, against the reference's way.

Both ways run in turn on the same synthesized archives (`bench.synthetic_archives`), in a pool of as many processes as
cores, to which everything is held:
- ours: `stages.raw.fetch_archive` (the archive is linked instead of downloaded) and `stages.mds.convert_archive`;
- reference: `bench.reference`, one archive a process.
What is stored is then compared with the whole source picture, resized by Pillow's bicubic filter and never encoded. The
limit is decoding, at the scale that is chosen, and encoding alone, in one process.

Here: the measurement. Not here: the archives, the reference's steps.
"""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from md_assets.bench import reference
from md_assets.bench.synthetic_archives import SOURCES, make_archive
from md_assets.core.errors import MdAssetsError, SettingsError
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings
from md_assets.core.source import BytesProgress, RemoteFile
from md_assets.core.spec import DatasetSpec, Member, Sample, SampleReader
from md_assets.datasets import spec_of
from md_assets.stages.mds import convert_archive
from md_assets.stages.raw import fetch_archive
from md_assets.storage.archives import iter_members
from md_assets.storage.image_pool import ImagePool
from md_assets.storage.images import FORMATS, decode, encode_jpeg, stored_size
from md_assets.storage.mds import iter_rows

IMAGES = {"jdb": 600, "sa1b": 200, "diffdb": 200, "cc12m": 1500}
"""Images in an archive: so many that a way takes about ten seconds, and that what an archive costs once weighs little,
as it does in the sources' archives of 1,000 to 22,000."""

TARGETS = {"jdb": 3.5, "sa1b": 3.0, "diffdb": 3.0, "cc12m": 3.0}
"""What the ratio should be at least, per core."""

COMPARED_IMAGES = 24
"""Images of which the stored pixels are compared."""

MEMORY_IMAGES = 10_000
"""Images that pass while the pool's memory is looked at."""

SETTINGS = ImageSettings()


@dataclass(frozen=True)
class Way:
    """One of the two ways, in the order of the rounds.

    Attributes:
        wall_s, cpu_s: seconds of each round; of the clock, and of all processes that took part together.
        stored_bytes: of an image, on average.
        psnr_db: of each image that was resized, against the lossless resize.
    """

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]
    stored_bytes: float
    psnr_db: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """What came of one dataset.

    Attributes:
        images: in all archives of a round.
        workers: processes, each on a core of its own.
        source_bytes: of an image upstream, on average.
        same_quality_db: PSNR of the lossless resize, encoded at our quality, image by image.
        limit_s: seconds of one core for decoding and encoding alone, an image.
    """

    dataset: str
    images: int
    workers: int
    source_bytes: float
    ours: Way
    reference: Way
    same_quality_db: tuple[float, ...]
    limit_s: float

    @property
    def ratio(self) -> float:
        """How many times as fast ours is by the clock: the median of the rounds."""
        return _median_ratio(self.reference.wall_s, self.ours.wall_s)

    @property
    def cpu_ratio(self) -> float:
        """How many times less processor time ours takes; does not change with what else runs on the machine."""
        return _median_ratio(self.reference.cpu_s, self.ours.cpu_s)

    def per_core(self, way: Way) -> float:
        """Images per second and core, median of the rounds."""
        return statistics.median(self.images / (seconds * self.workers) for seconds in way.wall_s)

    def as_json(self) -> dict[str, Any]:
        """Everything, measured and derived."""
        derived = {"ratio": self.ratio, "cpu_ratio": self.cpu_ratio, "target": TARGETS[self.dataset]}
        for name, way in (("ours", self.ours), ("reference", self.reference)):
            derived[f"{name}_images_per_s_and_core"] = self.per_core(way)
        return {**dataclasses.asdict(self), **derived}


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def compare(dataset: str, images: int, workers: int, rounds: int) -> Comparison:
    """Run both ways `rounds` times in turn, after one round that does not count.

    Args:
        dataset: a key of `SOURCES`.
        images: in each archive; 0 for the default of the dataset.
        workers: processes and archives; everything is held to as many cores.

    Raises:
        SettingsError: there is no such dataset here, or there are fewer cores.
    """
    if dataset not in SOURCES:
        raise SettingsError(f"{dataset} has no image bench", f"Choose one of {', '.join(SOURCES)}.")
    images = images or IMAGES[dataset]
    spec = _bench_spec(dataset)
    with held_to_cores(workers), tempfile.TemporaryDirectory(prefix="md_assets-bench-") as folder:
        archives = []
        for number, archive in enumerate(spec.archives[:workers]):
            archives.append(Path(folder) / f"{archive.replace('/', '-')}.{SOURCES[dataset].container}")
            make_archive(SOURCES[dataset], archives[-1], images, number)
        root, works = Path(folder) / "ours", [Path(folder) / f"reference-{number}" for number in range(workers)]
        with ImagePool(workers) as pool, _reference_pool(workers) as executor:

            def ours() -> None:
                for archive, path in zip(spec.archives, archives, strict=False):
                    _our_way(spec, archive, path, DataRoot(root), pool)

            def theirs() -> None:
                list(executor.map(reference.convert, [dataset] * workers, archives, works))

            seconds = [(_timed(ours, root), _timed(theirs, *works)) for _ in range(rounds + 1)][1:]
            ours()
            theirs()
        rows = {row["caption"]: row["jpg"] for row in iter_rows(root / dataset / "mds" / spec.archives[0])}
        their_rows = {row["caption"]: row["jpg"] for row in iter_rows(works[0] / "mds")}
        sources = {Path(m.name).stem: m.data for m in _images(dataset, archives[0])}
        if rows.keys() != their_rows.keys():
            raise MdAssetsError(f"the two ways kept different images of {dataset}", "Report it")
        resized = [name for name in sorted(rows) if rows[name] != sources[name]][:COMPARED_IMAGES]
        lossless = {name: _lossless(sources[name]) for name in resized}

        def way(index: int, stored: dict[str, bytes]) -> Way:
            return Way(
                wall_s=tuple(both[index][0] for both in seconds),
                cpu_s=tuple(both[index][1] for both in seconds),
                stored_bytes=statistics.mean(map(len, stored.values())),
                psnr_db=tuple(_psnr_db(stored[name], lossless[name]) for name in resized),
            )

        return Comparison(
            dataset=dataset,
            images=images * workers,
            workers=workers,
            source_bytes=statistics.mean(map(len, sources.values())),
            ours=way(0, rows),
            reference=way(1, their_rows),
            same_quality_db=tuple(
                _psnr_db(encode_jpeg(picture, SETTINGS.jpeg_quality), picture) for picture in lossless.values()
            ),
            limit_s=_limit_s(list(sources.values()), [rows.get(name) for name in sources]),
        )


def _our_way(spec: DatasetSpec, archive: str, path: Path, root: DataRoot, pool: ImagePool) -> None:
    remote = RemoteFile(path.name, path.as_uri(), path.stat().st_size, None, path.name, "")
    fetch_archive(spec, archive, lambda: remote, root, SETTINGS, fetcher=_Link(), pool=pool)
    convert_archive(spec, archive, root, SETTINGS)


def _bench_spec(dataset: str) -> DatasetSpec:
    """The dataset with captions that need no annotations: the names of the images."""
    spec = spec_of(dataset)

    def named(read: SampleReader) -> SampleReader:
        def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Any]:
            for sample in read(archive, members):
                if isinstance(sample, Sample):
                    yield dataclasses.replace(sample, caption=sample.key.rpartition("/")[2])

        return read_samples

    return dataclasses.replace(
        spec, read_samples=named(spec.read_samples), annotations=(), caption_cleaning="", subsets=()
    )


class _Link:
    """Stands in for the download: a second name of the file, so that it costs nothing."""

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> RemoteFile:
        os.link(remote.url.removeprefix("file://"), destination)
        return remote


@contextmanager
def _reference_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, reference.load) as executor:
        yield executor


@contextmanager
def held_to_cores(count: int) -> Iterator[None]:
    """This process, and those that it starts meanwhile, on the last `count` of its cores.

    Raises:
        SettingsError: it has fewer.
    """
    cores = os.sched_getaffinity(0)
    if not 1 <= count <= len(cores):
        raise SettingsError(f"{count} workers on {len(cores)} cores measure nothing", "Choose 1 to as many as cores.")
    os.sched_setaffinity(0, sorted(cores)[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _timed(run: Callable[[], None], *folders: Path) -> tuple[float, float]:
    """Seconds of the clock and of all processes, in folders that are empty at the start."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    started_s, started_cpu_s = time.perf_counter(), _cpu_s()
    run()
    result = time.perf_counter() - started_s, _cpu_s() - started_cpu_s
    for folder in folders:
        shutil.rmtree(folder)
    return result


def _cpu_s() -> float:
    """Processor time of this process, its pools' and the programs that they ran to the end."""
    ticks = 0
    for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))  # proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _images(dataset: str, archive: Path) -> Iterator[Member]:
    for member in iter_members(archive, spec_of(dataset).archive_format, SETTINGS.max_member_bytes):
        if member.name.endswith((".jpg", ".webp")):
            yield member


def _lossless(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    return picture.resize(stored_size(*picture.size, SETTINGS.max_image_size), Image.Resampling.BICUBIC)


def _psnr_db(jpeg: bytes, picture: Image.Image) -> float:
    stored = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), np.float32)
    return float(10 * np.log10(255**2 / np.mean((stored - np.asarray(picture)) ** 2)))


def _limit_s(sources: Sequence[bytes], stored: Sequence[bytes | None]) -> float:
    """Seconds of an image for decoding, and for encoding what is stored anew; rejected images cost nothing."""
    pictures = [Image.open(io.BytesIO(jpeg)).convert("RGB") if jpeg else None for jpeg in stored]
    started_s = time.process_time()
    for data, jpeg, picture in zip(sources, stored, pictures, strict=True):
        if picture is None:
            continue
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if jpeg == data:
                decode(data, image, (1, 1))
            else:
                decode(data, image, (2 * picture.width, 2 * picture.height))
                encode_jpeg(picture, SETTINGS.jpeg_quality)
    return (time.process_time() - started_s) / len(sources)


def report(result: Comparison) -> str:
    """The result in some lines of text."""

    def line(name: str, way: Way) -> str:
        cpu_ms = 1000 * statistics.median(way.cpu_s) / result.images
        return (
            f"  {name:9} {result.per_core(way):6.1f} images/s per core, {cpu_ms:5.1f} ms of CPU an image, "
            f"{way.stored_bytes / 1000:.0f} kB stored, PSNR {_db(way.psnr_db)}"
        )

    limit = result.per_core(result.ours) * result.limit_s
    return "\n".join(
        [
            f"{result.dataset}: {result.images} images of {result.source_bytes / 1000:.0f} kB, {result.workers} "
            f"worker(s), {len(result.ours.wall_s)} rounds",
            line("reference", result.reference),
            line("ours", result.ours),
            f"  ratio {result.ratio:.2f} by the clock, {result.cpu_ratio:.2f} by processor time (target "
            f"{TARGETS[result.dataset]}); same quality on the lossless resize: PSNR {_db(result.same_quality_db)}; "
            f"{limit:.0%} of the limit of {1 / result.limit_s:.0f} images/s",
        ]
    )


def _db(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f} dB, worst {min(values):.2f}"


def memory_mib(images: int, workers: int, every: int = 1000) -> list[tuple[int, int]]:
    """Memory of the pool and its parent while small images pass: (images done, MiB that no other process shares).

    Args:
        images: how many, of 256 to 700 px.
        workers: of the pool.
        every: images between two looks.
    """
    source = dataclasses.replace(SOURCES["cc12m"], width=700, height=700, least_edge_px=256)
    with tempfile.TemporaryDirectory(prefix="md_assets-bench-") as folder:
        archive = Path(folder) / "small.tar"
        make_archive(source, archive, 40, seed=0)
        pictures = [member.data for member in _images("cc12m", archive)]
    looks = []
    with ImagePool(workers) as pool:
        samples = (Sample(str(number), pictures[number % len(pictures)]) for number in range(images))
        for done, _ in enumerate(pool.prepare(samples, SETTINGS), start=1):
            if done % every == 0:
                pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
                looks.append((done, sum(_private_kib(pid) for pid in pids) // 1024))
    return looks


def _private_kib(pid: int | None) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def report_memory(looks: Sequence[tuple[int, int]]) -> str:
    """The result in one line of text."""
    return "memory of pool and parent, MiB: " + ", ".join(f"{mib} after {done}" for done, mib in looks)


def run(dataset: str, images: int, workers: int, rounds: int, memory: bool, json: bool) -> Iterator[str]:
    """What `md-assets bench images` prints, dataset by dataset; see there for the arguments."""
    results = []
    for one in SOURCES if dataset == "all" else [dataset]:
        results.append(compare(one, images, workers, rounds))
        if not json:
            yield report(results[-1])
    looks = memory_mib(MEMORY_IMAGES, workers) if memory else []
    if json:
        yield dumps({"datasets": [result.as_json() for result in results], "memory_mib": looks}, indent=2)
    elif memory:
        yield report_memory(looks)
