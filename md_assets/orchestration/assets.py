"""The assets of a dataset, made from its spec: the same for every dataset.

Here: keys, dependencies, policies and bodies that hand over to a stage. Not here: the stages, nor how a range of
archives is run and recorded (`orchestration.archive_run`). No `from __future__ import annotations`: Dagster reads the
annotations of asset functions.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, Optional

import dagster as dg

from md_assets.core.errors import MdAssetsError, SourceError
from md_assets.core.paths import DataRoot, Stage, StageDir
from md_assets.core.settings import latents_settings, mds_settings
from md_assets.core.spec import DatasetSpec
from md_assets.orchestration.archive_run import ArchiveRun
from md_assets.orchestration.checks import check_specs
from md_assets.orchestration.metadata import rejects_table
from md_assets.orchestration.partitions import archive_partitions, archives_of
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.storage.hub import HubClient

OWNERS = ["team:data-platform"]

ARCHIVES_PER_RUN: dict[Stage, int] = {"raw": 8, "mds": 16, "latents": 64}
"""Archives that a backfill gives to one run. The numbers must differ: Dagster fuses assets of equal policy into one
run, in which one failed raw archive would take mds and latents of all the others with it."""

RETRIES = dg.RetryPolicy(max_retries=2, delay=60, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
"""For steps in which an archive failed of something that passes. A Hub client has waited for minutes by then."""

POOL_HUB = "hub"
"""Limits concurrent downloads: the Hub counts requests by address and account."""

POOL_GPU = "gpu"
"""Limits concurrent encoding runs: each takes all of this machine's GPUs."""


def dataset_assets(spec: DatasetSpec) -> list[Any]:
    """All assets of one dataset."""
    assets = [_archive(spec), _raw(spec), _mds(spec), _latents(spec), _mds_index(spec), _latents_index(spec)]
    if spec.annotations:
        assets.insert(1, _annotations(spec))
    return assets


def asset_key(spec: DatasetSpec, name: str) -> dg.AssetKey:
    """`<ds>/<name>`."""
    return dg.AssetKey([spec.slug, name])


def _archive(spec: DatasetSpec) -> Any:
    @dg.observable_source_asset(
        key=asset_key(spec, "archive"),
        partitions_def=archive_partitions(spec),
        group_name=spec.slug,
        description=f"Archives of {spec.title} at their source, observed: the data version of each is its content id "
        f"(LFS sha256), from one listing call.\n\n{spec.datasheet}",
        tags={"dagster/kind/huggingface": ""},
    )
    def archive(context, hub: HubResource):  # type: ignore[no-untyped-def]
        return dg.DataVersionsByPartition(_content_ids(context, spec, hub.client()))

    return archive


def _content_ids(context: Any, spec: DatasetSpec, client: HubClient) -> dict[str, str]:
    """Content id of each archive that the source has."""
    content_ids, absent = {}, []
    try:
        for archive in spec.archives:
            file = spec.locate(archive)
            remote = client.listing(file.repo, file.repo_type).files.get(file.path)
            if remote is None:
                absent.append(archive)
            else:
                content_ids[archive] = remote.content_id
    except SourceError as error:
        raise dg.Failure(str(error), allow_retries=error.transient) from error
    context.log.info(f"{spec.slug}/archive: {len(content_ids)} archives at the source, {len(absent)} absent")
    if absent:
        context.log.warning(f"{spec.slug}/archive: absent at the source: {', '.join(absent[:20])}")
    return content_ids


def _annotations(spec: DatasetSpec) -> Any:
    @dg.asset(
        key=asset_key(spec, "annotations"),
        group_name=spec.slug,
        owners=OWNERS,
        kinds={"huggingface", "parquet"},
        pool=POOL_HUB,
        retry_policy=RETRIES,
        description=f"Captions of {spec.title}, indexed once so that one archive's captions are read without scanning "
        "the rest.",
    )
    def annotations(context: dg.AssetExecutionContext, hub: HubResource) -> dg.MaterializeResult:
        from md_assets.core.progress import ProgressLines
        from md_assets.stages.annotations import index_annotations

        client, root, metadata, versions = hub.client(), DataRoot.from_environment(), {}, []
        progress = ProgressLines(spec.slug, context.log.info)
        for source in spec.annotations:
            try:
                remote = client.locate(source.file)
                ledger = index_annotations(spec, source, remote, root, fetcher=client, report=progress).ledger
            except MdAssetsError as error:
                raise dg.Failure(str(error), allow_retries=getattr(error, "transient", False)) from error
            versions.append(ledger.content_id[:16])
            metadata[f"{source.name}_rows"] = dg.MetadataValue.int(ledger.kept)
            metadata[f"{source.name}_source"] = dg.MetadataValue.text(ledger.source["name"])
            if ledger.rejected:
                metadata[f"{source.name}_rejected"] = dg.MetadataValue.md(rejects_table(ledger.rejected))
                metadata[f"{source.name}_first_faults"] = dg.MetadataValue.json(ledger.details["first_faults"])
        return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion("-".join(versions)))

    return annotations


