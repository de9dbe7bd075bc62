"""DiffusionDB's assets whose stages do no work: each archive gets a copy of a template, published like any other.

Everything around the work is what it is elsewhere: assets, ranged runs, `stages.once`, ledgers, workspaces, recording,
checks, contact sheets, merged indexes. So what a backfill of them takes is what orchestration costs.

Here: the templates, and putting them in the work's place. Not here: measuring (`bench.scale`).
"""

import hashlib
import io
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg

from md_assets.core.ledger import Ledger
from md_assets.core.paths import ARCHIVE_STAGES, DataRoot, StageDir
from md_assets.core.schema import MDS_COLUMNS, latents_columns
from md_assets.core.source import Address, HubFile, RemoteFile
from md_assets.core.spec import DatasetSpec
from md_assets.datasets.diffdb import SPEC
from md_assets.orchestration import latents_launch
from md_assets.orchestration.archive_run import ArchiveRun
from md_assets.orchestration.assets import ARCHIVES_PER_RUN, dataset_assets
from md_assets.orchestration.audit import audit_sensor
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.stages import once as once_module
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.stages.once import Made, Outcome
from md_assets.storage.mds import ShardWriter, ledgered_files
from md_assets.storage.publish import output_file, publish, scratch, with_files, workspace
from md_assets.storage.sources import Sources

ARCHIVES_VARIABLE = "MD_ASSETS_BENCH_ARCHIVES"
"""How many archives the dataset of `bench.scale_location` has."""

PER_RUN_VARIABLE = "MD_ASSETS_BENCH_ARCHIVES_PER_RUN"
"""How many archives a run takes there; see `replace_work`."""

SAMPLES = 16
"""Of each archive: as many as a contact sheet shows, so that events are as large as real ones."""

PICTURE_PX = 96
LATENTS_LAYOUT: Mapping[str, Any] = {
    "caption_latents": [1, 8, 16],
    "image_latents": {"256": [4, 16, 16]},
    "dtype": "float16",
}
"""Small, since they are written for each archive; a picture of latents is as large for any size of them."""

ENCODERS = ("vae", "text")
"""Folders beside the templates that stand for models; nobody loads them."""

_once = once_module.once


def spec_of_scale(archives: int) -> DatasetSpec:
    """DiffusionDB with its first `archives` archives alone."""
    return replace(SPEC, archives=SPEC.archives[:archives], small=())


def definitions(spec: DatasetSpec) -> dg.Definitions:
    """The dataset's assets with the sensor that audits them; nothing of them asks a source."""
    warnings.filterwarnings("ignore", category=dg.BetaWarning)  # as in `definitions`
    warnings.filterwarnings("ignore", category=dg.PreviewWarning)
    return dg.Definitions(
        assets=dataset_assets(spec),
        sensors=[audit_sensor],
        executor=dg.in_process_executor,
        resources={"hub": NoHubResource(), "images": ImagesResource(), "encoders": EncodersResource()},
    )


def replace_work(archives_per_run: int) -> None:
    """Have the stages that this process imports from now on copy templates instead of working.

    Args:
        archives_per_run: of raw; one more of mds and two more of latents, for equal ones would be fused into one run.
            0 for what the platform has.
    """
    once_module.once = once_from_template
    latents_launch.encode = encode_from_template
    if archives_per_run:
        ARCHIVES_PER_RUN.update({stage: archives_per_run + n for n, stage in enumerate(ARCHIVE_STAGES)})


class NoHubResource(HubResource):
    """A source that has every archive and is never reached."""

    def sources(self) -> Sources:
        return NoSources(self.client())


class NoSources(Sources):
    """Locates any file without asking anybody."""

    def locate(self, address: Address) -> RemoteFile:
        name = address.path if isinstance(address, HubFile) else str(address)
        content_id = hashlib.sha256(name.encode()).hexdigest()
        return RemoteFile(name, url="", size_bytes=1, checksum=None, content_id=content_id, revision="0" * 40)


def once_from_template(
    stage_dir: StageDir,
    archive: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    make: Callable[[Path], Made],
    on_wait: Callable[[], None] | None = None,
) -> Outcome:
    """`stages.once.once`, with a copy instead of what `make` would make."""
    return _once(
        stage_dir, archive, settings, inputs, lambda own: _copy(stage_dir, archive, settings, inputs, own), on_wait
    )


