"""The reference's way, as the seed document's scripts go it: what it keeps, and what it costs in quality."""

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image

from md_assets.bench import reference
from md_assets.bench.synthetic_archives import SOURCES, make_archive
from md_assets.storage.mds import iter_rows


@pytest.mark.parametrize(("slug", "container"), [("jdb", "tgz"), ("sa1b", "tar"), ("diffdb", "zip"), ("cc12m", "tar")])
def test_images_are_kept_and_resized(slug: str, container: str, tmp_path: Path) -> None:
    archive = tmp_path / f"archive.{container}"
    make_archive(dataclasses.replace(SOURCES[slug], width=700, height=600), archive, 8, seed=0)
    count = reference.convert(slug, archive, tmp_path / "work")
    rows = list(iter_rows(tmp_path / "work" / "mds"))
    assert count == len(rows) and (3 <= count < 8 if slug == "cc12m" else count == 8)
    for row in rows:
        image = Image.open(io.BytesIO(row["jpg"]))
        assert image.format == "JPEG" and 256 <= min(image.size) <= 512
    if slug != "cc12m":
        assert {(row["width"], row["height"]) for row in rows} == {(597, 512)}
    assert archive.exists()