def _archive_asset(
    spec: DatasetSpec,
    stage: Stage,
    body: Callable[..., None],
    *,
    deps: Sequence[str],
    pool: Optional[str],
    kinds: set[str],
    description: str,
) -> Any:
    """A stage's asset: partitioned by archive, run in ranges, recorded archive by archive."""
    key, partitions_def = asset_key(spec, stage), archive_partitions(spec)
    return dg.multi_asset(
        name=f"{spec.slug}__{stage}",
        specs=[
            dg.AssetSpec(
                key,
                deps=[asset_key(spec, name) for name in deps],
                partitions_def=partitions_def,
                group_name=spec.slug,
                owners=OWNERS,
                kinds=kinds,
                description=description,
                skippable=True,
            )
        ],
        check_specs=check_specs(key, stage, partitions_def),
        can_subset=True,  # so that checks are recorded by the body, archive by archive
        backfill_policy=dg.BackfillPolicy.multi_run(ARCHIVES_PER_RUN[stage]),
        pool=pool,
        retry_policy=RETRIES,
    )(body)


def _raw(spec: DatasetSpec) -> Any:
    def raw(context: dg.AssetExecutionContext, hub: HubResource, images: ImagesResource):  # type: ignore[no-untyped-def]
        from md_assets.stages.raw import fetch_archive
        from md_assets.storage.image_pool import ImagePool

        client, root = hub.client(), DataRoot.from_environment()
        archives = archives_of(context, spec)
        run = ArchiveRun(context, asset_key(spec, "raw"), root.raw(spec.slug), None)
        with ImagePool(images.num_workers) as pool:
            run.each(
                archives,
                lambda archive: fetch_archive(
                    spec,
                    archive,
                    lambda: client.locate(spec.locate(archive)),
                    root,
                    images.settings(),
                    fetcher=client,
                    pool=pool,
                    keep_archive=hub.keep_archives,
                    report=run.progress,
                    on_wait=lambda: run.waiting(archive),
                ),
            )
        run.finish(archives)
        yield from ()

    return _archive_asset(
        spec,
        "raw",
        raw,
        deps=["archive"],
        pool=POOL_HUB,
        kinds={"huggingface", "python"},
        description=f"Images of one archive of {spec.title}: fetched, verified, filtered and resized, as an uncompressed "
        f"WebDataset-shaped tar.\n\n{spec.datasheet}",
    )


def _mds(spec: DatasetSpec) -> Any:
    def mds(context: dg.AssetExecutionContext, images: ImagesResource):  # type: ignore[no-untyped-def]
        from md_assets.stages.mds import convert_archive

        root = DataRoot.from_environment()
        archives = archives_of(context, spec)
        run = ArchiveRun(context, asset_key(spec, "mds"), root.mds(spec.slug), root.raw(spec.slug))
        run.each(
            archives,
            lambda archive: convert_archive(
                spec,
                archive,
                root,
                images.settings(),
                report=run.progress,
                on_wait=lambda: run.waiting(archive),
            ),
        )
        run.finish(archives)
        yield from ()

    return _archive_asset(
        spec,
        "mds",
        mds,
        deps=["raw", "annotations"] if spec.annotations else ["raw"],
        pool=None,
        kinds={"mosaicml", "python"},
        description=f"MDS shards of one archive of {spec.title}: key, jpg, caption, width, height.",
    )


