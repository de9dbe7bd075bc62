"""Contact sheets: sixteen thumbnails in one small picture, whatever the archive's images look like."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from md_assets.demo.drawings import draw
from md_assets.storage.contact_sheet import (
    COLUMNS,
    MAX_URI_BYTES,
    ROWS,
    THUMBNAIL_PX,
    image_sheet,
    latents_sheet,
    pictures_sheet,
)

SIXTEEN = COLUMNS * ROWS


def jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    return file.getvalue()


def noise(seed: int, width: int = 512, height: int = 512) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return jpeg(Image.fromarray(pixels))


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    kind, _, data = uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")


def middles(sheet: Image.Image) -> list[tuple[int, ...]]:
    """The colour in the middle of each thumbnail, row by row."""
    places = range(THUMBNAIL_PX // 2, sheet.height, THUMBNAIL_PX), range(THUMBNAIL_PX // 2, sheet.width, THUMBNAIL_PX)
    return [sheet.getpixel((x, y)) for y in places[0] for x in places[1]]  # type: ignore[misc]


def is_near(one: tuple[int, ...], other: tuple[int, ...], tolerance: int = 40) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(one, other, strict=True))


def test_there_are_sixteen() -> None:
    assert SIXTEEN == 16


def test_nothing_gives_no_sheet() -> None:
    assert image_sheet([]) is None and latents_sheet([]) is None and pictures_sheet([]) is None


def test_pictures_of_any_size_lie_row_by_row() -> None:
    colours = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (128, 128, 128), (255, 255, 0)]
    sheet = decoded(
        pictures_sheet([np.full((64 * (1 + i), 64 * (1 + i), 3), c, np.uint8) for i, c in enumerate(colours)])
    )
    assert sheet.size == (COLUMNS * THUMBNAIL_PX, 2 * THUMBNAIL_PX)
    assert all(is_near(found, colour) for found, colour in zip(middles(sheet), colours, strict=False))


@pytest.mark.parametrize("count", [1, COLUMNS - 1, COLUMNS, COLUMNS + 1, SIXTEEN, SIXTEEN + 5])
def test_any_number_of_images_fits_row_by_row(count: int) -> None:
    colours = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 255, 0), (128, 128, 128)]
    sheet = decoded(image_sheet([jpeg(Image.new("RGB", (300, 300), colours[i % 5])) for i in range(count)]))
    shown = min(count, SIXTEEN)
    assert sheet.size == (min(shown, COLUMNS) * THUMBNAIL_PX, -(-shown // COLUMNS) * THUMBNAIL_PX)
    expected = [colours[i % 5] for i in range(shown)] + [(255, 255, 255)] * SIXTEEN
    assert all(is_near(seen, colour) for seen, colour in zip(middles(sheet), expected, strict=False))


@pytest.mark.parametrize("size", [(2000, 300), (300, 2000), (256, 256), (64, 64), (1, 1), (97, 95)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_of_any_shape_show_their_middle(size: tuple[int, int], mode: str) -> None:
    picture = Image.new("RGB", size, "black")
    edge = min(size)
    left, top = (size[0] - edge) // 2, (size[1] - edge) // 2
    picture.paste("white", (left, top, left + edge, top + edge))
    sheet = decoded(image_sheet([jpeg(picture.convert(mode))]))
    assert sheet.size == (THUMBNAIL_PX, THUMBNAIL_PX)
    inner = np.asarray(sheet)[4:-4, 4:-4]
    assert inner.min() > 200


def test_the_worst_pictures_stay_below_the_limit_of_the_event_log() -> None:
    for sheet in (image_sheet([noise(seed) for seed in range(SIXTEEN)]), image_sheet([noise(1, 80, 80)] * SIXTEEN)):
        assert sheet is not None and len(sheet) <= MAX_URI_BYTES < 16_384


def test_usual_pictures_are_not_squeezed_more_than_needed() -> None:
    sheet = image_sheet([draw(seed, 512, 512).jpeg() for seed in range(SIXTEEN)])
    assert sheet is not None and MAX_URI_BYTES / 2 < len(sheet) <= MAX_URI_BYTES


def test_the_same_images_give_the_same_sheet() -> None:
    images = [noise(seed) for seed in range(3)]
    assert image_sheet(images) == image_sheet(images)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_of_any_depth_become_colours(channels: int, dtype: type[np.floating]) -> None:
    latents = np.random.default_rng(0).normal(size=(SIXTEEN, channels, 32, 32)).astype(dtype)
    uri = latents_sheet(list(latents))
    sheet = decoded(uri)
    assert sheet.size == (COLUMNS * THUMBNAIL_PX, ROWS * THUMBNAIL_PX)
    assert uri is not None and len(uri) <= MAX_URI_BYTES
    assert np.asarray(sheet).std() > 20


def test_the_first_three_channels_are_red_green_and_blue() -> None:
    for channel in range(3):
        latent = np.zeros((4, 32, 32), np.float16)
        latent[channel] = 3
        latent[3] = 100
        (colour,) = middles(decoded(latents_sheet([latent])))
        assert is_near(colour, tuple(255 * (i == channel) for i in range(3)))


def test_latents_that_are_all_the_same_are_shown_too() -> None:
    assert decoded(latents_sheet([np.full((4, 32, 32), 2.5, np.float16)])).size == (THUMBNAIL_PX, THUMBNAIL_PX)


def test_the_largest_float16_values_do_not_overflow() -> None:
    latent = np.array([[[65504.0, -65504.0]]], np.float16)
    pixels = np.asarray(decoded(latents_sheet([latent])))
    assert pixels[:, :8].min() > 200 and pixels[:, -8:].max() < 55
