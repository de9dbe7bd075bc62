"""Drawings: the same number gives the same picture, and its caption says what is on it."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from md_assets.demo.drawings import draw


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_same_number_gives_the_same_picture_and_caption(seed: int) -> None:
    one, other = draw(seed, 96, 64), draw(seed, 96, 64)
    assert one.caption == other.caption and one.image.tobytes() == other.image.tobytes()


def test_different_numbers_give_different_pictures() -> None:
    drawings = [draw(seed, 96, 64) for seed in range(40)]
    assert len({d.image.tobytes() for d in drawings}) == 40
    assert len({d.caption for d in drawings}) > 30


@pytest.mark.parametrize("size", [(64, 64), (65, 127), (300, 200), (1536, 1024)])
def test_pictures_have_the_size_asked_for(size: tuple[int, int]) -> None:
    drawing = draw(1, *size)
    assert (drawing.image.size, drawing.image.mode) == (size, "RGB")


def test_captions_are_sentences_of_number_colour_shape_and_gradient() -> None:
    numbers, colours, shapes = set(), set(), set()
    for seed in range(200):
        words = draw(seed, 64, 64).caption.split()
        assert words[3:5] == ["over", "a"] and words[6] == "to" and words[8] == "gradient" and len(words) == 9
        assert len({words[1], words[5], words[7]}) == 3
        assert words[2].endswith("s") == (words[0] != "one")
        numbers.add(words[0])
        colours.add(words[1])
        shapes.add(words[2].removesuffix("s"))
    assert (len(numbers), len(colours), len(shapes)) == (5, 8, 4)


def test_the_caption_tells_the_gradient() -> None:
    for seed in range(10):
        drawing = draw(seed, 256, 256)
        top = drawing.caption.split()[5]
        edge = np.asarray(drawing.image)[:4].reshape(-1, 3).astype(float)
        red, green, blue = np.median(edge, 0)
        assert {"red": red > green and red > blue, "blue": blue > red, "green": green > red}.get(top, True)


def test_a_jpeg_is_as_large_as_a_photograph_and_its_quality_counts() -> None:
    drawing = draw(3)
    data = drawing.jpeg()
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (1024, 1024))
    assert len(drawing.jpeg(50)) < len(data) < 1_000_000
    assert len(data) > 50_000
