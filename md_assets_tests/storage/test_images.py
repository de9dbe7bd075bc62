"""The rules for pixels: upright, on white, 8-bit sRGB, resized once, encoded at most once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from md_assets.bench.synthetic_archives import photograph
from md_assets.core.settings import ImageSettings
from md_assets.storage.images import StoredImage, prepare_image, stored_size
from md_assets_tests.storage.made_images import (
    ADOBE_RGB_XYZ,
    SRGB_XYZ,
    Pixels,
    blocks,
    encoded,
    grey_profile,
    matrix_profile,
    middles,
    opened,
    photo,
    pixels_of,
    png_16_bit,
    psnr_db,
    srgb_curve,
    srgb_of,
    ycck_jpeg,
)

DEFAULTS = ImageSettings()
BEST = ImageSettings(jpeg_quality=100)
TOLERANCE = 3.0
"""Levels by which a flat square may differ after one encode at quality 100."""

BLOCKS = blocks()
OPAQUE = np.full((*BLOCKS.shape[:2], 1), 255, np.uint8)


def stored(data: bytes, settings: ImageSettings = BEST) -> StoredImage:
    result = prepare_image(data, settings)
    assert isinstance(result, StoredImage), result
    image = opened(result.jpeg)
    assert image.format == "JPEG" and image.mode in ("RGB", "L") and image.size == (result.width, result.height)
    return result


def assert_shows(data: bytes, expected_HWC: Any, tolerance: float = TOLERANCE) -> StoredImage:
    """The stored picture of `data` is `blocks` of these colours."""
    result = stored(data)
    difference = np.abs(middles(pixels_of(result.jpeg)) - middles(np.asarray(expected_HWC)))
    assert difference.max() <= tolerance
    return result


# Sizes


@given(st.integers(1, 70_000), st.integers(1, 70_000), st.integers(1, 2048))
def test_sizes_are_those_that_the_reference_computes(width: int, height: int, limit: int) -> None:
    size = stored_size(width, height, limit)
    short, long = sorted((width, height))
    expected = (short, long) if short <= limit else (limit, int(limit * long / short))  # torchvision's Resize
    assert tuple(sorted(size)) == expected
    assert (size[0] - size[1]) * (width - height) >= 0
    assert size[0] <= width and size[1] <= height


def test_the_longer_edge_is_truncated() -> None:
    assert stored_size(513, 5000, 512) == (512, 4990)
    result = stored(encoded(photo(513, 5000), "JPEG"))
    assert (result.width, result.height, result.source_width, result.source_height) == (512, 4990, 513, 5000)


@pytest.mark.parametrize(
    ("size", "kept"),
    [((255, 256), False), ((256, 256), True), ((257, 256), True), ((3000, 256), True)],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_both_edges_must_reach_the_minimum(size: tuple[int, int], kept: bool, format: str) -> None:
    for width, height in (size, size[::-1]):
        result = prepare_image(encoded(photo(width, height), format), DEFAULTS)
        if kept:
            assert isinstance(result, StoredImage) and (result.width, result.height) == (width, height)
        else:
            assert result == "too_small"


@pytest.mark.parametrize("edge_px", [1, 7, 8, 16])
def test_the_minimum_may_be_tiny(edge_px: int) -> None:
    data = encoded(Image.new("RGB", (edge_px, edge_px), "teal"), "JPEG")
    assert stored(data, ImageSettings(min_image_size=1)).jpeg == data


def test_the_size_is_judged_before_resizing() -> None:
    settings = ImageSettings(min_image_size=256, max_image_size=256)
    assert stored(encoded(photo(600, 300), "PNG"), settings).height == 256


@pytest.mark.parametrize("size", [(300, 280), (512, 512), (512, 900)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_nothing_is_ever_upscaled(size: tuple[int, int], format: str) -> None:
    assert (result := stored(encoded(photo(*size), format))) and (result.width, result.height) == size


# Original bytes


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"comment": b"kept"}, {"keep_rgb": True}],
    ids=["baseline", "progressive", "444", "low", "comment", "rgb"],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_plain_jpeg_that_fits_keeps_its_bytes(options: dict[str, Any], mode: str) -> None:
    data = encoded(photo(400, 300).convert(mode), "JPEG", **options)
    result = stored(data)
    assert result.original and result.jpeg == data and result.source_format == "JPEG"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_any_jpeg_that_is_too_large_is_encoded_once(options: dict[str, Any]) -> None:
    result = stored(encoded(photo(700, 600), "JPEG", **options), DEFAULTS)
    assert not result.original and (result.width, result.height) == (597, 512)


def test_a_profile_that_is_srgb_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(BLOCKS, "JPEG", icc_profile=profile)
    assert stored(data).jpeg == data
    assert_shows(encoded(BLOCKS, "PNG", icc_profile=profile), BLOCKS)


def test_an_orientation_of_one_changes_nothing() -> None:
    data = encoded(BLOCKS, "JPEG", exif=orientation(1))
    assert stored(data).jpeg == data


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage"])
def test_a_broken_exif_block_says_nothing_of_the_picture(exif: bytes) -> None:
    data = encoded(BLOCKS, "JPEG", exif=exif)
    assert stored(data).jpeg == data
    assert_shows(encoded(BLOCKS, "WEBP", lossless=True, exif=exif), BLOCKS)


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    data = encoded(BLOCKS, "JPEG", exif=orientation(value))
    assert stored(data).jpeg == data


def test_an_encoded_jpeg_carries_nothing_but_pixels() -> None:
    """Upstream's comment, place and orientation would otherwise come along, the latter to be applied again."""
    exif = orientation(6)
    exif[0x010E] = "secret"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6">secret</a></x:xmpmeta>'
    for data in (
        encoded(photo(700, 600), "JPEG", exif=exif, comment=b"secret", xmp=xmp),
        encoded(photo(300, 300), "GIF", comment=b"secret" * 20_000),
        encoded(photo(300, 300), "WEBP", exif=exif, xmp=xmp),
    ):
        image = opened(stored(data, DEFAULTS).jpeg)
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"} and not image.getexif()


