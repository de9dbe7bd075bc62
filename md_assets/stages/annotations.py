"""annotations: index a file of captions so that one archive's rows are read without scanning the rest.

Here: fetching the file, reading its rows, and what becomes of broken ones. Not here: the index itself
(`storage.captions`), what a row means (`datasets/`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from md_assets.core.errors import MdAssetsError
from md_assets.core.ledger import Ledger, Reason
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.settings import FORMAT_VERSION
from md_assets.core.source import RemoteFile
from md_assets.core.spec import AnnotationSource, DatasetSpec
from md_assets.stages.once import Made, Outcome, once, versions_of
from md_assets.stages.raw import Fetcher
from md_assets.storage.archives import open_single_file
from md_assets.storage.captions import CaptionIndexWriter
from md_assets.storage.publish import output_file, scratch, with_files

ROWS_TO_JUDGE_COLUMNS = 1_000
"""If none of the first rows has the columns, the file is of another format and is refused."""

BROKEN_ROWS_NAMED = 20
"""Broken rows whose lines and faults are named in the ledger; the rest is counted and listed by line."""

MAX_LINE_BYTES = 16 * 2**20
"""A longer line is no row of captions; reading it whole could take any amount of memory."""


def index_annotations(
    spec: DatasetSpec,
    source: AnnotationSource,
    remote: RemoteFile,
    root: DataRoot,
    *,
    fetcher: Fetcher,
    report: ReportProgress = silent,
    on_wait: Callable[[], None] | None = None,
) -> Outcome:
    """Fetch a file of captions and publish its index, unless it is published from the same content.

    Args:
        spec, source: which file of which dataset.
        remote: the file at its source, as listed.
        root: where to publish.
        fetcher: see `stages.raw.Fetcher`.
        report: told of bytes fetched and rows read.
        on_wait: called when another process indexes the same file.

    Returns: the ledger, whose samples are rows: rejected are `line N` as `broken_row` or `unknown_archive`, and keys
        that an earlier row has too as `duplicate_key`.

    Raises:
        ArchiveError: the file cannot be fetched or read, or lacks the columns.
    """
    stage_dir = root.annotations(spec.slug)
    settings: dict[str, object] = {"format_version": FORMAT_VERSION}
    inputs = {"file": remote.content_id}

    def make(workspace: Path) -> Made:
        file = fetcher.fetch(
            remote,
            workspace / "annotations.tgz",
            lambda done, total: report(Progress(source.name, "fetches", done, total or None, "bytes")),
        )
        out = scratch(workspace, "out")
        index = out / stage_dir.data(source.name).name
        with CaptionIndexWriter(index, scratch(workspace, "spill"), spec.archives) as writer:
            rejected, faults, read = _add_rows(spec, source, remote.name, file, writer, report)
            kept, duplicates = writer.finish()
        if duplicates:
            rejected[Reason.DUPLICATE_KEY] = duplicates
        ledger = Ledger(
            dataset=spec.slug,
            archive=source.name,
            stage="annotations",
            read=read,
            kept=kept,
            rejected=rejected,
            bytes_in=file.stat().st_size,
            bytes_out=0,
            seconds=0.0,
            source={"name": remote.name, "content_id": remote.content_id, "revision": remote.revision},
            inputs=inputs,
            settings=settings,
            versions=versions_of("pyarrow"),
            files=(),
            details={"first_faults": faults},
        )
        return Made(index, with_files(ledger, (output_file(index, index.name),)))

    return once(stage_dir, source.name, settings, inputs, make, on_wait)


def _add_rows(
    spec: DatasetSpec,
    source: AnnotationSource,
    name: str,
    file: Path,
    writer: CaptionIndexWriter,
    report: ReportProgress,
) -> tuple[dict[str, list[str]], list[str], int]:
    """Feed every row of the file to `writer`; returns rejected rows by reason, the first faults, rows read."""
    rejected: dict[str, list[str]] = {}
    faults: list[str] = []
    read = 0
    columns_seen: set[str] = set()

    def reject(reason: str, number: int, fault: str) -> None:
        rejected.setdefault(reason, []).append(f"line {number}")
        if len(faults) < BROKEN_ROWS_NAMED:
            faults.append(f"line {number}: {fault}")

    def refuse_without_columns() -> None:
        missing = [column for column in source.columns if column not in columns_seen]
        if read and missing:
            raise MdAssetsError(
                f"{name} has no column {', '.join(missing)} in its first {read} rows",
                "Upstream changed its format; pin an older revision of the repository or report it",
            )

    known = set(spec.archives)
    with open_single_file(file) as lines:
        for number, line in _numbered(lines):
            read += 1
            try:
                if line is None:
                    raise ValueError(f"the line has more than {MAX_LINE_BYTES} bytes")
                row = json.loads(line)
                columns_seen.update(row)
                caption = source.parse(row)
                if not isinstance(caption.text, str):
                    raise TypeError(f"the caption is {type(caption.text).__name__}, not text")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reject("broken_row", number, f"{type(error).__name__}: {error}")
            else:
                if caption.archive not in known:
                    reject("unknown_archive", number, f"archive {caption.archive} is none of {spec.slug}")
                else:
                    writer.add(replace(caption, text=as_unicode(caption.text)))
            if read == ROWS_TO_JUDGE_COLUMNS:
                refuse_without_columns()
            if read % 1_000 == 0:
                report(Progress(source.name, "indexes", read, None, "rows"))
    refuse_without_columns()
    return rejected, faults, read


def _numbered(lines: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """The lines that are not blank with their numbers from 1; None for one that is longer than `MAX_LINE_BYTES`."""
    number = 0
    while line := lines.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            yield number, None
        elif line.strip():
            yield number, line
        while line and not line.endswith(b"\n"):  # the rest of a long one
            line = lines.readline(MAX_LINE_BYTES + 1)


def as_unicode(text: str) -> str:
    """`text` that UTF-8 can store: halves of surrogate pairs, which JSON may spell, are joined or become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