def _latents(spec: DatasetSpec) -> Any:
    def latents(  # type: ignore[no-untyped-def]
        context: dg.AssetExecutionContext, hub: HubResource, images: ImagesResource, encoders: EncodersResource
    ):
        from md_assets.orchestration.latents_launch import encode
        from md_assets.stages.latents import LatentsPlan
        from md_assets.stages.once import Outcome

        root, stage_dir = DataRoot.from_environment(), _latents_dir(spec, encoders)
        archives = archives_of(context, spec)
        run = ArchiveRun(context, asset_key(spec, "latents"), stage_dir, root.mds(spec.slug))
        processes = encoders.process_count()
        workers = images.num_workers if images.num_workers is not None else len(os.sched_getaffinity(0))
        plan = LatentsPlan(
            data_root=str(root.path),
            dataset=spec.slug,
            archives=tuple(archives),
            images=images.settings(),
            encoders=_encoder_settings(encoders, hub),
            encoder_tag=encoders.tag(),
            batch_size=encoders.batch_size,
            model_dtype=encoders.model_dtype,
            num_workers=-(-workers // processes),
        )
        pending = []
        for archive in archives:
            try:
                ledger = plan.current(archive)
            except MdAssetsError:
                pending.append(archive)  # the process says what is wrong with it
                continue
            if ledger is None:
                pending.append(archive)
            else:
                run.record(Outcome(ledger, passed_over=True))
        if pending:
            encode(context, run, dataclasses.replace(plan, archives=tuple(pending)), processes)
        run.finish(archives)
        yield from ()

    return _archive_asset(
        spec,
        "latents",
        latents,
        deps=["mds"],
        pool=POOL_GPU,
        kinds={"pytorch", "mosaicml"},
        description=f"Latents of one archive of {spec.title} as MDS shards: key, caption, caption_latents, latents_256, "
        "latents_512, width, height. Encoded in processes of their own, on GPUs where there are some.",
    )


def _encoder_settings(encoders: EncodersResource, hub: HubResource) -> Any:
    try:
        return encoders.settings(hub.client())
    except MdAssetsError as error:
        raise dg.Failure(str(error), allow_retries=getattr(error, "transient", False)) from error


def _latents_dir(spec: DatasetSpec, encoders: EncodersResource) -> StageDir:
    return DataRoot.from_environment().latents(spec.slug, encoders.tag())


def _mds_index(spec: DatasetSpec) -> Any:
    @dg.asset(**_index_options(spec, "mds"))
    def mds_index(images: ImagesResource) -> dg.MaterializeResult:
        settings = mds_settings(images.settings())
        return _merge(spec, DataRoot.from_environment().mds(spec.slug), settings)

    return mds_index


def _latents_index(spec: DatasetSpec) -> Any:
    @dg.asset(**_index_options(spec, "latents"))
    def latents_index(hub: HubResource, images: ImagesResource, encoders: EncodersResource) -> dg.MaterializeResult:
        settings = latents_settings(images.settings(), _encoder_settings(encoders, hub))
        return _merge(spec, _latents_dir(spec, encoders), settings)

    return latents_index


def _index_options(spec: DatasetSpec, stage: Stage) -> dict[str, Any]:
    return {
        "key": asset_key(spec, f"{stage}_index"),
        "deps": [asset_key(spec, stage)],
        "group_name": spec.slug,
        "owners": OWNERS,
        "kinds": {"mosaicml", "json"},
        "description": f"Merged index.json over all published {stage} archives of {spec.title} with the same settings: "
        "what a StreamingDataset is pointed at.",
    }


def _merge(spec: DatasetSpec, stage_dir: StageDir, settings: dict[str, Any]) -> dg.MaterializeResult:
    """Merge the index of each split; a split of which nothing is published is left out."""
    from md_assets.stages.index import merge_indexes

    rows = ["| split | archives | samples | shards | stale | missing | empty |", "| --- " + "| ---: " * 6 + "|"]
    samples, merged = 0, {}
    for split in spec.splits or ("",):
        archives = [archive for archive in spec.archives if spec.split_of(archive) == split]
        try:
            index = merge_indexes(stage_dir, split, archives, settings)
        except MdAssetsError as error:
            raise dg.Failure(str(error), allow_retries=False) from error
        if index is None:
            rows.append(f"| {split} | 0 | | | | {len(archives)} | |")
            continue
        merged[f"index_{split}" if split else "index"] = dg.MetadataValue.path(str(index.path))
        samples += index.samples
        counts = (index.archives, index.stale, index.missing, index.empty)
        merged_count, *left_out = (len(ids) for ids in counts)
        rows.append(f"| {split} | {merged_count} | {index.samples} | {index.shards} | {' | '.join(map(str, left_out))} |")
    if not merged:
        raise dg.Failure(
            f"{spec.slug}/{stage_dir.stage}: no archive is published with these settings. Materialize some first.",
            allow_retries=False,
        )
    return dg.MaterializeResult(
        metadata={"dagster/row_count": samples, "archives": dg.MetadataValue.md("\n".join(rows)), **merged}
    )
