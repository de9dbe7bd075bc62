"""One image: from whatever upstream stores to the JPEG that the datasets keep.

Here: the rules for a sample's pixels (upright, on white, 8-bit sRGB, smaller edge at most `max_image_size`,
original bytes wherever they already satisfy that). Not here: which process does it (`storage.image_pool`).
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from md_assets.core.ledger import Reason
from md_assets.core.settings import ImageSettings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO")
"""Formats that are decoded, by Pillow's names. Others (PostScript, PDF, fonts ...) are risky and never occur."""

_EXIF_ORIENTATION = 0x0112
"""Exif 2.3, table 4."""

_UPRIGHT: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Exif orientation -> the operation that turns the picture upright; 1 needs none."""

_SWAP_EDGES = tuple(_UPRIGHT[orientation] for orientation in (5, 6, 7, 8))

_REDUCING_GAP = 2
"""How many times the target a DCT-reduced picture must at least measure. Reduced all the way, the picture is not the
bicubic one any more: on a photograph-like spectrum that costs 0.4 to 2 dB of PSNR, at a gap of 2 less than 0.1."""

_JPEG_MAX_EDGE = 65_500
"""JPEG_MAX_DIMENSION of libjpeg's jmorecfg.h, in px."""

_VERIFY_SCALE = 8
"""libjpeg's coarsest DCT scale. It reads every entropy-coded byte, so it finds a truncation like a full decode."""

ToSrgb = Callable[[Image.Image], Image.Image | None]
"""Converts a picture to sRGB; None where the picture's mode does not fit the profile."""


@dataclass(frozen=True)
class StoredImage:
    """An image as it is kept.

    Attributes:
        jpeg: the bytes to store.
        width, height: px, of the stored picture.
        source_width, source_height: px, of the upright picture upstream.
        source_format: Pillow's name of the upstream format.
        original: whether `jpeg` are upstream's own bytes.
    """

    jpeg: bytes
    width: int
    height: int
    source_width: int
    source_height: int
    source_format: str
    original: bool


def stored_size(width: int, height: int, max_image_size: int) -> tuple[int, int]:
    """The size in px that an image is stored in: smaller edge at most `max_image_size`, aspect kept.

    The longer edge is truncated to an integer, as torchvision's `Resize` does it in the reference: 513×5000 gives
    512×4990. Never larger than the image.
    """
    smaller = min(width, height)
    if smaller <= max_image_size:
        return width, height
    return width * max_image_size // smaller, height * max_image_size // smaller


def prepare_image(data: bytes, settings: ImageSettings) -> StoredImage | str:
    """Decode, judge and, where needed, convert one image.

    Args:
        data: an encoded image; not trusted.
        settings: limits, sizes and quality.

    Returns: what to store, or the reason (`core.ledger.Reason`) for which it is rejected. Size limits are
        judged by the header, so nothing of a too large image is decoded.

    May be repeated: the same bytes and settings give the same result.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is not ours to mend
            return _prepare(data, settings)
    except Image.DecompressionBombError:
        return Reason.TOO_LARGE
    except Exception:  # decoders raise anything, from SyntaxError to struct.error, on bytes they do not expect
        return Reason.UNDECODABLE


def _prepare(data: bytes, settings: ImageSettings) -> StoredImage | str:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > settings.max_image_pixels:
            return Reason.TOO_LARGE
        if min(width, height) < settings.min_image_size:
            return Reason.TOO_SMALL
        target = stored_size(width, height, settings.max_image_size)
        if max(target) > _JPEG_MAX_EDGE:
            return Reason.TOO_LARGE
        source_format = image.format or ""
        if target == image.size and _is_plain_jpeg(image):
            image.draft(image.mode, (max(width // _VERIFY_SCALE, 1), max(height // _VERIFY_SCALE, 1)))
            image.load()
            return StoredImage(data, width, height, width, height, source_format, original=True)
        picture = _converted(image, target)
        # Asked for after loading: Pillow turns a TIFF while it loads it, and finds a PNG's Exif behind the pixels.
        operation = _UPRIGHT.get(_orientation(image))
    if operation is not None:
        picture = picture.transpose(operation)
    picture.info = {}  # Pillow would write upstream's comment into the JPEG, and fail on a long one
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=settings.jpeg_quality)
    source = (height, width) if operation in _SWAP_EDGES else (width, height)
    return StoredImage(encoded.getvalue(), *picture.size, *source, source_format, original=False)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken Exif block says nothing of the picture, which is then taken as it lies
        return 1


def _is_plain_jpeg(image: Image.Image) -> bool:
    return (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and _UPRIGHT.get(_orientation(image)) is None
        and _to_srgb(image) is None
    )


def _converted(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """8-bit sRGB pixels at `target` size (width, height in px), not yet turned upright."""
    # Decoding at a reduced DCT scale: a good part of the resize for free.
    image.draft(image.mode, (target[0] * _REDUCING_GAP, target[1] * _REDUCING_GAP))
    image.load()
    to_srgb = _to_srgb(image)
    picture = _eight_bit(image)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = _on_white(picture)
    # Resizing comes before the colour conversion: both take their time by the pixel.
    if picture.mode not in ("RGB", "L", "CMYK"):
        picture = picture.convert("RGB")
    if picture.size != target:
        picture = picture.resize(target, Image.Resampling.BICUBIC)
    if to_srgb is not None:
        converted = to_srgb(picture)
        if converted is not None:
            return converted
    return picture.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits; Pillow's own conversion clips it to white instead."""
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.float32)
        if "transparency" in image.info:
            levels[levels == image.info["transparency"]] = 65535  # what is transparent lies on white
        levels /= 257
        levels += 0.5
        return Image.fromarray(levels.clip(0, 255, out=levels).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    with_alpha = image.convert("RGBA")
    white = Image.new("RGBA", with_alpha.size, "white")
    return Image.alpha_composite(white, with_alpha).convert("RGB")


def _to_srgb(image: Image.Image) -> ToSrgb | None:
    """The conversion that the embedded ICC profile asks for; None without one and where it is sRGB already."""
    profile = image.info.get("icc_profile")
    return _conversion(profile) if profile else None


@functools.lru_cache(maxsize=32)
def _conversion(profile: bytes) -> ToSrgb | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        description = ImageCms.getProfileDescription(source)
        if "sRGB" in description and "linear" not in description.lower():
            return None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None  # a broken profile: viewers take the pixels for sRGB, and so do we
    target = ImageCms.createProfile("sRGB")

    def convert(picture: Image.Image) -> Image.Image | None:
        try:
            converted: Image.Image | None = ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
            return converted
        except (ImageCms.PyCMSError, ValueError):
            return None  # a profile of another colour space than the pixels

    return convert
