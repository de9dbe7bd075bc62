"""mds: convert one raw archive to MDS shards of images and captions.

A sample is judged in this order: without a row of captions it is `no_caption`; where rows have safety scores, one above
the threshold or without a number is `nsfw`, whatever its text; a text that is empty, also after cleaning, is
`no_caption`. `orphan_captions` counts captions of the archive that have no sample in it. Where a row does not tell its
archive, those are the captions whose number lies between the archive's lowest and highest.

Here: the join of images and captions. Not here: the shard format (`storage.mds`), columns (`core.schema`),
the caption index (`storage.captions`), cleaning (`storage.caption_cleaning`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from md_assets.core.errors import ArchiveError
from md_assets.core.ledger import Ledger, Reason
from md_assets.core.paths import DataRoot
from md_assets.core.progress import Progress, ReportProgress, silent
from md_assets.core.schema import MDS_COLUMNS
from md_assets.core.settings import ImageSettings, mds_settings, raw_settings
from md_assets.core.spec import DatasetSpec
from md_assets.stages.annotations import as_unicode
from md_assets.stages.once import (
    UPSTREAM_MISSING,
    Made,
    Outcome,
    archive_errors,
    once,
    published,
    refuse_pruned,
    upstream_ledger,
    versions_of,
)
from md_assets.storage.caption_cleaning import CLEANING_PACKAGES, cleaned_caption
from md_assets.storage.captions import IndexedCaption, read_captions, read_numbered_captions
from md_assets.storage.mds import ShardWriter, ledgered_files
from md_assets.storage.publish import scratch, with_files
from md_assets.storage.raw_tar import RawSample, iter_raw_tar


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
        refuse_pruned(raw_dir, archive)
        raw_tar = raw_dir.data(archive)
        captions: Mapping[str, IndexedCaption] = {}
        orphans = raw.details.get("orphan_captions", 0)
        if annotations is not None:
            index = root.annotations(spec.slug).data(annotations.archive)
            captions, without_sample = _read_captions(spec, archive, raw, raw_tar, index)
            orphans += without_sample
        shards = scratch(workspace, "shards")
        judge = _caption_judge(spec, captions, images)
        kept, rejected, seen = _write_shards(spec, archive, raw, raw_tar, judge, shards, report)
        orphans += len(captions.keys() - seen)
        ledger = Ledger(
            dataset=spec.slug,
            archive=archive,
            stage="mds",
            read=raw.kept,
            kept=kept,
            rejected=rejected,
            bytes_in=raw.bytes_out,
            bytes_out=0,
            seconds=0.0,
            source=raw.source,
            inputs=dict(inputs),
            settings=dict(settings),
            versions=versions_of("mosaicml-streaming", *(CLEANING_PACKAGES if spec.caption_cleaning else ())),
            files=(),
            details={"orphan_captions": orphans},
        )
        return Made(shards, with_files(ledger, ledgered_files(shards, archive)))

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
            reason=UPSTREAM_MISSING,
        )
    return ledger


def _read_captions(
    spec: DatasetSpec, archive: str, raw: Ledger, raw_tar: Path, index: Path
) -> tuple[dict[str, IndexedCaption], int]:
    """Captions of the archive by the key of their sample; and how many it was found to have without a sample, which are
    left out of the former where they are not told to be the archive's."""
    source = spec.annotation_of(archive)
    if source is None or source.number_of is None:
        return read_captions(index, archive), 0
    keys = {key for rejected in raw.rejected.values() for key in rejected}
    keys.update(sample.key for sample in iter_raw_tar(raw_tar, raw.files[0]))
    numbers = []
    for key in keys:
        with suppress(ValueError):  # a sample without a number has no caption
            numbers.append(source.number_of(key))
    captions: dict[str, IndexedCaption] = {}
    orphans = 0
    if numbers:
        for caption in read_numbered_captions(index, min(numbers), max(numbers)):
            key = f"{archive}/{caption.key}"
            if key in keys:
                captions[key] = caption
            else:
                orphans += 1
    return captions, orphans


_Judge = Callable[[RawSample], tuple[str, str]]
"""A sample -> its caption, and the reason to reject it (`core.ledger.Reason`); one of them is empty."""


def _caption_judge(spec: DatasetSpec, captions: Mapping[str, IndexedCaption], images: ImageSettings) -> _Judge:
    # In float32 as the scores are, so that a score of just the threshold is not above it.
    threshold = np.float32(images.safety_threshold)

    def judge(sample: RawSample) -> tuple[str, str]:
        indexed = captions.get(sample.key)
        # Before the text, so that the count of unsafe samples does not depend on their captions. NaN is not <= either.
        if spec.scored and indexed is not None and not np.float32(indexed.unsafe) <= threshold:
            return "", Reason.NSFW
        caption = sample.caption if indexed is None or sample.caption is not None else indexed.text
        caption = as_unicode(caption or "").replace("\0", "")
        if caption.strip() and spec.caption_cleaning:
            caption = cleaned_caption(caption)
        return (caption, "") if caption.strip() else ("", Reason.NO_CAPTION)

    return judge


def _write_shards(
    spec: DatasetSpec,
    archive: str,
    raw: Ledger,
    raw_tar: Path,
    judge: _Judge,
    directory: Path,
    report: ReportProgress,
) -> tuple[int, dict[str, list[str]], set[str]]:
    """Write the samples that have a caption; returns how many, those rejected by reason, and all keys of raw."""
    read = 0
    seen = {key for keys in raw.rejected.values() for key in keys}
    rejected: dict[str, list[str]] = defaultdict(list)
    with ShardWriter(directory, MDS_COLUMNS) as writer:
        for sample in iter_raw_tar(raw_tar, raw.files[0]):
            read += 1
            seen.add(sample.key)
            caption, reason = judge(sample)
            if reason:
                rejected[reason].append(sample.key)
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
    return writer.row_count, dict(rejected), seen
