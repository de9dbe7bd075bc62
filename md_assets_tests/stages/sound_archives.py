"""Archives of jdb in all stages that stand an audit: real pictures, and latents whose rows are those of mds."""

import io
from dataclasses import replace
from typing import Any

from PIL import Image

from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings, latents_settings, mds_settings
from md_assets.datasets.jdb import SPEC as JDB
from md_assets_tests.stages.conftest import latents_row
from md_assets_tests.stages.made_chain import ENCODERS, TAG, publish_raw, publish_shards


def jpeg(width: int = 16, height: int = 12) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((width, height), 60).save(file, "JPEG")
    return file.getvalue()


def mds_row(archive: str, number: int, **changes: Any) -> dict[str, Any]:
    key = f"{archive}/{number:03}"
    return {"key": key, "jpg": jpeg(), "caption": f"picture {key}", "width": 16, "height": 12, **changes}


def latents_of(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The row of latents that is made of a row of mds."""
    same = {column: row[column] for column in ("caption", "width", "height")}
    return latents_row(row["key"], **{**same, **changes})


def publish(
    root: DataRoot,
    archive: str,
    mds_rows: list[dict[str, Any]],
    latents_rows: list[dict[str, Any]] | None = None,
    images: ImageSettings | None = None,
    seed: int = 0,
) -> None:
    """An archive of jdb in all stages."""
    images = images or ImageSettings()
    raw = publish_raw(root, JDB, archive, len(mds_rows), images)
    mds = publish_shards(root.mds("jdb"), archive, mds_rows, raw, mds_settings(JDB, images))
    settings = latents_settings(mds.settings, replace(ENCODERS, seed=seed))
    rows = [latents_of(row) for row in mds_rows] if latents_rows is None else latents_rows
    publish_shards(root.latents("jdb", TAG), archive, rows, mds, settings)
