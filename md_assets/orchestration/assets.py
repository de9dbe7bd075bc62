"""The assets of a dataset, made from its spec: the same for every dataset.

Here: keys, dependencies, partitions, policies, descriptions. Not here: what a run does (`orchestration.stage_runs`).
No `from __future__ import annotations`: Dagster reads the annotations of asset functions.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import dagster as dg

from md_assets.core.errors import SettingsError
from md_assets.core.paths import Stage
from md_assets.core.source import HubFile
from md_assets.core.spec import DatasetSpec, Subset
from md_assets.orchestration import stage_runs
from md_assets.orchestration.automation import (
    annotations_condition,
    follow_condition,
    index_condition,
    raw_condition,
)
from md_assets.orchestration.checks import check_specs, index_check_specs
from md_assets.orchestration.code_references import code_references
from md_assets.orchestration.partitions import archive_partitions
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.orchestration.source_checks import links_checks

OWNERS = ["team:data-platform"]

ARCHIVES_PER_RUN: dict[Stage, int] = {"raw": 8, "mds": 16, "latents": 64}
"""Archives that a backfill gives to one run. The numbers must differ: Dagster fuses assets of equal policy into one
run, in which one failed raw archive would take mds and latents of all the others with it."""

SUBSET_ARCHIVES_PER_RUN: dict[Stage, int] = {"mds": 32, "latents": 128}
"""The same for the stages of subsets, which follow those of the whole."""

PER_RUN_VARIABLE = "MD_ASSETS_ARCHIVES_PER_RUN"
"""Other numbers than `ARCHIVES_PER_RUN`, e.g. `raw=20,latents=100`. A variable: policies are part of the definitions,
which no run config reaches."""

RETRIES = dg.RetryPolicy(max_retries=2, delay=60, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
"""For steps in which an archive failed of something that passes. A Hub client has waited for minutes by then."""

STAGE_TAG = "md_assets/stage"
"""On every asset of a dataset: by it, one stage of all datasets is found in the catalog."""

POOL_HUB = "hub"
"""Limits concurrent downloads: the Hub counts requests by address and account."""

POOL_CAPTIONS = "captions"
"""Limits concurrent indexing of captions. Not `hub`: the daemon queues a backfill's captions behind all its raw runs,
and in their pool they would hold back every mds until the last archive is fetched."""

POOL_GPU = "gpu"
"""Limits concurrent encoding runs: each takes all of this machine's GPUs."""


def dataset_assets(spec: DatasetSpec) -> list[Any]:
    """All assets of one dataset."""
    assets = [_archive(spec), _raw(spec), _mds(spec), _mds_index(spec), _latents(spec), _latents_index(spec)]
    if spec.annotations:
        assets.insert(1, _annotations(spec))
    for subset in spec.subsets:
        assets += [_selected(spec, subset, "mds"), _selected_index(spec, subset, "mds")]
        assets += [_selected(spec, subset, "latents"), _selected_index(spec, subset, "latents")]
    assets += [_raw_only(spec, name) for name in dict.fromkeys(extra.asset for extra in spec.raw_only)]
    return [*assets, *links_checks(spec, asset_key(spec, "archive"))]


def archives_per_run() -> dict[Stage, int]:
    """`ARCHIVES_PER_RUN`, with what the environment says instead.

    Raises:
        SettingsError: it says something else than stages and numbers, or makes two of them equal.
    """
    sizes, text = dict(ARCHIVES_PER_RUN), os.environ.get(PER_RUN_VARIABLE, "")
    for part in filter(None, text.split(",")):
        name, _, number = (word.strip() for word in part.partition("="))
        stage = next((stage for stage in sizes if stage == name), None)
        if stage is None or not number.isdecimal() or int(number) < 1:
            raise SettingsError(f"{PER_RUN_VARIABLE} has {part!r}", f"Write {','.join(f'{s}=N' for s in sizes)}, N ≥ 1")
        sizes[stage] = int(number)
    taken = [*sizes.values(), *SUBSET_ARCHIVES_PER_RUN.values()]
    if len(set(taken)) < len(taken):
        whole, of_subsets = ", ".join(map(str, sizes.values())), ", ".join(map(str, SUBSET_ARCHIVES_PER_RUN.values()))
        raise SettingsError(
            f"{PER_RUN_VARIABLE} makes sizes of runs equal: {whole}; of subsets {of_subsets}",
            "Choose different ones, or Dagster fuses stages into one run",
        )
    return sizes


def asset_key(spec: DatasetSpec, name: str) -> dg.AssetKey:
    """`<ds>/<name>`."""
    return dg.AssetKey([spec.slug, name])


