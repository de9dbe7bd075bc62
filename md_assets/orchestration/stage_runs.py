"""What a run of each asset does: unpack the context, call the stage for each archive, record it.

Here: one function for each kind of asset. Not here: keys, policies and dependencies (`orchestration.assets`), the
stages (`stages/`). Stages are imported when a run starts: they bring numpy, Pillow and pyarrow, which the code
location does without.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from md_assets.core.errors import MdAssetsError, SourceError
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.progress import ProgressLines
from md_assets.core.settings import latents_settings, mds_settings
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.archive_run import ArchiveRun
from md_assets.orchestration.metadata import rejects_table
from md_assets.orchestration.partitions import archives_of
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource

ABSENT_SHOWN = 20
"""Archives absent at the source that the log names."""


def observe_archives(context: Any, spec: DatasetSpec, hub: HubResource) -> dg.DataVersionsByPartition:
    """The content id of each archive that the source has, from one listing of each repository."""
    sources = hub.sources()
    content_ids, absent = {}, []
    with _run_failures():
        for archive in spec.archives:
            try:
                content_ids[archive] = sources.locate(spec.locate(archive)).content_id
            except SourceError as error:
                if error.reason != "not_found":
                    raise
                absent.append(archive)
    context.log.info(f"{spec.slug}/archive: {len(content_ids)} archives at the source, {len(absent)} absent")
    if absent:
        context.log.warning(f"{spec.slug}/archive: absent at the source: {', '.join(absent[:ABSENT_SHOWN])}")
    return dg.DataVersionsByPartition(content_ids)


def index_captions(context: dg.AssetExecutionContext, spec: DatasetSpec, hub: HubResource) -> dg.MaterializeResult:
    """Index all annotation files of a dataset."""
    from md_assets.stages.annotations import index_annotations

    sources, root = hub.sources(), DataRoot.from_environment()
    progress = ProgressLines(spec.slug, context.log.info)
    metadata: dict[str, Any] = {}
    versions = []
    for source in spec.annotations:
        with _run_failures():
            remote = sources.locate(source.file)
            ledger = index_annotations(spec, source, remote, root, fetcher=sources, report=progress).ledger
        versions.append(ledger.content_id[:16])
        metadata[f"{source.name}_rows"] = ledger.kept
        metadata[f"{source.name}_source"] = f"{ledger.source['name']} @ {ledger.source['revision']}"
        if ledger.rejected:
            metadata[f"{source.name}_rejected"] = dg.MetadataValue.md(rejects_table(ledger.rejected))
            metadata[f"{source.name}_first_faults"] = dg.MetadataValue.json(ledger.details["first_faults"])
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion("-".join(versions)))


def fetch_archives(
    context: dg.AssetExecutionContext, spec: DatasetSpec, hub: HubResource, images: ImagesResource
) -> None:
    """raw of each archive of the run."""
    from md_assets.stages.raw import fetch_archive
    from md_assets.storage.image_pool import ImagePool

    sources, root, settings = hub.sources(), DataRoot.from_environment(), images.settings()
    run = ArchiveRun(context, root.raw(spec.slug), None)
    with ImagePool(images.num_workers) as pool:
        run.each(
            archives_of(context, spec),
            lambda archive: fetch_archive(
                spec,
                archive,
                lambda: sources.locate(spec.locate(archive)),
                root,
                settings,
                fetcher=sources,
                pool=pool,
                keep_archive=hub.keep_archives,
                report=run.progress,
                on_wait=lambda: run.waiting(archive),
            ),
        )
    run.finish()


def convert_archives(context: dg.AssetExecutionContext, spec: DatasetSpec, images: ImagesResource) -> None:
    """mds of each archive of the run."""
    from md_assets.stages.mds import convert_archive

    root, settings = DataRoot.from_environment(), images.settings()
    run = ArchiveRun(context, root.mds(spec.slug), root.raw(spec.slug))
    run.each(
        archives_of(context, spec),
        lambda archive: convert_archive(
            spec, archive, root, settings, report=run.progress, on_wait=lambda: run.waiting(archive)
        ),
    )
    run.finish()


def encode_archives(
    context: dg.AssetExecutionContext,
    spec: DatasetSpec,
    hub: HubResource,
    images: ImagesResource,
    encoders: EncodersResource,
) -> None:
    """latents of each archive of the run; no process is started when all are published."""
    from md_assets.orchestration.latents_launch import encode
    from md_assets.stages.latents import LatentsPlan
    from md_assets.stages.once import Outcome

    root, processes = DataRoot.from_environment(), encoders.process_count()
    workers = images.num_workers if images.num_workers is not None else len(os.sched_getaffinity(0))
    with _run_failures():
        plan = LatentsPlan(
            data_root=str(root.path),
            dataset=spec.slug,
            archives=tuple(archives_of(context, spec)),
            mds_settings=mds_settings(spec, images.settings()),
            encoders=encoders.settings(hub.client()),
            encoder_tag=encoders.tag(),
            batch_size=encoders.batch_size,
            num_workers=-(-workers // processes),
        )
    run = ArchiveRun(context, plan.latents_dir, plan.mds_dir)
    pending = []
    for archive in plan.archives:
        try:
            ledger = plan.current(archive)
        except MdAssetsError:
            ledger = None  # the encoding process says what is wrong with it
        if ledger is None:
            pending.append(archive)
        else:
            run.record(Outcome(ledger, passed_over=True))
    if pending:
        encode(context, run, dataclasses.replace(plan, archives=tuple(pending)), processes, hub.environment())
    run.finish()


def merge_mds(spec: DatasetSpec, images: ImagesResource) -> dg.MaterializeResult:
    """The merged indexes of mds, one for each split."""
    return _merge(spec, DataRoot.from_environment().mds(spec.slug), mds_settings(spec, images.settings()))


def merge_latents(
    spec: DatasetSpec, hub: HubResource, images: ImagesResource, encoders: EncodersResource
) -> dg.MaterializeResult:
    """The merged indexes of the latents of one encoder pair, one for each split."""
    stage_dir = DataRoot.from_environment().latents(spec.slug, encoders.tag())
    with _run_failures():
        mds = mds_settings(spec, images.settings())
        settings = latents_settings(mds, encoders.settings(hub.client()))
    return _merge(spec, stage_dir, settings)


def _merge(spec: DatasetSpec, stage_dir: StageDir, settings: Mapping[str, Any]) -> dg.MaterializeResult:
    """Merge the index of each split; a split of which nothing is published is left out."""
    from md_assets.stages.index import merge_indexes

    rows = ["| split | archives | samples | shards | stale | missing | empty |", "| --- " + "| ---: " * 6 + "|"]
    metadata: dict[str, Any] = {}
    samples = 0
    for split in spec.splits or ("",):
        archives = [archive for archive in spec.archives if spec.split_of(archive) == split]
        with _run_failures():
            index = merge_indexes(stage_dir, split, archives, settings)
        if index is None:
            rows.append(f"| {split} | 0 | 0 | 0 | | {len(archives)} | |")
            continue
        left_out = " | ".join(str(len(ids)) for ids in (index.stale, index.missing, index.empty))
        rows.append(f"| {split} | {len(index.archives)} | {index.samples} | {index.shards} | {left_out} |")
        metadata[f"{split}_index" if split else "index"] = dg.MetadataValue.path(str(index.path))
        samples += index.samples
    if not metadata:
        raise dg.Failure(
            f"{spec.slug}/{stage_dir.asset}: no archive is published with these settings. Materialize some first.",
            allow_retries=False,
        )
    return dg.MaterializeResult(
        metadata={"dagster/row_count": samples, "archives": dg.MetadataValue.md("\n".join(rows)), **metadata}
    )


@contextmanager
def _run_failures() -> Iterator[None]:
    """An error that concerns the whole run, as Dagster's failure; retried if waiting may help."""
    try:
        yield
    except MdAssetsError as error:
        raise dg.Failure(str(error), allow_retries=getattr(error, "transient", False)) from error
