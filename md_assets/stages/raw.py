"""raw: fetch one upstream archive and keep its images, filtered and resized.

Here: the stage. Not here: where archives are and downloading (`storage.sources`), opening archives
(`storage.archives`), the rules for pixels (`storage.images`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from md_assets.core.ledger import Ledger, Reason
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.settings import ImageSettings, raw_settings
from md_assets.core.source import BytesProgress, Checksum, RemoteFile
from md_assets.core.spec import DatasetSpec, OrphanCaption, Rejected, Sample
from md_assets.stages.once import Made, Outcome, archive_errors, once, recorded, versions_of
from md_assets.storage.archives import iter_members
from md_assets.storage.free_space import require_space
from md_assets.storage.image_pool import Prepared
from md_assets.storage.images import CODECS
from md_assets.storage.part_file import Digest, verified_size
from md_assets.storage.publish import scratch, with_files
from md_assets.storage.raw_tar import RawTarWriter


class Fetcher(Protocol):
    """Brings a remote file here, verified, and tells its size and content id; see `storage.sources.Sources.fetch`."""

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> RemoteFile: ...


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
        keep_archive: whether the upstream file stays, below `<ds>/archives/`; it is deleted otherwise. One that was
            kept is taken instead of fetching it again, if it has the checksum that the source tells, or where it
            tells none, the one that the archive had before.
        report: told of bytes fetched and images prepared.
        on_wait: called when another process works on the same archive.

    Raises:
        ArchiveError: it cannot be fetched or read.

    Temporary space: the archive and its output; that there is room is checked before it is fetched. May be repeated and
    killed at any time; a repeated run continues a download where it was cut off.
    """
    stage_dir = root.raw(spec.slug)
    with archive_errors(spec.slug, archive):
        remote = locate()
    settings, inputs = raw_settings(images), {"archive": remote.content_id}
    suffix = "".join(Path(remote.name).suffixes[-1:])
    kept = root.kept_archive(spec.slug, archive, suffix)

    def make(workspace: Path) -> Made:
        fetched = _known_again(kept, remote, recorded(stage_dir, archive))
        upstream = kept if fetched else workspace / f"archive{suffix}"
        size_bytes = remote.size_bytes or (fetched and fetched.size_bytes) or 0

        def require_room(there_bytes: int) -> None:
            # What is made of an archive is at most as large as the archive.
            require_space(remote.name, root.path, 2 * size_bytes - there_bytes)

        def fetched_bytes(done: int, total: int) -> None:
            nonlocal size_bytes
            if total > size_bytes:  # a size that came with the answer only
                size_bytes = total
                require_room(done)
            report(Progress(archive, "fetches", done, total or None, "bytes"))

        require_room(max(map(_size_bytes, (upstream, upstream.with_name(f"{upstream.name}.part")))))
        if fetched is None:
            fetched = fetcher.fetch(remote, upstream, fetched_bytes)
        ledger, tar = _keep_images(spec, archive, fetched, upstream, scratch(workspace, "out"), images, pool, report)
        if keep_archive and upstream != kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            upstream.replace(kept)
        return Made(tar, ledger)

    return once(stage_dir, archive, settings, inputs, make, on_wait)


def _known_again(kept: Path, remote: RemoteFile, before: Ledger | None) -> RemoteFile | None:
    """`remote` with its size and content id if the kept file is it, else None.

    Args:
        kept: where the archive is if it was kept.
        before: what became of the archive the last time, whose content id counts where the source tells none.
    """
    checksum = remote.checksum
    if before is not None and not remote.content_id:
        checksum = Checksum("sha256", before.inputs["archive"])
    if checksum is None:
        return None
    size_bytes = verified_size(kept, remote, Digest(checksum.algorithm, checksum.hexdigest))
    if size_bytes is None:
        return None
    return replace(remote, size_bytes=size_bytes, content_id=remote.content_id or checksum.hexdigest)


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


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

    members = iter_members(upstream, spec.archive_format, images.max_member_bytes, on_position, spec.parquet)
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
        versions=versions_of(*CODECS),
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
