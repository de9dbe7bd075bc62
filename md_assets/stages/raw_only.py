"""raw_only: fetch what a dataset has beside its archives, of which nothing is encoded: a test split, for instance.

Here: a file of JSON lines, published as it is. Images go the way of any archive's (`stages.raw`). Not here: what there
is (`datasets/`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from md_assets.core.ledger import Ledger, OutputFile
from md_assets.core.paths import DataRoot, StageDir, checked_archive_id
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.settings import FORMAT_VERSION, ImageSettings
from md_assets.core.source import RemoteFile
from md_assets.core.spec import DatasetSpec, RawOnly
from md_assets.stages.once import Made, Outcome, archive_errors, once, versions_of
from md_assets.stages.raw import Fetcher, ImagePreparer, fetch_archive
from md_assets.storage.archives import open_single_file
from md_assets.storage.publish import output_file, scratch, with_files

BROKEN_LINES_NAMED = 20
"""Broken lines that the ledger names; the others are counted."""

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is broken; reading it whole could take any amount of memory."""


@dataclass(frozen=True)
class _LinesDir(StageDir):
    """The raw directory, for a file of JSON lines."""

    def data(self, archive: str) -> Path:
        return self.path / f"{checked_archive_id(archive)}.jsonl"


def fetch_raw_only(
    spec: DatasetSpec,
    extra: RawOnly,
    locate: Callable[[], RemoteFile],
    root: DataRoot,
    images: ImageSettings,
    *,
    fetcher: Fetcher,
    pool: ImagePreparer,
    keep_archive: bool = False,
    report: ReportProgress = silent,
    on_wait: Callable[[], None] | None = None,
) -> Outcome:
    """Fetch and publish `extra` as `<ds>/raw/<name>.tar` or, of JSON lines, `<ds>/raw/<name>.jsonl`.

    Args and what may be repeated: see `stages.raw.fetch_archive`.

    Returns: the ledger. Lines are samples, and all are kept; `details` tells how many are not JSON, and the first.

    Raises:
        ArchiveError: it cannot be fetched or read.
    """
    if extra.images:
        return fetch_archive(
            spec,
            extra.name,
            locate,
            root,
            images,
            fetcher=fetcher,
            pool=pool,
            keep_archive=keep_archive,
            report=report,
            on_wait=on_wait,
        )
    raw = root.raw(spec.slug)
    with archive_errors(spec.slug, extra.name):
        remote = locate()
    settings, inputs = {"format_version": FORMAT_VERSION}, {"archive": remote.content_id}

    def fetched_bytes(done: int, total: int) -> None:
        report(Progress(extra.name, "fetches", done, total or None, "bytes"))

    def make(workspace: Path) -> Made:
        file = workspace / "lines.tgz"
        fetched = fetcher.fetch(remote, file, fetched_bytes)
        lines = scratch(workspace, "out") / "lines.jsonl"
        with open_single_file(file) as source, lines.open("wb") as target:
            read, broken, first_broken = _copy_lines(source, target)
        ledger = Ledger(
            dataset=spec.slug,
            archive=extra.name,
            stage="raw",
            read=read,
            kept=read,
            rejected={},
            bytes_in=file.stat().st_size,
            bytes_out=0,
            seconds=0.0,
            source={"name": fetched.name, "content_id": fetched.content_id, "revision": fetched.revision},
            inputs={"archive": fetched.content_id},
            settings=settings,
            versions=versions_of(),
            files=(),
            details={"broken_lines": broken, "first_broken_lines": first_broken},
        )
        published: OutputFile = output_file(lines, f"{extra.name}.jsonl")
        return Made(lines, with_files(ledger, (published,)))

    return once(_LinesDir(raw.dataset, raw.stage, raw.path), extra.name, settings, inputs, make, on_wait)


def _copy_lines(source: IO[bytes], target: IO[bytes]) -> tuple[int, int, list[str]]:
    """Copy a file as it is; returns its lines that are not blank, how many of them are not JSON, and the first."""
    read = broken = number = 0
    first: list[str] = []
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        target.write(line)
        fault = ""
        if len(line) > MAX_LINE_BYTES:
            fault = f"it has more than {MAX_LINE_BYTES} bytes"
        elif line.strip():
            try:
                json.loads(line)
            except (ValueError, RecursionError) as error:
                fault = f"{type(error).__name__}: {error}"
        else:
            continue
        read += 1
        if fault:
            broken += 1
            if len(first) < BROKEN_LINES_NAMED:
                first.append(f"line {number}: {fault}")
        while line and not line.endswith(b"\n"):  # the rest of a long one
            line = source.readline(MAX_LINE_BYTES)
            target.write(line)
    return read, broken, first
