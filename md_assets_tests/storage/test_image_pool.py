"""The pool: results in order from any number of processes, and nothing left over when something dies."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from md_assets.core.errors import MdAssetsError
from md_assets.core.settings import ImageSettings
from md_assets.core.spec import Rejected, Sample
from md_assets.storage import image_pool
from md_assets.storage.image_pool import BATCH_IMAGES, BATCHES_IN_FLIGHT_PER_WORKER, ImagePool, Prepared
from md_assets_tests.storage.made_images import encoded, photo

SETTINGS = ImageSettings(min_image_size=32, max_image_size=48)


def sample(number: int, edge_px: int = 60) -> Sample:
    """Pictures that take longer the smaller their number, so that processes finish out of order."""
    edge_px += 1500 // (number + 1)
    pixels = np.random.default_rng(number).integers(0, 256, (edge_px, edge_px, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return Sample(f"train/000/{number:03}", file.getvalue(), caption=f"picture {number}")


SAMPLES: list[Sample | Rejected] = [sample(number) for number in range(24)]
SAMPLES[5:5] = [Rejected("train/000/link", "unsafe_member"), Rejected("train/000/big", "too_large")]
SAMPLES[9:9] = [Sample("train/000/broken", b"broken"), Sample("train/000/empty", b"")]
SAMPLES.append(Rejected("train/000/last", "duplicate_key"))


@pytest.fixture(scope="module")
def pool() -> Iterator[ImagePool]:
    with ImagePool(2) as pool:
        yield pool


def keys(prepared: list[Prepared]) -> list[str]:
    return [p.key if isinstance(p, Rejected) else p[0].key for p in prepared]


def worker_pids(pool: ImagePool) -> list[int]:
    assert pool._executor is not None
    return list(pool._executor._processes)


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which nobody waits for in a container, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pids: list[int], seconds: float = 60) -> list[int]:
    """Those of the processes that are still alive after so long."""
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def test_order_is_kept_and_what_was_rejected_before_stays_in_its_place(pool: ImagePool) -> None:
    prepared = list(pool.prepare(SAMPLES, SETTINGS))
    assert keys(prepared) == [s.key for s in SAMPLES]
    assert [(p.key, p.reason) for p in prepared if isinstance(p, Rejected)] == [
        ("train/000/link", "unsafe_member"),
        ("train/000/big", "too_large"),
        ("train/000/broken", "undecodable"),
        ("train/000/empty", "undecodable"),
        ("train/000/last", "duplicate_key"),
    ]


def test_any_number_of_processes_gives_the_same_bytes(pool: ImagePool) -> None:
    with ImagePool(0) as alone:
        assert list(alone.prepare(SAMPLES, SETTINGS)) == list(pool.prepare(SAMPLES, SETTINGS))
        assert alone._executor is None


def test_nothing_and_only_rejected(pool: ImagePool) -> None:
    only = [Rejected("a", "too_large"), Rejected("b", "too_large")]
    assert list(pool.prepare([], SETTINGS)) == [] and list(pool.prepare(only, SETTINGS)) == only


def test_by_default_there_is_a_process_for_each_core() -> None:
    assert ImagePool().num_workers == len(os.sched_getaffinity(0))


def test_the_source_is_read_only_a_little_ahead(pool: ImagePool) -> None:
    taken = 0

    def samples() -> Iterator[Sample]:
        nonlocal taken
        for number in range(96):
            taken += 1
            yield sample(number + 100)

    ahead = [taken - done for done, _ in enumerate(pool.prepare(samples(), SETTINGS))]
    assert max(ahead) == BATCH_IMAGES * (BATCHES_IN_FLIGHT_PER_WORKER * 2 + 1) and taken == 96


def test_large_images_wait_outside(pool: ImagePool, monkeypatch: pytest.MonkeyPatch) -> None:
    large = [sample(number + 100) for number in range(12)]
    monkeypatch.setattr(image_pool, "BYTES_IN_FLIGHT", 2 * len(large[0].image))
    monkeypatch.setattr(image_pool, "BATCH_BYTES", len(large[0].image) // 2)
    taken = 0

    def samples() -> Iterator[Sample]:
        nonlocal taken
        for one in large:
            taken += 1
            yield one

    assert max(taken - done for done, _ in enumerate(pool.prepare(samples(), SETTINGS))) <= 4


def test_an_error_of_the_source_comes_through_and_the_pool_goes_on(pool: ImagePool) -> None:
    def cut() -> Iterator[Sample | Rejected]:
        yield from SAMPLES[:10]
        raise EOFError("the archive is cut off")

    with pytest.raises(EOFError, match="cut off"):
        list(pool.prepare(cut(), SETTINGS))
    assert len(list(pool.prepare(SAMPLES, SETTINGS))) == len(SAMPLES)


def test_whoever_stops_early_leaves_a_working_pool(pool: ImagePool) -> None:
    prepared = pool.prepare(SAMPLES, SETTINGS)
    assert not isinstance(next(prepared), Rejected)
    prepared.close()  # type: ignore[attr-defined]
    assert len(list(pool.prepare(SAMPLES, SETTINGS))) == len(SAMPLES)


def test_images_are_handed_over_several_at_a_time_but_no_more_than_a_megabyte(
    pool: ImagePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = []
    submit = pool._submit
    monkeypatch.setattr(pool, "_submit", lambda batch, *a, **k: (handed.append(len(batch)), submit(batch, *a, **k))[1])
    megabyte = Sample("train/000/large", bytes(2**20))
    small = [sample(number + 100) for number in range(3)]
    assert len(list(pool.prepare([*small * 6, *SAMPLES[5:7], megabyte, megabyte, *small], SETTINGS))) == 25
    assert handed == [8, 8, 5, 1, 3]


def test_a_worker_uses_its_memory_again() -> None:
    """Megabytes for every picture, but hardly a page of them is new."""
    large = Sample("train/000/large", encoded(photo(1024, 1024), "JPEG"))
    with ImagePool(1) as pool:

        def faults(images: int) -> int:
            assert len(list(pool.prepare([large] * images, ImageSettings()))) == images
            (worker,) = worker_pids(pool)
            return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[7])

        before = faults(images=12)
        assert faults(images=12) - before < 12 * 100


@pytest.mark.slow
def test_a_killed_worker_names_the_samples_and_the_next_archive_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_pool, "BATCH_IMAGES", 2)
    with ImagePool(1) as pool:
        list(pool.prepare(SAMPLES[:1], SETTINGS))
        (worker,) = worker_pids(pool)
        os.kill(worker, signal.SIGSTOP)  # it is given samples, but finishes none

        def samples() -> Iterator[Sample | Rejected]:
            yield from SAMPLES[:4]
            os.kill(worker, signal.SIGKILL)

        with pytest.raises(MdAssetsError, match=r"000, train/000/001, train/000/002, train/000/003\. .*num_workers"):
            list(pool.prepare(samples(), SETTINGS))
        assert len(list(pool.prepare(SAMPLES, SETTINGS))) == len(SAMPLES)
        assert worker not in worker_pids(pool)


@pytest.mark.slow
def test_a_worker_that_dies_between_two_archives_costs_neither() -> None:
    with ImagePool(2) as pool:
        list(pool.prepare(SAMPLES[:4], SETTINGS))
        workers = worker_pids(pool)
        os.kill(workers[0], signal.SIGKILL)
        assert wait_until_dead(workers) == []
        assert len(list(pool.prepare(SAMPLES, SETTINGS))) == len(SAMPLES)


def test_leaving_the_block_ends_the_workers() -> None:
    with ImagePool(1) as pool:
        list(pool.prepare(SAMPLES[:2], SETTINGS))
        workers = worker_pids(pool)
    assert workers and wait_until_dead(workers) == []


PARENT = """
import signal, sys
from md_assets.core.settings import ImageSettings
from md_assets.core.spec import Sample
from md_assets.storage.image_pool import ImagePool

def endless():
    while True:
        yield Sample("a", sys.argv[1].encode())

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the test's process inherited
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with ImagePool(2) as pool:
        for number, _ in enumerate(pool.prepare(endless(), ImageSettings())):
            if number == 50:
                print(*pool._executor._processes, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_a_killed_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(script), "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_alive, workers))
        parent.send_signal(number)
    assert wait_until_dead(workers) == []
