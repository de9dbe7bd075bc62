"""latents: encode the mds shards of archives to latents.

Each archive is encoded by exactly one process. Processes do not talk to each other: an archive belongs to who
holds its workspace, in this run or in another one. Within a process decoding (workers), the models (main thread, see
`encoders.bundle.Encoders`) and writing (one thread) of consecutive archives overlap.

Importing this module imports no torch, so that whoever only asks what is left to do need not wait for it.

Here: which archives are encoded, what becomes of the rows, and the ledger. Not here: the models and the batches
(`encoders/`), the processes (`orchestration.latents_worker`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from md_assets.core.errors import ArchiveError, MdAssetsError
from md_assets.core.ledger import Ledger, Reason
from md_assets.core.names import first_of
from md_assets.stages.latent_statistics import ENCODED_AT, STATISTICS, LatentStatistics
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.stages.once import UPSTREAM_DAMAGED, archive_errors, refuse_pruned, versions_of
from md_assets.storage.mds import Shard, ShardWriter, ledgered_files, read_index, spread_rows
from md_assets.storage.publish import BusyError, publish, scratch, with_files, workspace

if TYPE_CHECKING:
    from md_assets.encoders.bundle import Encoded, Encoders
    from md_assets.encoders.round_trip import Recomputed, RoundTrip

PROGRESS_INTERVAL_S = 5.0
"""A progress event of an archive comes at most this often."""

BATCHES_AHEAD = 2
"""Encoded batches that may wait for the writing thread: enough that neither waits for the other."""

ROWS_ROUND_TRIP = (2, 4)
"""Least and most rows of an archive whose latents are decoded again; in between, one of each hundred. Decoding costs
about 2.3 times as much as encoding, so that is some 2 % of an archive's work, and under 1 % from 1,000 rows on."""

UNDECODABLE_AT_MOST = (2, 100)
"""Images of an archive that may be impossible to decode: two, or one of each hundred. Where there are more, or all are,
it is not the images alone: something that made or moved mds is broken."""

VERSIONED = ("torch", "torchvision", "diffusers", "open_clip_torch", "transformers", "mosaicml-streaming", "pillow")
"""Packages that decide the stored values."""

Rows = list[dict[str, Any]]
"""A few rows of latents, as they are stored."""

Report = Callable[[dict[str, Any]], None]
"""Takes one event, which JSON can hold; called from two threads.

Every event has `event` and `archive`; by `event`:
    published: `rows`, `seconds`, `picture` (a data URI: crops beside what the VAE's decoder makes of their latents).
    passed_over: published before, with the same settings and inputs.
    failed: `error` (one line, names dataset, archive and remedy), `reason` (a stable word), `transient`.
    waiting: another run works on the archive, and this process has nothing else to do.
    progress: `done_images`, `total_images` of the archive, `images_per_s` of this process.
Each archive that a process takes gets one of published, passed_over and failed.
"""


def encode_archives(plan: LatentsPlan, report: Report, archives: Iterable[str] | None = None) -> None:
    """Encode and publish archives, each at once when it is finished.

    Args:
        plan: what to do.
        report: see `Report`.
        archives: IDs, taken one at a time when there is time for another; `plan.archives` by default.

    Raises:
        SettingsError: an encoder cannot be loaded or run.
        MdAssetsError: a worker was killed. Archives that were being encoded are reported as failed.

    A failing archive is reported and the others go on. Archives that another process works on are passed, and
    looked at again at the end. May be repeated and killed at any time.
    """
    from md_assets.encoders.bundle import Encoders

    encoders = Encoders.load(plan.encoders, plan.device)
    busy = _walk(plan, encoders, report, plan.archives if archives is None else archives, wait=False)
    for archive in busy:
        # One at a time: who waits while holding another archive could be waited for by the one he waits for.
        _walk(plan, encoders, report, [archive], wait=True)


