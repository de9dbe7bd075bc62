"""How fast captions are indexed, how fast one archive's are read, and which of it grows with the table.

Files like upstream's are made up, indexed by the real stage in a new process, and read from archives in random order.
The largest ones stand for themselves: each is compared with a smaller one in the same run.

Here: the measurement. Not here: the index (`storage.captions`), formats (`storage.annotation_rows`).
"""

from __future__ import annotations

import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from md_assets.core.paths import DataRoot
from md_assets.core.source import BytesProgress, RemoteFile
from md_assets.datasets import spec_of
from md_assets.stages.annotations import index_annotations
from md_assets.storage.captions import read_captions, read_numbered_captions

ROWS_PER_PART = 1_000
"""Images in an archive of DiffusionDB."""

TEXTS_PER_ARCHIVE = 11_186
"""Images in an archive of SA-1B on average."""

PROMPT_WORDS, TEXT_WORDS = 22, 80
"""About 130 and 480 characters: a prompt of DiffusionDB, a caption of PixArt-α's LLaVA."""

READS = 100
"""Archives read of each index."""


_T = TypeVar("_T")


@dataclass(frozen=True)
class Figures:
    """One file indexed, and archives read from its index.

    Attributes:
        what: the file, for people.
        rows: of the file.
        source_bytes, index_bytes: size of the file and of its index.
        index_s, index_cpu_s: wall and processor seconds of the stage; on a machine that does other things too, the
            latter tell more.
        peak_mib: the most memory that its process needed, MiB.
        read_rows: captions of one archive.
        read_ms, read_cpu_ms: wall and processor milliseconds of each read, the file opened anew for each.
    """

    what: str
    rows: int
    source_bytes: int
    index_bytes: int
    index_s: float
    index_cpu_s: float
    peak_mib: float
    read_rows: int
    read_ms: tuple[float, ...]
    read_cpu_ms: tuple[float, ...]


def measure(slug: str, rows: int, folder: Path) -> Figures:
    """Make up the captions of `diffdb` or `sa1b`, index them and read some.

    Args:
        slug: which of the two.
        rows: how many; of `diffdb` rounded to whole archives.
        folder: an empty directory, for about 700 bytes a row.
    """
    file = folder / "captions"
    _MAKERS[slug](file, rows)
    command = [sys.executable, "-c", "import sys; from md_assets.bench import captions; captions.index(*sys.argv[1:])"]
    done = subprocess.run([*command, slug, str(file), str(rows)], check=True, capture_output=True, text=True)
    return Figures(**json.loads(done.stdout))


def index(slug: str, file_name: str, rows: str) -> None:
    """Index a file of captions beside it, read some, and print the figures: what the measuring process does."""
    file = Path(file_name)
    spec, root = spec_of(slug), DataRoot(file.parent / "data")
    (source,) = spec.annotations
    remote = RemoteFile(file.name, "", None, None, "made-up", "")
    (ledger, index_s, index_cpu_s) = _timed(
        lambda: index_annotations(spec, source, remote, root, fetcher=_Linking(file)).ledger
    )
    reads = [_timed(read) for read in _reads(slug, root.annotations(slug).data(source.name), int(rows))]
    what = {"diffdb": "rows of parquet", "sa1b": "texts of a tar.gz"}[slug]
    figures = Figures(
        what=what,
        rows=ledger.kept,
        source_bytes=file.stat().st_size,
        index_bytes=ledger.bytes_out,
        index_s=index_s,
        index_cpu_s=index_cpu_s,
        peak_mib=_peak_mib(),
        read_rows=max(count for count, _, _ in reads),
        read_ms=tuple(1000 * wall_s for _, wall_s, _ in reads),
        read_cpu_ms=tuple(1000 * cpu_s for _, _, cpu_s in reads),
    )
    print(json.dumps(asdict(figures)))


def _timed(do: Callable[[], _T]) -> tuple[_T, float, float]:
    """What it returns, its wall seconds and its processor seconds."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = do()
    return result, time.perf_counter() - wall_s, time.process_time() - cpu_s


def _reads(slug: str, path: Path, rows: int) -> Iterator[Callable[[], int]]:
    """Functions that read an archive's captions and tell how many."""
    choose = random.Random(0)
    for _ in range(READS):
        if slug == "diffdb":
            archive = f"part-{choose.randrange(rows // ROWS_PER_PART) + 1:06}"
            yield lambda archive=archive: len(read_captions(path, archive))  # type: ignore[misc]
        else:
            first = choose.randrange(max(rows - TEXTS_PER_ARCHIVE, 1))
            last = first + TEXTS_PER_ARCHIVE - 1
            yield lambda first=first, last=last: sum(1 for _ in read_numbered_captions(path, first, last))  # type: ignore[misc]


