"""Processes that prepare images, fed in order and read in order.

Here: the pool. Not here: what is done to an image, see `storage.images`.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from md_assets.core.errors import MdAssetsError
from md_assets.core.settings import ImageSettings
from md_assets.core.spec import Rejected, Sample
from md_assets.storage.child_process import end_with_parent
from md_assets.storage.images import StoredImage, prepare_image

Prepared = tuple[Sample, StoredImage] | Rejected

BATCH_IMAGES, BATCH_BYTES = 8, 2**20
"""A worker is given so many images at a time, or fewer if they are that large: handing over takes half a millisecond,
as long as a small image does."""

BATCHES_IN_FLIGHT_PER_WORKER = 3
"""Enough that no worker waits for the parent, few enough that memory stays small."""

BYTES_IN_FLIGHT = 512 * 2**20
"""Bytes of undecoded images that may wait for a worker, whatever their number."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt, see its malloc.h."""

_KEPT_FREE_BYTES = 128 * 2**20
"""What a worker may keep of freed memory. Several pictures of 2250×1500 px fit."""


class ImagePool:
    """Prepares images in several processes; results come in the order of the samples.

    Args:
        num_workers: processes; 0 prepares in this process, None takes one per core.

    Processes start with the first image and serve any number of archives. Used as a context manager.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
        self._executor: ProcessPoolExecutor | None = None

    def prepare(self, samples: Iterable[Sample | Rejected], settings: ImageSettings) -> Iterator[Prepared]:
        """Each sample with its stored image, or rejected with the reason, in the order given.

        Raises:
            MdAssetsError: a worker died; the samples it may have died of are named.
        """
        if self.num_workers == 0:
            for sample in samples:
                yield sample if isinstance(sample, Rejected) else _judged(sample, prepare_image(sample.image, settings))
            return
        waiting: deque[tuple[_Batch, Future[list[StoredImage | str]]]] = deque()
        try:
            for batch in _batches(samples):
                waiting.append((batch, self._submit(batch, settings, idle=not waiting)))
                while (
                    len(waiting) > BATCHES_IN_FLIGHT_PER_WORKER * self.num_workers
                    or sum(_bytes(waits) for waits, _ in waiting) > BYTES_IN_FLIGHT
                ):
                    results = _results(*waiting[0])  # it stays in the queue meanwhile: if a worker dies, it is named
                    waiting.popleft()
                    yield from results
            while waiting:
                results = _results(*waiting[0])
                waiting.popleft()
                yield from results
        except BrokenProcessPool as error:
            self._executor = None  # the next archive gets new processes
            keys = [sample.key for batch, _ in waiting for sample in batch if isinstance(sample, Sample)]
            raise MdAssetsError(
                f"a worker process died (out of memory?) at one of {', '.join(keys) or 'the last samples'}",
                "Run the archive again with fewer `num_workers`",
            ) from error
        finally:
            for _, future in waiting:
                future.cancel()

    def _submit(self, batch: _Batch, settings: ImageSettings, idle: bool) -> Future[list[StoredImage | str]]:
        images = [sample.image for sample in batch if isinstance(sample, Sample)]
        try:
            return self._workers().submit(_prepare_images, images, settings)
        except BrokenProcessPool:
            if not idle:
                raise
            self._executor = None  # a worker died while it had nothing to do: no sample is to blame
            return self._workers().submit(_prepare_images, images, settings)

    def _workers(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Not fork: the parent may have threads. One server imports what workers need and forks them all.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["__main__", "md_assets.storage.images"])
            self._executor = ProcessPoolExecutor(self.num_workers, context, _start_worker)
        return self._executor

    def __enter__(self) -> ImagePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


_Batch = Sequence[Sample | Rejected]


def _batches(samples: Iterable[Sample | Rejected]) -> Iterator[_Batch]:
    batch: list[Sample | Rejected] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == BATCH_IMAGES or _bytes(batch) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _bytes(batch: _Batch) -> int:
    return sum(len(sample.image) for sample in batch if isinstance(sample, Sample))


def _prepare_images(images: Sequence[bytes], settings: ImageSettings) -> list[StoredImage | str]:
    return [prepare_image(image, settings) for image in images]


def _results(batch: _Batch, future: Future[list[StoredImage | str]]) -> list[Prepared]:
    results = iter(future.result())
    return [sample if isinstance(sample, Rejected) else _judged(sample, next(results)) for sample in batch]


def _judged(sample: Sample, result: StoredImage | str) -> Prepared:
    return Rejected(sample.key, result) if isinstance(result, str) else (sample, result)


def _start_worker() -> None:
    end_with_parent()
    _keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _keep_freed_memory() -> None:
    """Let freed memory be used for the next picture.

    By default glibc gives the megabytes of every picture back to the kernel, and each of their pages costs a fault when
    the next one is decoded: thousands an image, a third of a worker's time on a virtual machine.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library goes without
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_FREE_BYTES // 4)
