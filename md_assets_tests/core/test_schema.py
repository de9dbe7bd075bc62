"""Schema: the columns that readers outside this project rely on."""

import pytest

from md_assets.core.schema import (
    CAPTION_LENGTH_COLUMN,
    ITEM_BYTES,
    LATENT_DOWNSCALE,
    MDS_COLUMNS,
    SHARD_HASHES,
    latents_column,
    latents_columns,
)


def test_mds_columns_of_the_contract() -> None:
    assert list(MDS_COLUMNS.items()) == [
        ("key", "str"),
        ("jpg", "jpeg"),
        ("caption", "str"),
        ("width", "int32"),
        ("height", "int32"),
    ]


def test_latents_columns_of_the_contract() -> None:
    assert latents_columns((256, 512), save_images=False) == {
        "key": "str",
        "caption": "str",
        "caption_latents": "bytes",
        "latents_256": "bytes",
        "latents_512": "bytes",
        "width": "int32",
        "height": "int32",
    }


def test_images_are_one_more_column() -> None:
    without = latents_columns((256,), save_images=False)
    assert latents_columns((256,), save_images=True) == without | {"jpg": "jpeg"}


def test_the_length_of_captions_is_one_more_column() -> None:
    without = latents_columns((256,), save_images=False)
    assert latents_columns((256,), False, with_caption_length=True) == without | {CAPTION_LENGTH_COLUMN: "int32"}


def test_each_resolution_has_a_column_of_its_own() -> None:
    columns = latents_columns((128, 1024), save_images=False)
    assert [c for c in columns if c.startswith("latents_")] == [latents_column(128), latents_column(1024)]
    assert "latents_256" not in columns


@pytest.mark.parametrize("px", [256, 512])
def test_a_sample_has_the_sizes_that_the_reference_reads(px: int) -> None:
    """It reshapes the bytes to (-1, 32, 32) and (-1, 64, 64)."""
    assert px // LATENT_DOWNSCALE == {256: 32, 512: 64}[px]


def test_shapes_and_types_are_what_numpy_and_streaming_mean_by_them() -> None:
    import numpy as np
    from streaming.base.format.mds.encodings import get_mds_encodings
    from streaming.base.hashing import get_hashes

    assert {name: np.dtype(name).itemsize for name in ITEM_BYTES} == ITEM_BYTES
    assert set(MDS_COLUMNS.values()) | set(latents_columns((256,), True).values()) <= get_mds_encodings()
    assert set(SHARD_HASHES) <= get_hashes()