def _archive(spec: DatasetSpec) -> Any:
    @dg.observable_source_asset(
        key=asset_key(spec, "archive"),
        partitions_def=archive_partitions(spec),
        group_name=spec.slug,
        description=f"Archives of {spec.title} at their source, observed: the data version of each is its content id "
        f"there (LFS sha256, md5 or ETag), or its name where only the bytes tell.\n\n{spec.datasheet}",
        tags={
            f"dagster/kind/{'huggingface' if isinstance(spec.locate(spec.archives[0]), HubFile) else 'http'}": "",
            STAGE_TAG: "archive",
        },
        metadata=code_references(stage_runs.observe_archives, "", spec),
    )
    def archive(context, hub: HubResource) -> dg.DataVersionsByPartition:
        return stage_runs.observe_archives(context, spec, hub)

    return archive


def _annotations(spec: DatasetSpec) -> Any:
    @dg.asset(
        key=asset_key(spec, "annotations"),
        group_name=spec.slug,
        owners=OWNERS,
        kinds={"huggingface", "parquet"},
        tags={STAGE_TAG: "annotations"},
        metadata=code_references(stage_runs.index_captions, "annotations", spec),
        pool=POOL_CAPTIONS,
        retry_policy=RETRIES,
        automation_condition=annotations_condition(spec),
        description=f"Captions of {spec.title}, indexed once so that one archive's captions are read without scanning "
        "the rest.",
    )
    def annotations(context: dg.AssetExecutionContext, hub: HubResource) -> dg.MaterializeResult:
        return stage_runs.index_captions(context, spec, hub)

    return annotations


def _raw(spec: DatasetSpec) -> Any:
    def raw(context: dg.AssetExecutionContext, hub: HubResource, images: ImagesResource):
        yield from stage_runs.fetch_archives(context, spec, hub, images)

    return _archive_asset(
        spec,
        "raw",
        raw,
        deps=["archive"],
        pool=POOL_HUB,
        kinds={"huggingface", "python"},
        metadata=code_references(stage_runs.fetch_archives, "raw", spec),
        description=f"Images of one archive of {spec.title}: fetched, verified, filtered and resized, as an "
        f"uncompressed WebDataset-shaped tar.\n\n{spec.datasheet}",
    )


def _mds(spec: DatasetSpec) -> Any:
    def mds(context: dg.AssetExecutionContext, images: ImagesResource):
        yield from stage_runs.convert_archives(context, spec, images)

    return _archive_asset(
        spec,
        "mds",
        mds,
        deps=["raw", "annotations"] if spec.annotations else ["raw"],
        pool=None,
        kinds={"mosaicml", "python"},
        metadata=code_references(stage_runs.convert_archives, "mds", spec),
        description=f"MDS shards of one archive of {spec.title}: key, jpg, caption, width, height.",
    )


def _latents(spec: DatasetSpec) -> Any:
    def latents(
        context: dg.AssetExecutionContext, hub: HubResource, images: ImagesResource, encoders: EncodersResource
    ):
        yield from stage_runs.encode_archives(context, spec, hub, images, encoders)

    return _archive_asset(
        spec,
        "latents",
        latents,
        deps=["mds"],
        pool=POOL_GPU,
        kinds={"pytorch", "mosaicml"},
        metadata=code_references(stage_runs.encode_archives, "latents", spec),
        description=f"Latents of one archive of {spec.title} as MDS shards: key, caption, caption_latents, "
        "latents_256, latents_512, width, height. Encoded in processes of their own, on GPUs where there are some.",
    )


def _selected(spec: DatasetSpec, subset: Subset, stage: Stage) -> Any:
    """mds or latents of a subset."""
    name = f"{stage}_{subset.name}"
    options: dict[str, Any] = {
        "deps": [stage],
        "pool": None,
        "kinds": {"mosaicml", "python"},
        "metadata": code_references(
            stage_runs.select_mds if stage == "mds" else stage_runs.select_latents, "subset", spec
        ),
        "description": f"{stage} of the part of one archive of {spec.title} whose smaller image edge is "
        f"{subset.min_edge_px} px or more before resizing: rows selected from `{spec.slug}/{stage}`, not made again.",
    }

    def select_mds(context: dg.AssetExecutionContext, images: ImagesResource):
        yield from stage_runs.select_mds(context, spec, subset, images)

    def select_latents(
        context: dg.AssetExecutionContext, hub: HubResource, images: ImagesResource, encoders: EncodersResource
    ):
        yield from stage_runs.select_latents(context, spec, subset, hub, images, encoders)

    return _archive_asset(spec, stage, select_mds if stage == "mds" else select_latents, name=name, **options)


