"""annotations: index a file of captions so that one archive's rows are read without scanning the rest.

Here: fetching the file, and what becomes of each row. Not here: formats (`storage.annotation_rows`), the index itself
(`storage.captions`), what a row means (`datasets/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from md_assets.core.errors import one_line
from md_assets.core.ledger import Ledger, Reason
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.settings import FORMAT_VERSION
from md_assets.core.source import RemoteFile
from md_assets.core.spec import AnnotationSource, DatasetSpec
from md_assets.stages.once import Made, Outcome, once, versions_of
from md_assets.stages.raw import Fetcher
from md_assets.storage.annotation_rows import Row, iter_rows
from md_assets.storage.captions import INDEX_VERSION, MAX_NUMBER, CaptionIndexWriter, Place
from md_assets.storage.publish import output_file, scratch, with_files

BROKEN_ROWS_NAMED = 20
"""Broken rows whose names and faults are in the ledger; the rest is counted and listed by name."""

FAULT_CHARACTERS = 300
"""Of a fault, which may quote the row, as much as people need."""


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

    Returns: the ledger, whose samples are rows: rejected are `line N`, `row N`, `annotation N` or a member's name as
        `broken_row` or `unknown_archive`, and keys that an earlier row has too as `duplicate_key`, or as
        `further_caption` where samples may have several.

    Raises:
        ArchiveError: the file cannot be fetched or read, or lacks the columns.
    """
    stage_dir = root.annotations(spec.slug)
    settings: dict[str, object] = {"format_version": FORMAT_VERSION, "index_version": INDEX_VERSION}
    inputs = {"file": remote.content_id}

    def make(workspace: Path) -> Made:
        file = workspace / f"annotations{''.join(Path(remote.name).suffixes[-1:])}"
        fetched = fetcher.fetch(
            remote,
            file,
            lambda done, total: report(Progress(source.name, "fetches", done, total or None, "bytes")),
        )
        index = scratch(workspace, "out") / stage_dir.data(source.name).name
        archives = None if source.number_of else spec.archives
        with CaptionIndexWriter(index, scratch(workspace, "spill"), archives, source.scored) as writer:
            rejected, faults, read = _add_rows(spec, source, iter_rows(file, source, remote.name), writer, report)
            kept, further = writer.finish()
        if further:
            rejected[Reason.FURTHER_CAPTION if source.first_of_several else Reason.DUPLICATE_KEY] = further
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
            source={"name": fetched.name, "content_id": fetched.content_id, "revision": fetched.revision},
            inputs={"file": fetched.content_id},
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
    rows: Iterator[Row],
    writer: CaptionIndexWriter,
    report: ReportProgress,
) -> tuple[dict[str, list[str]], list[str], int]:
    """Feed every row to `writer`; returns rejected rows by reason, the first faults, rows read."""
    rejected: dict[str, list[str]] = {}
    faults: list[str] = []
    read = 0

    def reject(reason: str, row_name: str, fault: str) -> None:
        rejected.setdefault(reason, []).append(row_name)
        if len(faults) < BROKEN_ROWS_NAMED:
            faults.append(one_line(f"{row_name}: {fault}"[:FAULT_CHARACTERS]))

    known = set(spec.archives)
    for row_name, fields in rows:
        read += 1
        try:
            if isinstance(fields, Exception):
                raise fields
            caption = source.parse(fields)
            if not isinstance(caption.text, str):
                raise TypeError(f"the caption is {type(caption.text).__name__}, not text")
            place: Place = source.number_of(caption.key) if source.number_of else caption.archive
            if isinstance(place, int) and not 0 <= place <= MAX_NUMBER:
                raise ValueError(f"its number {place} is out of range")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            reject("broken_row", row_name, f"{type(error).__name__}: {error}")
        else:
            if isinstance(place, str) and place not in known:
                reject("unknown_archive", row_name, f"archive {place} is none of {spec.slug}")
            else:
                writer.add(place, as_unicode(caption.key), as_unicode(caption.text), caption.unsafe)
        if read % 1_000 == 0:
            report(Progress(source.name, "indexes", read, None, "rows"))
    return rejected, faults, read


def as_unicode(text: str) -> str:
    """`text` that UTF-8 can store: halves of surrogate pairs, which JSON may spell, are joined or become U+FFFD."""
    if text.isascii():
        return text  # mostly, in no time
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
