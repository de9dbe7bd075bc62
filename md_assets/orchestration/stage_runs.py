"""What a run of each asset does: unpack the context, call the stage for each archive, record it.

Here: one function for each kind of asset. Not here: keys, policies and dependencies (`orchestration.assets`), the
stages (`stages/`). Stages are imported when a run starts: they bring numpy, Pillow and pyarrow, which the code
location does without.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg

from md_assets.core.errors import MdAssetsError
from md_assets.core.names import first_of
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.progress import ProgressLines
from md_assets.core.settings import latents_settings, mds_settings, subset_settings
from md_assets.core.spec import DatasetSpec, RawOnly, Subset
from md_assets.orchestration.archive_run import REASON_KEY, TRANSIENT_KEY, ArchiveRun
from md_assets.orchestration.checks import evaluate
from md_assets.orchestration.failed_checks import OF_WHAT_IS_ON_DISK, damaged_archives
from md_assets.orchestration.metadata import archive_metadata, rejects_table
from md_assets.orchestration.partitions import archives_of
from md_assets.orchestration.refresh import find_changes
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.orchestration.source_checks import lists_metadata

ABSENT_SHOWN = 20
"""Archives absent at the source that the log names."""


def observe_archives(context: Any, spec: DatasetSpec, hub: HubResource) -> dg.DataVersionsByPartition:
    """The content id of each archive that the source has, as far as it is not known yet, so that an observation stores
    as many events as there are changes. What changed is said, and of a list of links when they expire."""
    sources = hub.sources()
    with _run_failures():
        content_ids, absent = sources.content_ids({archive: spec.locate(archive) for archive in spec.archives})
        changes = find_changes(context.instance, spec, sources, content_ids, absent, DataRoot.from_environment())
        facts = {**changes.metadata(), **lists_metadata(spec, sources)}
    context.log_event(dg.AssetObservation(dg.AssetKey([spec.slug, "archive"]), metadata=facts))
    for line in changes.lines():
        context.log.info(f"{spec.slug}/archive: {line}")
    if absent:
        context.log.info(f"{spec.slug}/archive: absent at the source: {first_of(absent, ABSENT_SHOWN)}")
    news = {*changes.new, *changes.changed}
    return dg.DataVersionsByPartition({archive: of for archive, of in content_ids.items() if archive in news})


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
) -> list[dg.MaterializeResult]:
    """raw of each archive of the run."""
    from md_assets.stages.raw import fetch_archive
    from md_assets.storage.image_pool import ImagePool

    sources, root, settings = hub.sources(), DataRoot.from_environment(), images.settings()
    stage_dir = root.raw(spec.slug)
    run = ArchiveRun(context, stage_dir, None)
    with ImagePool(images.num_workers) as pool:
        run.each(
            _archives(context, spec, stage_dir),
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
    return run.finish()


def convert_archives(
    context: dg.AssetExecutionContext, spec: DatasetSpec, images: ImagesResource
) -> list[dg.MaterializeResult]:
    """mds of each archive of the run."""
    from md_assets.stages.mds import convert_archive

    root, settings = DataRoot.from_environment(), images.settings()
    stage_dir = root.mds(spec.slug)
    run = ArchiveRun(context, stage_dir, root.raw(spec.slug))
    run.each(
        _archives(context, spec, stage_dir),
        lambda archive: convert_archive(
            spec, archive, root, settings, report=run.progress, on_wait=lambda: run.waiting(archive)
        ),
    )
    return _finish(context, run, root.raw(spec.slug))


def encode_archives(
    context: dg.AssetExecutionContext,
    spec: DatasetSpec,
    hub: HubResource,
    images: ImagesResource,
    encoders: EncodersResource,
) -> list[dg.MaterializeResult]:
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
            archives=tuple(_archives(context, spec, root.latents(spec.slug, encoders.tag()))),
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
    return _finish(context, run, plan.mds_dir)


def select_mds(
    context: dg.AssetExecutionContext, spec: DatasetSpec, subset: Subset, images: ImagesResource
) -> list[dg.MaterializeResult]:
    """mds of a subset, for each archive of the run."""
    root = DataRoot.from_environment()
    settings = mds_settings(spec, images.settings())
    return _select(context, spec, subset, root.mds(spec.slug), root.mds(spec.slug, subset.name), settings)


def select_latents(
    context: dg.AssetExecutionContext,
    spec: DatasetSpec,
    subset: Subset,
    hub: HubResource,
    images: ImagesResource,
    encoders: EncodersResource,
) -> list[dg.MaterializeResult]:
    """Latents of a subset, for each archive of the run."""
    root, tag = DataRoot.from_environment(), encoders.tag()
    with _run_failures():
        settings = latents_settings(mds_settings(spec, images.settings()), encoders.settings(hub.client()))
    return _select(
        context, spec, subset, root.latents(spec.slug, tag), root.latents(spec.slug, tag, subset.name), settings
    )


def _select(
    context: dg.AssetExecutionContext,
    spec: DatasetSpec,
    subset: Subset,
    whole_dir: StageDir,
    subset_dir: StageDir,
    whole_settings: Mapping[str, Any],
) -> list[dg.MaterializeResult]:
    from md_assets.stages.subset import select_archive

    run = ArchiveRun(context, subset_dir, whole_dir)
    with _run_failures():
        subset_settings(whole_settings, subset)  # what would refuse every archive refuses the run
    run.each(
        _archives(context, spec, subset_dir),
        lambda archive: select_archive(
            subset,
            archive,
            whole_dir,
            subset_dir,
            whole_settings,
            report=run.progress,
            on_wait=lambda: run.waiting(archive),
        ),
    )
    return _finish(context, run, whole_dir)


def fetch_beside(
    context: dg.AssetExecutionContext,
    spec: DatasetSpec,
    extras: Sequence[RawOnly],
    hub: HubResource,
    images: ImagesResource,
) -> dg.MaterializeResult:
    """Fetch what a dataset has beside its archives."""
    from md_assets.stages.raw_only import fetch_raw_only
    from md_assets.storage.image_pool import ImagePool

    sources, root, settings = hub.sources(), DataRoot.from_environment(), images.settings()
    progress = ProgressLines(spec.slug, context.log.info)
    metadata: dict[str, Any] = {}
    versions = []
    with ImagePool(images.num_workers) as pool:
        for extra in extras:
            with _run_failures():
                outcome = fetch_raw_only(
                    spec,
                    extra,
                    functools.partial(sources.locate, extra.file),
                    root,
                    settings,
                    fetcher=sources,
                    pool=pool,
                    keep_archive=hub.keep_archives,
                    report=progress,
                )
            versions.append(outcome.ledger.content_id[:16])
            facts = archive_metadata(root.raw(spec.slug), outcome.ledger, outcome.passed_over)
            metadata |= {f"{extra.name} {name}": value for name, value in facts.items() if name != "dagster/row_count"}
    return dg.MaterializeResult(metadata=metadata, data_version=dg.DataVersion("-".join(versions)))


def merge_mds(spec: DatasetSpec, images: ImagesResource, subset: Subset | None = None) -> dg.MaterializeResult:
    """The merged indexes of mds, of the whole or a subset, one for each split."""
    with _run_failures():
        settings = _of_subset(mds_settings(spec, images.settings()), subset)
    return _merge(spec, DataRoot.from_environment().mds(spec.slug, subset.name if subset else ""), settings)


def merge_latents(
    spec: DatasetSpec,
    hub: HubResource,
    images: ImagesResource,
    encoders: EncodersResource,
    subset: Subset | None = None,
) -> dg.MaterializeResult:
    """The merged indexes of the latents of one encoder pair, of the whole or a subset, one for each split."""
    stage_dir = DataRoot.from_environment().latents(spec.slug, encoders.tag(), subset.name if subset else "")
    with _run_failures():
        mds = mds_settings(spec, images.settings())
        settings = _of_subset(latents_settings(mds, encoders.settings(hub.client())), subset)
    return _merge(spec, stage_dir, settings)


def _of_subset(whole_settings: dict[str, Any], subset: Subset | None) -> dict[str, Any]:
    return subset_settings(whole_settings, subset) if subset else whole_settings


def _merge(spec: DatasetSpec, stage_dir: StageDir, settings: Mapping[str, Any]) -> dg.MaterializeResult:
    """Merge the index of each split; a split of which nothing is published is left out."""
    from md_assets.stages.index import merge_indexes

    rows = ["| split | archives | samples | shards | stale | missing | empty | pruned |"]
    rows.append("| --- " + "| ---: " * 7 + "|")
    metadata: dict[str, Any] = {}
    samples = 0
    for split in spec.splits or ("",):
        archives = [archive for archive in spec.archives if spec.split_of(archive) == split]
        with _run_failures():
            index = merge_indexes(stage_dir, split, archives, settings)
        if index is None:
            rows.append(f"| {split} | 0 | 0 | 0 | | {len(archives)} | | |")
            continue
        left_out = " | ".join(str(len(ids)) for ids in (index.stale, index.missing, index.empty, index.pruned))
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


def _archives(context: dg.AssetExecutionContext, spec: DatasetSpec, stage_dir: StageDir) -> list[str]:
    """The archives of the run, in order. Of those that checks found damaged the ledgers are withdrawn, so that the run
    makes them again instead of passing them over."""
    from md_assets.stages.once import withdraw

    archives, asset = archives_of(context, spec), dg.AssetKey([spec.slug, stage_dir.asset])
    published = {archive for archive in archives if stage_dir.ledger(archive).exists()}
    for failed in damaged_archives(context.instance, spec, asset, published):
        here = failed.directory in ("", stage_dir.path.name)  # and not with other encoders
        if here and withdraw(stage_dir, failed.archive, failed.at_s):
            what = f"{failed.check} failed ({failed.what}); its ledger is withdrawn and it is made again"
            context.log.warning(f"{asset.to_user_string()} {failed.archive}: {what}")
    return archives


def _finish(context: dg.AssetExecutionContext, run: ArchiveRun, upstream: StageDir) -> list[dg.MaterializeResult]:
    """End a run. Where the stage before could not be read, its files are checked again: an archive whose files are
    damaged counts as failed there too, and is mended there."""
    from md_assets.stages.once import UPSTREAM_DAMAGED, UPSTREAM_MISSING

    key = dg.AssetKey([upstream.dataset, upstream.asset])
    for error in run.failures:
        if error.reason in (UPSTREAM_DAMAGED, UPSTREAM_MISSING) and upstream.ledger(error.archive).exists():
            for evaluation in evaluate(key, upstream, None, error.archive, read_all=error.reason == UPSTREAM_DAMAGED):
                if evaluation.check_name in OF_WHAT_IS_ON_DISK and not evaluation.passed:
                    context.log_event(evaluation)
    return run.finish()


@contextmanager
def _run_failures() -> Iterator[None]:
    """An error that concerns the whole run, as Dagster's failure; retried if waiting may help."""
    try:
        yield
    except MdAssetsError as error:
        transient = getattr(error, "transient", False)
        told = {REASON_KEY: getattr(error, "reason", "failed"), TRANSIENT_KEY: transient}
        raise dg.Failure(str(error), metadata=told, allow_retries=transient) from error