# Orientation


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def lying(upright: Pixels, value: int) -> Pixels:
    """How the pixels of an upright picture lie in a file that has this orientation (Exif 2.3, table 4)."""
    return {
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[value]


@pytest.mark.parametrize("value", range(2, 9))
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_pictures_are_turned_upright(value: int, format: str, options: dict[str, Any]) -> None:
    result = assert_shows(encoded(lying(BLOCKS, value), format, exif=orientation(value), **options), BLOCKS)
    assert (result.width, result.height) == (result.source_width, result.source_height) == (320, 288)
    assert not result.original


@pytest.mark.parametrize("value", range(2, 9))
def test_a_turned_picture_is_resized_like_an_upright_one(value: int) -> None:
    upright = np.asarray(photo(700, 1100))
    result = stored(encoded(lying(upright, value), "PNG", exif=orientation(value)))
    assert (result.width, result.height) == (512, 804) and (result.source_width, result.source_height) == (700, 1100)
    assert psnr_db(pixels_of(result.jpeg), pixels_of(stored(encoded(upright, "PNG")).jpeg)) > 40


# Modes


def test_what_is_transparent_lies_on_white() -> None:
    alpha = blocks(seed=1, channels=1)
    expected = 255 - (255 - BLOCKS.astype(float)) * alpha / 255
    rgba = np.concatenate([BLOCKS, alpha], -1)
    assert_shows(encoded(rgba, "PNG"), expected)
    assert_shows(encoded(rgba, "WEBP", lossless=True, exact=True), expected)
    assert_shows(encoded(rgba, "TIFF"), expected)
    grey = BLOCKS[..., :1]
    la = Image.merge("LA", [Image.fromarray(grey[..., 0]), Image.fromarray(alpha[..., 0])])
    assert_shows(encoded(la, "PNG"), (255 - (255 - grey.astype(float)) * alpha / 255).repeat(3, -1))


def test_colours_below_full_transparency_do_not_bleed_into_what_is_seen() -> None:
    hidden = np.concatenate([np.zeros_like(BLOCKS), OPAQUE * 0], -1)
    large = Image.fromarray(hidden).resize((1280, 1152))
    assert pixels_of(stored(encoded(large, "PNG")).jpeg).min() == 255


def test_a_palette_with_one_transparent_colour_lies_on_white() -> None:
    colours = np.array([[255, 0, 0], [0, 200, 0], [0, 0, 255]], np.uint8)
    indices = np.random.default_rng(2).integers(0, 3, (9, 10)).repeat(32, 0).repeat(32, 1).astype(np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putpalette(colours.tobytes())
    expected = np.where(indices[..., None] == 1, 255, colours[indices])
    assert_shows(encoded(image, "PNG", transparency=1), expected)
    assert_shows(encoded(image, "GIF", transparency=1), expected)
    assert_shows(encoded(image, "PNG"), colours[indices])
    half = np.where(indices[..., None] == 1, (255 + colours[indices].astype(float)) / 2, colours[indices])
    assert_shows(encoded(image, "PNG", transparency=bytes([255, 128, 255])), half)


def test_grey_and_black_and_white_keep_their_levels() -> None:
    grey = BLOCKS[..., :1].repeat(3, -1)
    black_and_white = np.where(grey > 127, 255, 0).astype(np.uint8)
    assert_shows(encoded(grey[..., 0], "PNG"), grey)
    assert_shows(encoded(Image.fromarray(black_and_white).convert("1"), "PNG"), black_and_white)
    assert_shows(encoded(grey[..., 0], "PNG", transparency=int(grey[0, 0, 0])), np.where(grey == grey[0, 0], 255, grey))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_become_eight(channels: int) -> None:
    """Grey, grey with alpha, RGB, RGB with alpha; not clipped to white, as Pillow's own conversion does it."""
    high = blocks(seed=3, channels=channels)
    samples = high.astype(np.uint16) * 256 + blocks(seed=4, channels=channels)
    levels = samples / 257
    colours = levels if channels in (1, 3) else 255 - (255 - levels[..., :-1]) * levels[..., -1:] / 255
    assert_shows(png_16_bit(samples), colours if channels > 2 else colours.repeat(3, -1))


def test_a_transparent_level_of_sixteen_bits_lies_on_white() -> None:
    samples = blocks(seed=3, channels=1).astype(np.uint16) * 256 + 7
    expected = np.where(samples == samples[0, 0], 255, samples / 257).repeat(3, -1)
    assert_shows(png_16_bit(samples, [int(samples[0, 0, 0])]), expected)


def test_sixteen_bit_tiff_of_either_byte_order() -> None:
    levels = BLOCKS[..., 0].astype(np.uint16) * 257
    expected = BLOCKS[..., :1].repeat(3, -1)
    assert_shows(encoded(Image.fromarray(levels), "TIFF"), expected)
    big_endian = Image.frombytes("I;16B", levels.shape[::-1], levels.astype(">u2").tobytes())
    assert_shows(encoded(big_endian, "TIFF"), expected)


def test_ink_becomes_light() -> None:
    cmyk = Image.fromarray(np.concatenate([BLOCKS, blocks(seed=5, channels=1) // 2], -1), "CMYK")
    expected = np.asarray(cmyk.convert("RGB"))
    result = assert_shows(encoded(cmyk, "JPEG", quality=100), expected, 5)
    assert not result.original
    assert opened(ycck_jpeg(cmyk)).mode == "CMYK"
    assert_shows(ycck_jpeg(cmyk), expected, 5)
    assert_shows(encoded(cmyk, "TIFF"), expected)


@pytest.mark.parametrize(("format", "options"), [("BMP", {}), ("TIFF", {}), ("GIF", {}), ("WEBP", {"lossless": True})])
def test_every_format_shows_the_same(format: str, options: dict[str, Any]) -> None:
    few = (BLOCKS // 128 * 255).astype(np.uint8)  # a GIF has 256 colours
    result = assert_shows(encoded(few, format, **options), few)
    assert result.source_format == format and not result.original


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_of_an_animation_the_first_frame(format: str, options: dict[str, Any]) -> None:
    few = (BLOCKS // 128 * 255).astype(np.uint8)
    others = [Image.fromarray(255 - few), Image.new("RGB", (320, 288), "red")]
    data = encoded(few, format, save_all=True, append_images=others, **options)
    assert getattr(opened(data), "n_frames", 1) == 3
    assert_shows(data, few)


def test_of_a_multi_picture_object_the_first() -> None:
    others = [Image.new("RGB", (320, 288), "red")]
    data = encoded(BLOCKS, "MPO", save_all=True, append_images=others, quality=100, subsampling=0)
    result = assert_shows(data, BLOCKS)
    assert result.source_format == "MPO" and len(result.jpeg) < len(data)


# Colour


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_another_profile_is_converted(format: str) -> None:
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    profile = matrix_profile("Adobe RGB (1998)", ADOBE_RGB_XYZ, 2.19921875)
    expected = srgb_of(BLOCKS, ADOBE_RGB_XYZ, 563 / 256)
    assert np.abs(expected - BLOCKS).max() > 30
    # Of a JPEG both losses count, the first amplified by the conversion.
    assert_shows(encoded(BLOCKS, format, icc_profile=profile, **options), expected, 8 if format == "JPEG" else 4)


def test_a_profile_applies_to_palettes_and_below_alpha_too() -> None:
    profile = matrix_profile("Adobe RGB (1998)", ADOBE_RGB_XYZ, 2.19921875)
    expected = srgb_of(BLOCKS, ADOBE_RGB_XYZ, 563 / 256)
    assert_shows(encoded(np.concatenate([BLOCKS, OPAQUE], -1), "PNG", icc_profile=profile), expected, 4)
    palette = Image.fromarray(BLOCKS).quantize(90, dither=Image.Dither.NONE)
    assert_shows(
        encoded(palette, "PNG", icc_profile=profile), srgb_of(palette.convert("RGB"), ADOBE_RGB_XYZ, 563 / 256), 4
    )


def test_a_linear_profile_is_converted_though_it_is_called_srgb() -> None:
    profile = matrix_profile("Linear sRGB", SRGB_XYZ, 1.0)
    assert_shows(encoded(BLOCKS, "PNG", icc_profile=profile), 255 * srgb_curve(BLOCKS / 255), 4)


def test_a_grey_profile_is_converted() -> None:
    grey = BLOCKS[..., :1].repeat(3, -1)
    expected = 255 * srgb_curve((grey / 255) ** 1.5)
    profile = grey_profile("grey of gamma 1.5", 1.5)
    assert_shows(encoded(grey[..., 0], "JPEG", quality=100, icc_profile=profile), expected, 8)
    assert_shows(encoded(grey[..., 0], "PNG", icc_profile=profile), expected, 4)


@pytest.mark.parametrize(
    "profile",
    [b"garbage", matrix_profile("cut", ADOBE_RGB_XYZ, 2.2)[:200], grey_profile("of grey", 1.0)],
    ids=["garbage", "cut", "another-space"],
)
def test_with_a_profile_that_does_not_fit_pixels_are_taken_for_srgb(profile: bytes) -> None:
    assert_shows(encoded(BLOCKS, "JPEG", icc_profile=profile, quality=100, subsampling=0), BLOCKS)
    assert_shows(encoded(BLOCKS, "PNG", icc_profile=profile), BLOCKS)


# Quality


@pytest.mark.parametrize("size", [(1024, 1024), (1500, 1100), (2250, 1500), (768, 768), (2200, 2100)])
def test_reduced_decoding_costs_no_quality(size: tuple[int, int]) -> None:
    """Within 0.3 dB of a lossless bicubic resize, encoded at the same quality, of pictures that take as many bytes as
    SA-1B's."""
    data = encoded(photograph(*size, seed=3), "JPEG", quality=92)
    best = opened(data).resize(stored_size(*size, 512), Image.Resampling.BICUBIC)
    limit_db = psnr_db(pixels_of(encoded(best, "JPEG", quality=95)), best)
    assert psnr_db(pixels_of(stored(data, DEFAULTS).jpeg), best) > limit_db - 0.3


def test_the_quality_is_the_settings() -> None:
    data = encoded(photo(700, 600), "PNG")
    sizes = [len(stored(data, ImageSettings(jpeg_quality=quality)).jpeg) for quality in (50, 90, 95, 100)]
    assert sizes == sorted(set(sizes))


def test_the_same_bytes_give_the_same_bytes_in_any_process() -> None:
    code = """
import hashlib, json
from md_assets.core.settings import ImageSettings
from md_assets.storage.images import prepare_image
from md_assets_tests.storage.made_images import encoded, photo
made = [encoded(photo(700, 600), f) for f in ("JPEG", "PNG", "WEBP")]
print(json.dumps([hashlib.sha256(prepare_image(d, ImageSettings()).jpeg).hexdigest() for d in made]))
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1] and len(json.loads(runs[0])) == 3