def _archive_asset(
    spec: DatasetSpec,
    stage: Stage,
    body: Callable[..., Any],
    *,
    name: str = "",
    deps: Sequence[str],
    pool: str | None,
    kinds: set[str],
    metadata: dict[str, Any],
    description: str,
) -> Any:
    """A stage's asset: partitioned by archive, run in ranges, recorded archive by archive.

    `name` is that of a subset's stage, and empty for the whole dataset's.
    """
    key, partitions_def = asset_key(spec, name or stage), archive_partitions(spec)
    subset = name.removeprefix(f"{stage}_")
    per_run = (SUBSET_ARCHIVES_PER_RUN if subset else archives_per_run())[stage]
    if stage == "raw":
        condition = raw_condition(spec)
    else:
        condition = follow_condition(spec, deps[0], at_once=per_run if stage == "latents" and not subset else 1)
    return dg.multi_asset(
        name=f"{spec.slug}__{name or stage}",
        specs=[
            dg.AssetSpec(
                key,
                deps=[asset_key(spec, dep) for dep in deps],
                partitions_def=partitions_def,
                group_name=spec.slug,
                owners=OWNERS,
                kinds=kinds,
                tags={STAGE_TAG: stage},
                metadata=metadata,
                description=description,
                skippable=True,
                automation_condition=condition,
            )
        ],
        check_specs=check_specs(key, stage, partitions_def, subset),
        can_subset=True,  # makes the checks optional outputs: the body records them, archive by archive
        backfill_policy=dg.BackfillPolicy.multi_run(per_run),
        pool=pool,
        retry_policy=RETRIES,
    )(body)


def _mds_index(spec: DatasetSpec) -> Any:
    @dg.multi_asset(**_index_options(spec, "mds"))
    def mds_index(images: ImagesResource):
        yield stage_runs.merge_mds(spec, images)

    return mds_index


def _latents_index(spec: DatasetSpec) -> Any:
    @dg.multi_asset(**_index_options(spec, "latents"))
    def latents_index(hub: HubResource, images: ImagesResource, encoders: EncodersResource):
        yield stage_runs.merge_latents(spec, hub, images, encoders)

    return latents_index


def _selected_index(spec: DatasetSpec, subset: Subset, stage: Stage) -> Any:
    options = _index_options(spec, f"{stage}_{subset.name}")
    if stage == "mds":

        @dg.multi_asset(**options)
        def merge(images: ImagesResource):
            yield stage_runs.merge_mds(spec, images, subset)
    else:

        @dg.multi_asset(**options)
        def merge(hub: HubResource, images: ImagesResource, encoders: EncodersResource):
            yield stage_runs.merge_latents(spec, hub, images, encoders, subset)

    return merge


def _raw_only(spec: DatasetSpec, name: str) -> Any:
    extras = [extra for extra in spec.raw_only if extra.asset == name]
    what = " ".join(f"`{extra.name}`: {extra.what}" for extra in extras)

    @dg.asset(
        key=asset_key(spec, name),
        group_name=spec.slug,
        owners=OWNERS,
        kinds={"huggingface", "python"},
        tags={STAGE_TAG: "raw"},
        metadata=code_references(stage_runs.fetch_beside, "raw_only", spec),
        pool=POOL_HUB,
        retry_policy=RETRIES,
        description=f"What {spec.title} has beside its archives, fetched and kept as raw only. {what}",
    )
    def raw_only(context: dg.AssetExecutionContext, hub: HubResource, images: ImagesResource) -> dg.MaterializeResult:
        return stage_runs.fetch_beside(context, spec, extras, hub, images)

    return raw_only


def _index_options(spec: DatasetSpec, stage: str) -> dict[str, Any]:
    key, of_mds = asset_key(spec, f"{stage}_index"), stage.startswith("mds")
    index = dg.AssetSpec(
        key,
        deps=[asset_key(spec, stage)],
        group_name=spec.slug,
        owners=OWNERS,
        kinds={"mosaicml", "json"},
        tags={STAGE_TAG: "index"},
        metadata=code_references(stage_runs.merge_mds if of_mds else stage_runs.merge_latents, "index", spec),
        description=f"Merged index.json over all published {stage} archives of {spec.title} with the same settings: "
        "what a StreamingDataset is pointed at.",
        automation_condition=index_condition(spec, stage),
    )
    # can_subset makes the check an optional output: no run evaluates it
    return {
        "name": "__".join(key.path),
        "specs": [index],
        "check_specs": index_check_specs(key),
        "can_subset": True,
    }
