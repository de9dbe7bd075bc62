"""Processes that prepare images, fed in order and read in order.

Here: the pool. Not here: what is done to an image, see `storage.images`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

from md_assets.core.errors import MdAssetsError
from md_assets.core.settings import ImageSettings
from md_assets.core.spec import Rejected, Sample
from md_assets.storage.images import StoredImage, prepare_image

Prepared = tuple[Sample, StoredImage] | Rejected

IMAGES_IN_FLIGHT_PER_WORKER = 4
"""Enough that no worker waits for the parent, few enough that memory stays small."""

BYTES_IN_FLIGHT = 512 * 2**20
"""Bytes of undecoded images that may wait for a worker, whatever their number."""


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
        waiting: deque[tuple[Sample | Rejected, Future[StoredImage | str] | None]] = deque()
        waiting_bytes = 0
        try:
            for sample in samples:
                if isinstance(sample, Rejected):
                    waiting.append((sample, None))
                else:
                    waiting.append((sample, self._submit(sample, settings, idle=not waiting)))
                    waiting_bytes += len(sample.image)
                while waiting and (
                    len(waiting) > IMAGES_IN_FLIGHT_PER_WORKER * self.num_workers or waiting_bytes > BYTES_IN_FLIGHT
                ):
                    result = _result(*waiting[0])  # it stays in the queue meanwhile: if a worker dies, it is named
                    done, _ = waiting.popleft()
                    waiting_bytes -= len(done.image) if isinstance(done, Sample) else 0
                    yield result
            while waiting:
                result = _result(*waiting[0])
                waiting.popleft()
                yield result
        except BrokenProcessPool as error:
            self._executor = None  # the next archive gets new processes
            keys = [sample.key for sample, future in waiting if future is not None]
            raise MdAssetsError(
                f"a worker process died (out of memory?) at one of {', '.join(keys) or 'the last samples'}",
                "Run the archive again with fewer `num_workers`",
            ) from error
        finally:
            for _, future in waiting:
                if future is not None:
                    future.cancel()

    def _submit(self, sample: Sample, settings: ImageSettings, idle: bool) -> Future[StoredImage | str]:
        try:
            return self._workers().submit(prepare_image, sample.image, settings)
        except BrokenProcessPool:
            if not idle:
                raise
            self._executor = None  # a worker died while it had nothing to do: no sample is to blame
            return self._workers().submit(prepare_image, sample.image, settings)

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


def _judged(sample: Sample, result: StoredImage | str) -> Prepared:
    return Rejected(sample.key, result) if isinstance(result, str) else (sample, result)


def _result(sample: Sample | Rejected, future: Future[StoredImage | str] | None) -> Prepared:
    if isinstance(sample, Rejected):
        return sample
    assert future is not None  # every sample was submitted
    return _judged(sample, future.result())


def _start_worker() -> None:
    """Make this worker end when the parent does, however that ends.

    A worker waits for work on a queue of which it holds both ends, so it would outlive a killed parent for ever. Nor
    does the fork server end: it lives as long as anyone whom it could serve, and its workers are among them.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)
