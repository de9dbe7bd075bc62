"""raw: fetch one upstream archive and keep its images, filtered and resized.

Here: the stage. Not here: downloading (`storage.hub`), opening archives (`storage.archives`), the rules for
pixels (`storage.images`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from md_assets.core.ledger import Ledger, Reason
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.settings import ImageSettings, raw_settings
from md_assets.core.source import BytesProgress, RemoteFile
from md_assets.core.spec import DatasetSpec, OrphanCaption, Rejected, Sample
from md_assets.stages.once import Made, Outcome, archive_errors, once, versions_of
from md_assets.storage.archives import iter_members
from md_assets.storage.image_pool import Prepared
from md_assets.storage.publish import scratch, with_files
from md_assets.storage.raw_tar import RawTarWriter


class Fetcher(Protocol):
    """Brings a remote file here, verified; see `storage.hub.HubClient.fetch`."""

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> Path: ...


class ImagePreparer(Protocol):
    """Prepares images in order; see `storage.image_pool.ImagePool.prepare`."""

    def prepare(self, samples: Iterable[Sample | Rejected], settings: ImageSettings) -> Iterator[Prepared]: ...


def fetch_archive(
    spec: DatasetSpec,
    archive: str,
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
    """Fetch `archive`, verify it, keep its images and publish them as one tar.

    Args:
        spec, archive: which one.
        locate: tells its file at the source, whose content decides whether a published one is current.
        root: where to publish.
        images: which images to keep, and how.
        fetcher, pool: see their protocols.
        keep_archive: whether the upstream file stays, below `<ds>/archives/`; it is deleted otherwise.
        report: told of bytes fetched and images prepared.
        on_wait: called when another process works on the same archive.

    Raises:
        ArchiveError: it cannot be fetched or read.

    Temporary space: the archive and its output. May be repeated and killed at any time; a repeated run continues a
    download where it was cut off.
    """
    stage_dir = root.raw(spec.slug)
    with archive_errors(spec.slug, archive):
        remote = locate()
    settings, inputs = raw_settings(images), {"archive": remote.content_id}
    suffix = "".join(Path(remote.name).suffixes[-1:])

    def fetched_bytes(done: int, total: int) -> None:
        report(Progress(archive, "fetches", done, total or None, "bytes"))

    def make(workspace: Path) -> Made:
        upstream = fetcher.fetch(remote, workspace / f"archive{suffix}", fetched_bytes)
        ledger, tar = _keep_images(spec, archive, remote, upstream, scratch(workspace, "out"), images, pool, report)
        if keep_archive:
            kept = root.kept_archive(spec.slug, archive, suffix)
            kept.parent.mkdir(parents=True, exist_ok=True)
            upstream.replace(kept)
        return Made(tar, ledger)

    return once(stage_dir, archive, settings, inputs, make, on_wait)


def _keep_images(
    spec: DatasetSpec,
    archive: str,
    remote: RemoteFile,
    upstream: Path,
    out: Path,
    images: ImageSettings,
    pool: ImagePreparer,
    report: ReportProgress,
) -> tuple[Ledger, Path]:
    archive_bytes = upstream.stat().st_size
    tar_name = f"{archive}.tar"
    tar_path = out / Path(tar_name).name
    consumed_bytes = kept = read = 0
    originals = 0
    rejected: dict[str, list[str]] = defaultdict(list)

    def on_position(position: int) -> None:
        nonlocal consumed_bytes
        consumed_bytes = position

    members = iter_members(upstream, spec.archive_format, images.max_member_bytes, on_position)
    orphans = 0

    def samples() -> Iterator[Sample | Rejected]:
        nonlocal orphans
        for sample in spec.read_samples(archive, members):
            if isinstance(sample, OrphanCaption):
                orphans += 1
            else:
                yield sample

    with RawTarWriter(tar_path) as writer:
        for prepared in pool.prepare(_unique(samples()), images):
            read += 1
            if isinstance(prepared, Rejected):
                rejected[prepared.reason].append(prepared.key)
            else:
                sample, image = prepared
                writer.write(sample.key, image, sample.caption)
                kept += 1
                originals += image.original
            report(Progress(archive, "prepares images", consumed_bytes, archive_bytes, "bytes", read))
    ledger = Ledger(
        dataset=spec.slug,
        archive=archive,
        stage="raw",
        read=read,
        kept=kept,
        rejected=dict(rejected),
        bytes_in=archive_bytes,
        bytes_out=0,
        seconds=0.0,
        source={"name": remote.name, "content_id": remote.content_id, "revision": remote.revision},
        inputs={"archive": remote.content_id},
        settings=raw_settings(images),
        versions=versions_of("pillow"),
        files=(),
        details={"stored_unchanged": originals, "orphan_captions": orphans},
    )
    return with_files(ledger, (writer.output_file(tar_name),)), tar_path


def _unique(samples: Iterable[Sample | Rejected]) -> Iterator[Sample | Rejected]:
    """The samples, those whose key an earlier one has rejected instead of decoded."""
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            yield Rejected(sample.key, Reason.DUPLICATE_KEY)
        else:
            seen.add(sample.key)
            yield sample
