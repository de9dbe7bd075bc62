"""The miniature DiffusionDB: lossless pictures, and a metadata table with the real one's columns."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from md_assets.core.ledger import Reason
from md_assets.demo.diffusiondb import ARCHIVES, MINIATURE, REJECTED_BY_MDS, SCORES_AT
from md_assets.demo.miniatures import pictures


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pq.ParquetFile:
    root = tmp_path_factory.mktemp("diffdb")
    MINIATURE.write(root, root, MINIATURE.samples, 64)
    return pq.ParquetFile(root / "datasets/poloclub/diffusiondb/metadata-large.parquet")


def test_the_table_has_thirteen_columns_in_upstreams_types(table: pq.ParquetFile) -> None:
    assert {field.name: str(field.type) for field in table.schema_arrow} == {
        "image_name": "string",
        "prompt": "string",
        "part_id": "uint16",
        "seed": "uint32",
        "step": "uint16",
        "cfg": "float",
        "sampler": "uint8",
        "width": "uint16",
        "height": "uint16",
        "user_name": "string",
        "timestamp": "timestamp[ms, tz=UTC]",
        "image_nsfw": "float",
        "prompt_nsfw": "float",
    }


def test_every_archive_has_a_row_for_each_picture_and_one_orphan(table: pq.ParquetFile) -> None:
    parts = table.read(["part_id"])["part_id"].to_pylist()
    assert [parts.count(number) for number in (1, 2)] == [MINIATURE.samples - 2 + 1] * 2


def test_scores_of_every_kind_are_in_every_archive() -> None:
    """Above the limit in either column, blurred, NaN and null; and exactly the limit, which is kept."""
    assert len(SCORES_AT) == REJECTED_BY_MDS[Reason.NSFW] + 1
    content = MINIATURE.content(ARCHIVES[0], MINIATURE.samples, 64)
    assert content.annotations[2]["image_nsfw"] == content.annotations[2]["prompt_nsfw"] == 0.2
    assert content.annotations[2]["prompt"] in content.kept.values()


def test_pictures_are_lossless_webp(tmp_path: Path) -> None:
    (name, data), *_ = MINIATURE.content(ARCHIVES[0], MINIATURE.samples, 64).members
    first = next(pictures(ARCHIVES[0], 1, 64))
    assert name == f"{first.identity}.webp"
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "WEBP" and np.array_equal(np.asarray(image), np.asarray(first.drawing.image))