def _walk(plan: LatentsPlan, encoders: Encoders, report: Report, archives: Iterable[str], wait: bool) -> list[str]:
    """Encode `archives`; returns those that other processes work on."""
    import torch

    from md_assets.encoders.batches import Unreadable, batches
    from md_assets.encoders.round_trip import recompute

    held: dict[str, _Claim] = {}
    busy: list[str] = []
    unwritten: deque[tuple[_Claim, Future[Rows | None]]] = deque()
    pin_memory = encoders.device.type == "cuda"
    # One thread, so what is submitted keeps its order; which calls torch with no threads beside it, see `Encoders`.
    writer = ThreadPoolExecutor(1, "writes-latents", torch.set_num_threads, (1,))

    def claims() -> Iterator[_Claim]:
        for archive in archives:
            try:
                claim = _claim(plan, encoders, report, archive, wait)
            except BusyError:
                busy.append(archive)
            except Exception as error:
                report(_failed(plan.dataset, archive, error))
            else:
                if claim is None:
                    report({"event": "passed_over", "archive": archive})
                    continue
                held[archive] = claim
                if claim.rows:
                    yield claim
                else:
                    unwritten.append((claim, writer.submit(claim.close)))

    def take_written(but: int) -> None:
        """Wait until no more than so many batches are unwritten; recompute rows of archives that are complete."""
        while len(unwritten) > but:
            claim, written = unwritten.popleft()
            rows = written.result()
            if rows is not None:
                try:
                    recomputed = recompute(encoders, rows)
                except Exception as error:
                    writer.submit(claim.fail, error)
                else:
                    writer.submit(claim.publish, recomputed)

    try:
        with writer:
            try:
                for batch in batches(claims(), encoders.preparation, plan.batch_size, plan.num_workers, pin_memory):
                    claim = held[batch.archive]
                    if claim.failed:
                        continue
                    if isinstance(batch, Unreadable):
                        claim.failed = True  # at once, so that no more of it is prepared
                        remedy = f"Materialize {plan.dataset}/mds of it again"
                        writer.submit(claim.fail, claim.error(batch.what, remedy, UPSTREAM_DAMAGED))
                        continue
                    unwritten.append((claim, writer.submit(claim.write, encoders.encode(batch))))
                    take_written(BATCHES_AHEAD)
            finally:
                take_written(0)  # archives that are complete are published, whatever has ended the run
    except BaseException as error:
        for claim in held.values():
            stopped = claim.error(f"was stopped ({type(error).__name__})", "Run it again", "stopped")
            claim.fail(error if isinstance(error, MdAssetsError) else stopped)
        raise
    return busy


def _claim(plan: LatentsPlan, encoders: Encoders, report: Report, archive: str, wait: bool) -> _Claim | None:
    """The exclusive right to encode `archive`; None where there is nothing left to do.

    Raises:
        BusyError: another process has it and `wait` is False.
        ArchiveError: its mds shards cannot be used.
    """

    def on_wait() -> None:
        report({"event": "waiting", "archive": archive})

    with ExitStack() as stack:
        own = stack.enter_context(workspace(plan.latents_dir.ledger(archive), wait=wait, on_wait=on_wait))
        if plan.current(archive):
            return None
        refuse_pruned(plan.mds_dir, archive)
        mds = plan.upstream(archive)
        shards = read_index(plan.mds_dir.data(archive))
        if (rows := sum(shard.rows for shard in shards)) != mds.kept:
            raise ArchiveError(
                plan.dataset,
                archive,
                f"mds holds {rows} rows, its ledger says {mds.kept}",
                f"Materialize {plan.dataset}/mds of it again",
                reason=UPSTREAM_DAMAGED,
            )
        return _Claim(plan, encoders, report, mds, shards, own, stack.pop_all())