def encode_from_template(
    context: dg.AssetExecutionContext,
    run: ArchiveRun,
    plan: LatentsPlan,
    num_processes: int,
    hub_environment: Mapping[str, str],
) -> None:
    """`orchestration.latents_launch.encode`, with copies, and without processes of its own."""

    def copy(archive: str) -> Outcome:
        inputs = {"mds": plan.upstream(archive).content_id}
        return _once(
            plan.latents_dir,
            archive,
            plan.settings,
            inputs,
            lambda own: _copy(plan.latents_dir, archive, plan.settings, inputs, own),
        )

    run.each(plan.archives, copy)


def write_templates(root: DataRoot, spec: DatasetSpec) -> dict[str, str]:
    """Write what archives are copied from beside the data root, and an index of captions into it.

    Returns: variables that stand for the encoders, for the environment of runs.
    """
    folder = templates(root)
    folder.mkdir(parents=True)
    jpegs = _pictures()
    _write_raw(folder / "raw", jpegs)
    keys = [_key(number) for number in range(SAMPLES)]
    sizes = {"width": PICTURE_PX, "height": PICTURE_PX}
    with ShardWriter(folder / "mds", MDS_COLUMNS) as mds:
        for key, jpeg in zip(keys, jpegs, strict=True):
            mds.write({"key": key, "jpg": jpeg, "caption": f"picture {key}", **sizes})
    with ShardWriter(folder / "latents", latents_columns((256,), save_images=False)) as latents:
        for number, key in enumerate(keys):
            latents.write({"key": key, "caption": f"picture {key}", **_arrays(number), **sizes})
    for name in ENCODERS:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    for source in spec.annotations:
        stage_dir = root.annotations(spec.slug)
        with workspace(stage_dir.ledger(source.name)) as own:
            made = own / "none.parquet"
            made.write_bytes(b"nobody reads it")
            ledger = _ledger(stage_dir, source.name, {}, {})
            publish(stage_dir, made, with_files(ledger, (output_file(made, f"{source.name}.parquet"),)))
    text_encoder = f"openclip:local-dir:{folder / ENCODERS[1]}"
    return {"MD_ASSETS_VAE": str(folder / ENCODERS[0]), "MD_ASSETS_TEXT_ENCODER": text_encoder}


def templates(root: DataRoot) -> Path:
    """Where the templates of a data root lie."""
    return root.path.parent / "templates"


def _copy(stage_dir: StageDir, archive: str, settings: Mapping[str, Any], inputs: Mapping[str, str], own: Path) -> Made:
    """A stage's template as an archive of it."""
    template = templates(DataRoot.from_environment()) / stage_dir.stage
    made = scratch(own, "made") / template.name
    if template.is_dir():
        shutil.copytree(template, made)
        files = ledgered_files(made, archive)
    else:
        shutil.copyfile(template, made)
        files = (output_file(made, f"{archive}.tar"),)
    return Made(made, with_files(_ledger(stage_dir, archive, settings, inputs), files))


def _ledger(stage_dir: StageDir, archive: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Ledger:
    return Ledger(
        dataset=stage_dir.dataset,
        archive=archive,
        stage=stage_dir.stage,
        read=SAMPLES,
        kept=SAMPLES,
        rejected={},
        bytes_in=0,
        bytes_out=0,
        seconds=0.0,
        source={"name": archive, "content_id": inputs.get("archive", ""), "revision": "0" * 40},
        inputs=dict(inputs),
        settings=dict(settings),
        versions={},
        files=(),
        details=dict(LATENTS_LAYOUT) if stage_dir.stage == "latents" else {},
    )


def _key(number: int) -> str:
    return f"template/{number:02}"


def _pictures() -> list[bytes]:
    from PIL import Image

    from md_assets.bench.synthetic_archives import JPEG_QUALITY, photograph

    jpegs = []
    for number in range(SAMPLES):
        file = io.BytesIO()
        Image.fromarray(photograph(PICTURE_PX, PICTURE_PX, number)).save(file, "JPEG", quality=JPEG_QUALITY)
        jpegs.append(file.getvalue())
    return jpegs


def _write_raw(path: Path, jpegs: list[bytes]) -> None:
    from md_assets.storage.images import StoredImage
    from md_assets.storage.raw_tar import RawTarWriter

    px = PICTURE_PX
    with RawTarWriter(path) as tar:
        for number, jpeg in enumerate(jpegs):
            tar.write(_key(number), StoredImage(jpeg, px, px, px, px, "JPEG", True), None)


def _arrays(seed: int) -> dict[str, bytes]:
    """The arrays of a row of latents."""
    import numpy as np

    random = np.random.default_rng(seed)
    (image_shape,) = LATENTS_LAYOUT["image_latents"].values()
    shapes = {"caption_latents": LATENTS_LAYOUT["caption_latents"], "latents_256": image_shape}
    return {name: random.standard_normal(shape).astype(np.float16).tobytes() for name, shape in shapes.items()}
