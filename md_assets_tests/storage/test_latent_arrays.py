"""Arrays of a row: whole ones as they are, trimmed captions in their place among all positions."""

import numpy as np
import pytest

from md_assets.storage.latent_arrays import restored, stored_shape


def test_only_captions_are_trimmed_and_only_where_that_is_said() -> None:
    row = {"caption_length": 2}
    assert stored_shape(row, "caption_latents", (1, 7, 4), "trimmed") == (1, 2, 4)
    assert stored_shape(row, "caption_latents", [1, 7, 4], "full") == (1, 7, 4)
    assert stored_shape(row, "latents_256", (4, 32, 32), "trimmed") == (4, 32, 32)


@pytest.mark.parametrize("own", [0, 8, -1])
def test_a_length_out_of_range_is_refused(own: int) -> None:
    with pytest.raises(ValueError, match=f"caption_length is {own}, of 7 positions"):
        stored_shape({"caption_length": own}, "caption_latents", (1, 7, 4), "trimmed")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("own", [1, 3, 7])
def test_what_is_stored_comes_back_to_the_bit_with_zeros_behind_it(dtype: str, own: int) -> None:
    whole = np.random.default_rng(0).standard_normal((1, 7, 4)).astype(dtype)
    array = restored(whole[:, :own].tobytes(), (1, 7, 4), dtype)
    assert (array.shape, array.dtype) == ((1, 7, 4), dtype)
    assert np.array_equal(array[:, :own], whole[:, :own])
    assert not array[:, own:].any()
    array[0, 0, 0] = 5  # its own memory


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 numbers for the shape \(1, 1, 4\)"):
        restored(bytes(16), (1, 1, 4), "float16")
    with pytest.raises(ValueError, match="multiple of element size"):
        restored(bytes(3), (1, 1, 4), "float16")
