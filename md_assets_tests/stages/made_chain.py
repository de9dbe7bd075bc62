"""Archives published in all stages without sources and models: ledgers that follow from each other, checks pass."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.schema import MDS_COLUMNS, latents_columns
from md_assets.core.settings import EncoderSettings, ImageSettings, latents_settings, mds_settings, raw_settings
from md_assets.core.spec import DatasetSpec
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages.index import merge_indexes
from md_assets.stages.subset import select_archive
from md_assets.storage.mds import ShardWriter, ledgered_files
from md_assets.storage.publish import output_file, publish, read_ledger, scratch, with_files, workspace
from md_assets_tests.stages.conftest import LAYOUT, latents_row

TAG = "tiny"
ENCODERS = EncoderSettings("vae", "text", "revision of the vae", "revision of the text encoder", (32,))
SIZES = ((512, 600), (300, 400), (700, 512), (511, 900))
"""Of the stored images, width and height in px: the first and the third are in a subset of 512 px."""

REJECTED = {"too_small": ["small/0", "small/1"]}
"""By raw; everything else is kept in all stages."""


def publish_chain(
    root: DataRoot,
    spec: DatasetSpec,
    archive: str,
    sizes: Sequence[tuple[int, int]] = SIZES,
    images: ImageSettings | None = None,
    tag: str = TAG,
    subsets: bool = True,
    encoders: EncoderSettings = ENCODERS,
) -> None:
    """Publish an archive in raw, mds, latents, and both stages of the dataset's subsets."""
    images = images or ImageSettings()
    raw = publish_raw(root, spec, archive, len(sizes), images)
    mds = publish_shards(root.mds(spec.slug), archive, mds_rows(archive, sizes), raw, mds_settings(spec, images))
    settings = latents_settings(mds.settings, encoders)
    publish_shards(root.latents(spec.slug, tag), archive, latents_rows(archive, sizes), mds, settings)
    for subset in spec.subsets if subsets else ():
        mds_dirs = root.mds(spec.slug), root.mds(spec.slug, subset.name)
        select_archive(subset, archive, *mds_dirs, mds.settings)
        latents_dirs = root.latents(spec.slug, tag), root.latents(spec.slug, tag, subset.name)
        select_archive(subset, archive, *latents_dirs, settings)


JDB_ARCHIVES = ("train/000", "train/001", "valid/000")


def publish_jdb(root: DataRoot) -> None:
    """Three archives of jdb in all stages, with merged indexes of mds."""
    for archive in JDB_ARCHIVES:
        publish_chain(root, JDB, archive)
    for split in JDB.splits:
        merge_jdb_mds(root, split)


def merge_jdb_mds(root: DataRoot, split: str) -> None:
    """The merged index of a split."""
    settings = mds_settings(JDB, ImageSettings())
    merge_indexes(root.mds("jdb"), split, [a for a in JDB_ARCHIVES if a.startswith(split)], settings)


def ledger_of(stage_dir: StageDir, archive: str) -> Ledger:
    """The ledger, which is there."""
    ledger = read_ledger(stage_dir.ledger(archive))
    assert ledger is not None
    return ledger


def mds_rows(archive: str, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows whose pictures nobody decodes."""
    rows = []
    for number, (width, height) in enumerate(sizes):
        key = f"{archive}/{number}"
        row = {"key": key, "jpg": f"picture {key}".encode(), "caption": f"ünïcode {key} 🎈"}
        rows.append({**row, "width": width, "height": height})
    return rows


def latents_rows(archive: str, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows of random latents."""
    named = enumerate(sizes)
    return [latents_row(f"{archive}/{number}", width=width, height=height) for number, (width, height) in named]


def publish_raw(root: DataRoot, spec: DatasetSpec, archive: str, kept: int, images: ImageSettings) -> Ledger:
    """A tar of any content."""
    stage_dir = root.raw(spec.slug)
    with workspace(stage_dir.ledger(archive)) as own:
        tar = scratch(own, "out") / "raw.tar"
        tar.write_bytes(f"tar of {archive}".encode() * 100)
        ledger = Ledger(
            dataset=spec.slug,
            archive=archive,
            stage="raw",
            read=kept + 2,
            kept=kept,
            rejected=REJECTED,
            bytes_in=5000,
            bytes_out=0,
            seconds=1.0,
            source={"name": f"{archive}.tar", "content_id": "c", "revision": "r"},
            inputs={"archive": "c"},
            settings=raw_settings(images),
            versions={},
            files=(),
        )
        return publish(stage_dir, tar, with_files(ledger, (output_file(tar, f"{archive}.tar"),)))


def publish_shards(
    stage_dir: StageDir, archive: str, rows: Sequence[dict[str, Any]], upstream: Ledger, settings: dict[str, Any]
) -> Ledger:
    """Rows of mds or latents, made of `upstream`."""
    is_mds = stage_dir.stage == "mds"
    with workspace(stage_dir.ledger(archive)) as own:
        with ShardWriter(scratch(own, "shards"), MDS_COLUMNS if is_mds else latents_columns((32,), False)) as writer:
            for row in rows:
                writer.write(row)
        ledger = replace(
            upstream,
            stage=stage_dir.stage,
            read=upstream.kept,
            kept=len(rows),
            rejected={},
            inputs={upstream.stage: upstream.content_id},
            settings=settings,
            details={} if is_mds else LAYOUT,
        )
        return publish(stage_dir, writer.directory, with_files(ledger, ledgered_files(writer.directory, archive)))
