"""The miniature TextCaps: rows as upstream has them, in several row groups."""

from pathlib import Path

import pyarrow.parquet as pq

from md_assets.demo.textcaps import ARCHIVES, MINIATURE


def test_rows_have_images_and_lists_of_captions(tmp_path: Path) -> None:
    MINIATURE.write(tmp_path, tmp_path, MINIATURE.samples, 64)
    table = pq.ParquetFile(tmp_path / "datasets/lmms-lab/TextCaps/data/train-00012-of-00013.parquet")
    assert {field.name: str(field.type) for field in table.schema_arrow} == {
        "image_id": "string",
        "image": "struct<bytes: binary, path: string>",
        "image_width": "int64",
        "image_height": "int64",
        "caption_str": "list<element: string>",
        "reference_strs": "list<element: string>",
    }
    assert (table.num_row_groups, table.metadata.num_rows) == (2, MINIATURE.samples)


def test_both_splits_are_there_and_some_rows_have_no_first_caption() -> None:
    assert {archive.partition("/")[0] for archive in ARCHIVES} == {"train", "val"}
    rows = MINIATURE.content(ARCHIVES[0], MINIATURE.samples, 64).members
    captions = [row["reference_strs"] for row in rows]
    assert captions.count([]) == 1 and [c[1:] for c in captions if c and not c[0].strip()] == [captions[0][1:]]