class _Claim:
    """One archive in this process's hands: from its claim until it is published or has failed.

    Args:
        plan, encoders, report: of the run.
        mds: the ledger of its mds shards.
        shards: these.
        own: its workspace.
        release: leaves the workspace.

    `write`, `close`, `publish` and `fail` raise nothing; what goes wrong in them fails the archive. Once batches are on
    their way, only the writing thread calls them.
    """

    def __init__(
        self,
        plan: LatentsPlan,
        encoders: Encoders,
        report: Report,
        mds: Ledger,
        shards: Sequence[Shard],
        own: Path,
        release: ExitStack,
    ) -> None:
        self.archive = mds.archive
        self.shards = shards
        self.rows = mds.kept
        self.failed = False
        self._plan, self._encoders, self._report, self._mds = plan, encoders, report, mds
        self._own, self._release = own, release
        self._started = time.monotonic()
        self._writer: ShardWriter | None = None
        self._undecodable: list[str] = []
        self._statistics = LatentStatistics()
        self._progress_at = self._progress_rows = 0.0
        self._rows_at_once: int | None = None
        self._ended = False

    def write(self, encoded: Encoded) -> Rows | None:
        """Append a batch; after the last one `close`."""
        if self._ended:
            return None
        try:
            self._require_finite(encoded.not_finite())
            self._reject(encoded.undecodable())
            self._rows_at_once = encoded.rows_at_once
            writer = self._open_writer()
            for row in encoded.rows():
                writer.write(row)
            self._statistics.add(encoded.values(), encoded.caption_lengths())
            done = writer.row_count + len(self._undecodable)
            self._report_progress(done)
        except Exception as error:
            self.fail(error)
            return None
        return self.close() if done == self.rows else None

    def close(self) -> Rows | None:
        """Complete the shards; returns a few rows as they lie on disk, to be recomputed before `publish`."""
        try:
            with self._open_writer() as writer:
                pass  # leaving it writes the index
            return list(spread_rows(writer.directory, self._round_trip_rows))
        except Exception as error:
            self.fail(error)
            return None

    def publish(self, recomputed: Recomputed) -> None:
        """Publish what was written.

        Args:
            recomputed: of the rows that `close` returned.
        """
        try:
            if self._plan.upstream(self.archive).content_id != self._mds.content_id:
                raise self.error("mds changed while it was encoded", "Run it again", "upstream_changed")
            writer = self._open_writer()
            round_trip = self._round_trip(recomputed)
            ledger = publish(self._plan.latents_dir, writer.directory, self._ledger(writer, round_trip.facts))
        except Exception as error:
            self.fail(error)
            return
        self._end()
        said = {"rows": ledger.kept, "seconds": ledger.seconds, "picture": round_trip.picture}
        self._report({"event": "published", "archive": self.archive, **said})

    def fail(self, error: Exception) -> None:
        """Give the archive up; nothing of it is published. Does nothing once it is published or has failed."""
        if self._ended:
            return
        self.failed = True
        self._end()
        self._report(_failed(self._plan.dataset, self.archive, error))

    def error(self, what: str, remedy: str, reason: str) -> ArchiveError:
        """An error of this archive."""
        return ArchiveError(self._plan.dataset, self.archive, what, remedy, reason=reason)

    def _end(self) -> None:
        self._ended = True
        self._writer = None  # an unfinished one holds up to a shard of rows
        with suppress(OSError):  # what cannot be removed now, the next run's workspace clears
            self._release.close()

    def _open_writer(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(scratch(self._own, "shards"), self._encoders.columns)
        return self._writer

    def _report_progress(self, rows: int) -> None:
        now = time.monotonic()
        if not self._progress_at:  # the rate counts from the first batch, before which decoding had to begin
            self._progress_at, self._progress_rows = now, rows
        elif now - self._progress_at >= PROGRESS_INTERVAL_S:
            rate = (rows - self._progress_rows) / (now - self._progress_at)
            said = {"done_images": rows, "total_images": self.rows, "images_per_s": round(rate, 1)}
            self._report({"event": "progress", "archive": self.archive, **said})
            self._progress_at, self._progress_rows = now, rows

    def _require_finite(self, keys: Sequence[str]) -> None:
        if keys:
            raise self.error(
                f"latents of {first_of(keys)} are not finite numbers in {self._plan.encoders.save_dtype}",
                "Try model_dtype float32; if it stays, the encoder's weights are damaged",
                "not_finite",
            )

    def _reject(self, undecodable: Sequence[str]) -> None:
        """Take down the samples of a batch whose images cannot be decoded; raises where there are too many of them."""
        self._undecodable.extend(undecodable)
        least, of_each = UNDECODABLE_AT_MOST
        if undecodable and len(self._undecodable) > min(max(least, self.rows // of_each), self.rows - 1):
            remedy = f"Materialize {self._plan.dataset}/raw and mds of it again"
            raise self.error(f"images of {first_of(self._undecodable)} cannot be decoded", remedy, Reason.UNDECODABLE)

    @property
    def _round_trip_rows(self) -> int:
        least, most = ROWS_ROUND_TRIP
        return min(max(self.rows // 100, least), most)

    def _round_trip(self, recomputed: Recomputed) -> RoundTrip:
        """See `encoders.round_trip`."""
        from md_assets.encoders.round_trip import round_trip

        mds_data = self._plan.mds_dir.data(self.archive)
        mds = list(spread_rows(mds_data, self._round_trip_rows, set(self._undecodable)))
        if [row["key"] for row in recomputed.stored] != [row["key"] for row in mds]:
            raise self.error("its rows are not those of mds", "Report it with the run's log", "internal")
        return round_trip(self._encoders, recomputed, [row["jpg"] for row in mds])

    def _ledger(self, writer: ShardWriter, round_trip: Mapping[str, Any]) -> Ledger:
        details = {**self._encoders.layout(), "batch_size": self._plan.batch_size, "round_trip": round_trip}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        details |= {STATISTICS: self._statistics.as_details(), ENCODED_AT: now}
        if self._rows_at_once is not None:
            details["out_of_memory"] = f"batches were cut to {self._rows_at_once} rows, which fit into the memory"
        ledger = Ledger(
            dataset=self._plan.dataset,
            archive=self.archive,
            stage="latents",
            read=self._mds.kept,
            kept=writer.row_count,
            rejected={Reason.UNDECODABLE: self._undecodable} if self._undecodable else {},
            bytes_in=self._mds.bytes_out,
            bytes_out=0,
            seconds=round(time.monotonic() - self._started, 3),
            source=self._mds.source,
            inputs={"mds": self._mds.content_id},
            settings=self._plan.settings,
            versions=versions_of(*VERSIONED),
            files=(),
            details=details,
        )
        return with_files(ledger, ledgered_files(writer.directory, self.archive))


def _failed(dataset: str, archive: str, error: Exception) -> dict[str, Any]:
    """The event of a failed archive, whatever it failed of."""
    try:
        with archive_errors(dataset, archive):
            raise error
    except ArchiveError as known:
        said = {"error": str(known), "reason": known.reason, "transient": known.transient}
        return {"event": "failed", "archive": archive, **said}
