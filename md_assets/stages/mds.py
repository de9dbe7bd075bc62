"""mds: convert one raw archive to MDS shards of images and captions.

Here: the join of images and captions. Not here: the shard format (`storage.mds`), columns (`core.schema`),
the caption index (`storage.captions`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from md_assets.core.errors import ArchiveError
from md_assets.core.ledger import Ledger, Reason
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.schema import MDS_COLUMNS
from md_assets.core.settings import ImageSettings, mds_settings, raw_settings
from md_assets.core.spec import DatasetSpec
from md_assets.stages.annotations import as_unicode
from md_assets.stages.once import Made, Outcome, archive_errors, once, published, upstream_ledger, versions_of
from md_assets.storage.captions import read_captions
from md_assets.storage.mds import ShardWriter, ledgered_files
from md_assets.storage.publish import scratch, with_files
from md_assets.storage.raw_tar import iter_raw_tar


def convert_archive(
    spec: DatasetSpec,
    archive: str,
    root: DataRoot,
    images: ImageSettings,
    *,
    report: ReportProgress = silent,
    on_wait: Callable[[], None] | None = None,
) -> Outcome:
    """Join the raw images of `archive` with their captions and publish them as MDS shards.

    Args:
        spec, archive: which one.
        root: where raw and annotations are published, and the shards will be.
        images: the settings that raw must have been made with.
        report: told of rows written.
        on_wait: called when another process works on the same archive.

    Raises:
        ArchiveError: raw or annotations are missing, stale or damaged.

    May be repeated and killed at any time; the same raw archive and captions give the same bytes.
    """
    raw_dir = root.raw(spec.slug)
    with archive_errors(spec.slug, archive):
        raw = upstream_ledger(raw_dir, archive, raw_settings(images))
        annotations = _annotations_ledger(spec, archive, root)
    settings, inputs = mds_settings(spec, images), {"raw": raw.content_id}
    if annotations is not None:
        inputs["annotations"] = annotations.content_id

    def make(workspace: Path) -> Made:
        captions: Mapping[str, str] = {}
        if annotations is not None:
            captions = read_captions(root.annotations(spec.slug).data(annotations.archive), archive)
        shards = scratch(workspace, "shards")
        return Made(
            shards, _write_shards(spec, archive, raw, raw_dir.data(archive), captions, shards, settings, inputs, report)
        )

    return once(root.mds(spec.slug), archive, settings, inputs, make, on_wait)


def _annotations_ledger(spec: DatasetSpec, archive: str, root: DataRoot) -> Ledger | None:
    source = spec.annotation_of(archive)
    if source is None:
        return None
    ledger = published(root.annotations(spec.slug), source.name)
    if ledger is None:
        raise ArchiveError(
            spec.slug,
            archive,
            f"its captions ({source.name}) are not indexed",
            f"Materialize {spec.slug}/annotations",
            reason="upstream_missing",
        )
    return ledger


def _write_shards(
    spec: DatasetSpec,
    archive: str,
    raw: Ledger,
    raw_tar: Path,
    captions: Mapping[str, str],
    directory: Path,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    report: ReportProgress,
) -> Ledger:
    read = 0
    seen: set[str] = set()
    rejected: dict[str, list[str]] = defaultdict(list)
    with ShardWriter(directory, MDS_COLUMNS) as writer:
        for sample in iter_raw_tar(raw_tar, raw.files[0]):
            read += 1
            seen.add(sample.key)
            caption = sample.caption if sample.caption is not None else captions.get(sample.key)
            caption = as_unicode(caption or "").replace("\0", "")
            if not caption.strip():
                rejected[Reason.NO_CAPTION].append(sample.key)
                continue
            writer.write(
                {
                    "key": sample.key,
                    "jpg": sample.jpeg,
                    "caption": caption,
                    "width": sample.width,
                    "height": sample.height,
                }
            )
            report(Progress(archive, "converts", read, raw.kept, "images", read))
    if read != raw.kept:
        raise ArchiveError(
            spec.slug,
            archive,
            f"raw holds {read} samples, its ledger says {raw.kept}",
            f"Delete the ledger and materialize {spec.slug}/raw of it again",
            reason="unbalanced",
        )
    details = {}
    if spec.annotations:
        seen.update(key for keys in raw.rejected.values() for key in keys)
        details["orphan_captions"] = len(captions.keys() - seen)
    ledger = Ledger(
        dataset=spec.slug,
        archive=archive,
        stage="mds",
        read=read,
        kept=writer.row_count,
        rejected=dict(rejected),
        bytes_in=raw.bytes_out,
        bytes_out=0,
        seconds=0.0,
        source=raw.source,
        inputs=dict(inputs),
        settings=dict(settings),
        versions=versions_of("mosaicml-streaming"),
        files=(),
        details=details,
    )
    return with_files(ledger, ledgered_files(directory, archive))