class _Linking:
    """A source whose only file is here already."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> RemoteFile:
        os.link(self._file, destination)
        return remote


def _peak_mib() -> float:
    # Not ru_maxrss, which a child inherits from its parent.
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) / 1024


def _sentences(count: int, words: int) -> list[str]:
    choose = random.Random(words)
    vocabulary = ["".join(choose.choices("abcdefghijklmnoprstuvwy", k=choose.randint(2, 9))) for _ in range(8_000)]
    return [" ".join(choose.choices(vocabulary, k=words)) for _ in range(count)]


def _make_parquet(path: Path, rows: int) -> None:
    """Like `metadata-large.parquet`, its 13 columns (Hub dataset `poloclub/diffusiondb`), in random order."""
    prompts = pa.array(_sentences(100_000, PROMPT_WORDS))
    numbers = np.random.default_rng(0)
    order = numbers.permutation(rows // ROWS_PER_PART * ROWS_PER_PART).astype(np.int32)
    writer = None
    for start in range(0, len(order), 100_000):
        parts = order[start : start + 100_000] // ROWS_PER_PART + 1
        count = len(parts)
        digits = numbers.bytes(16 * count).hex()
        names = [f"{digits[i : i + 8]}-{digits[i + 8 : i + 32]}.webp" for i in range(0, 32 * count, 32)]
        nsfw = numbers.random((2, count), dtype=np.float32)
        nsfw[:, ::97] = np.nan
        table = pa.table(
            {
                "image_name": names,
                "prompt": prompts.take(pa.array(numbers.integers(0, len(prompts), count))),
                "part_id": parts.astype(np.uint16),
                "seed": numbers.integers(0, 2**32, count, dtype=np.uint32),
                "step": np.full(count, 50, np.uint16),
                "cfg": np.full(count, 7, np.float32),
                "sampler": np.full(count, 8, np.uint8),
                "width": np.full(count, 512, np.uint16),
                "height": np.full(count, 512, np.uint16),
                "user_name": [f"{n:064x}" for n in numbers.integers(0, 10_000, count).tolist()],
                "timestamp": pa.array(numbers.integers(1_659_000_000, 1_661_000_000, count), pa.timestamp("s", "UTC")),
                "image_nsfw": nsfw[0],
                "prompt_nsfw": nsfw[1],
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def _make_texts(path: Path, rows: int) -> None:
    """Like `SA1B_caption.tar.gz`: `sa_N.txt` each, in random order."""
    sentences = [sentence.encode() for sentence in _sentences(20_000, TEXT_WORDS)]
    order = np.random.default_rng(0).permutation(rows)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for number in order.tolist():
            info = tarfile.TarInfo(f"sa_{number}.txt")
            text = sentences[number % len(sentences)]
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
            tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header


_MAKERS: dict[str, Callable[[Path, int], None]] = {"diffdb": _make_parquet, "sa1b": _make_texts}


def measure_all(rows: Sequence[int], texts: Sequence[int], folder: Path | None) -> Iterator[Figures]:
    """Each size in turn, in a temporary directory below `folder` that is removed after it."""
    for slug, sizes in (("diffdb", rows), ("sa1b", texts)):
        for size in sizes:
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                yield measure(slug, size, Path(temporary))


def report(figures: Figures) -> str:
    """The result in one line of text."""
    return (
        f"{figures.rows:,} {figures.what} ({figures.source_bytes / 1e6:,.0f} MB) indexed in {figures.index_s:.1f} s, "
        f"{figures.index_cpu_s:.1f} s of it computing ({figures.rows / figures.index_s:,.0f} rows/s), with "
        f"{figures.peak_mib:,.0f} MiB of memory; the index has {figures.index_bytes / 1e6:,.0f} MB; the "
        f"{figures.read_rows:,} captions of an archive are read in {statistics.median(figures.read_ms):.1f} ms, "
        f"{statistics.median(figures.read_cpu_ms):.1f} ms of it computing (medians of {len(figures.read_ms)}, worst "
        f"{max(figures.read_ms):.1f} and {max(figures.read_cpu_ms):.1f} ms)"
    )
