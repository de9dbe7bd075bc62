"""One image: from whatever upstream stores to the JPEG that the datasets keep.

Here: the rules for a sample's pixels (upright, on white, 8-bit sRGB, smaller edge at most `max_image_size`,
original bytes wherever they already satisfy that). Not here: which process does it (`storage.image_pool`); why these
libraries, see docs/decisions/008.
"""

from __future__ import annotations

import functools
import io
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageCms

from md_assets.core.ledger import Reason
from md_assets.core.settings import ImageSettings

try:
    import cykooz_resizer
    from cykooz_resizer.alpha import set_image_mode

    SIMD_RESIZE = True
except ImportError:
    SIMD_RESIZE = False
"""Whether cykooz.resizer is there. It has wheels for x86-64 only; elsewhere Pillow resizes, which takes longer."""

CODECS = ("pillow", "simplejpeg", *(("cykooz.resizer",) if SIMD_RESIZE else ()))
"""Packages whose versions decide the stored bytes."""

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

_LEAST_GAP = 1.4
"""How many times the target a DCT-reduced picture must at least measure. Reduced all the way, the picture is not the
bicubic one any more: on a photograph-like spectrum that costs 0.4 to 2 dB of PSNR, at a gap of 1.46, SA-1B's, 0.2."""

_REDUCTIONS = (8, 4, 2)
"""How many times smaller libjpeg decodes at little cost; it knows other ratios, but slowly."""

_JPEG_MODES = {"RGB": ("RGBX", "RGBX", ("YCbCr", "RGB")), "L": ("L", "GRAY", ("Gray",))}
"""Pillow's mode of an ordinary JPEG -> the mode it gets, what simplejpeg calls that, and what it must find in the file.
With a byte that nobody reads behind each pixel, Pillow and the resizer take the decoder's pixels without a copy."""

_RESIZED_MODES = ("L", "RGB", "RGBX", "CMYK")
"""Modes that are resized as they are."""

_LOST = ("remature end", "bad Huffman code", "bad arithmetic code", "instead of RST")
"""Signs in libjpeg's warnings (jerror.h) that a part of the picture is gone. Others (bytes too many before a marker, an
odd Adobe or JFIF version) come with pictures that are whole."""

_JPEG_MAX_EDGE = 65_500
"""JPEG_MAX_DIMENSION of libjpeg's jmorecfg.h, in px."""

_of_this_thread = threading.local()
"""Holds a resizer, which keeps its buffers for the next picture and serves one thread at a time."""

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

    May be repeated: the same bytes and settings give the same result, with the same libraries on the same type of
    processor; on another one (other vector instructions) levels may differ by rounding.
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
            # The coarsest reduction reads every entropy-coded byte, so it finds what a full decode finds.
            decode(data, image, (1, 1))
            return StoredImage(data, width, height, width, height, source_format, original=True)
        least = (math.ceil(target[0] * _LEAST_GAP), math.ceil(target[1] * _LEAST_GAP))
        picture = _in_srgb(_resized(decode(data, image, least), target), image)
        # Asked for after loading: Pillow turns a TIFF while it loads it, and finds a PNG's Exif behind the pixels.
        operation = _UPRIGHT.get(_orientation(image))
    if operation is not None:
        picture = picture.transpose(operation)
    source = (height, width) if operation in _SWAP_EDGES else (width, height)
    jpeg = encode_jpeg(picture, settings.jpeg_quality)
    return StoredImage(jpeg, *picture.size, *source, source_format, original=False)


def encode_jpeg(picture: Image.Image, quality: int) -> bytes:
    """A picture as JPEG with chroma of half the width and height (4:2:0), Pillow's default; nothing but pixels."""
    picture.info = {}  # Pillow would write upstream's comment into the JPEG, and fail on a long one
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue()


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


@dataclass(frozen=True)
class Decoded:
    """Pixels on white, in the colours of their file.

    Attributes:
        picture: of a mode in `_RESIZED_MODES`.
        extent: how much of its width and height in px is picture: the last column and row of a reduced JPEG may stand
            for less than a whole pixel.
    """

    picture: Image.Image
    extent: tuple[float, float]


def decode(data: bytes, image: Image.Image, least: tuple[int, int]) -> Decoded:
    """An image, if it is a JPEG at the coarsest DCT reduction that leaves `least`.

    Args:
        data: the encoded image.
        image: the same, opened but not loaded.
        least: width and height in px.

    Raises:
        Exception: any, of a decoder that finds it damaged or of a mode that cannot be converted.
    """
    decoded = _decode_jpeg(data, image, least)
    if decoded is not None:
        return decoded
    reduced = image.draft(image.mode, least)
    image.load()
    picture = _eight_bit(image)
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = _on_white(picture)
    if picture.mode not in _RESIZED_MODES:
        picture = picture.convert("RGB")
    return Decoded(picture, reduced[1][2:] if reduced else picture.size)


def _decode_jpeg(data: bytes, image: Image.Image, least: tuple[int, int]) -> Decoded | None:
    """`decode` of an ordinary JPEG, faster and stricter; None for what Pillow has to decode and to judge."""
    if image.format != "JPEG" or image.mode not in _JPEG_MODES:
        return None
    mode, decoded_as, stored_as = _JPEG_MODES[image.mode]
    width, height = image.size
    by = next((by for by in _REDUCTIONS if width >= by * least[0] and height >= by * least[1]), 1)
    size = (-(-width // by), -(-height // by))
    try:
        found_height, found_width, found_as, _ = simplejpeg.decode_jpeg_header(data)
        if (found_width, found_height) != image.size or found_as not in stored_as:
            return None
        pixels_HWC = simplejpeg.decode_jpeg(
            data,
            decoded_as,
            # Chroma of half the size need not be interpolated for a picture that gets half as large or smaller.
            fastupsample=width >= least[0] and height >= least[1],
            min_width=size[0],
            min_height=size[1],
        )
    except ValueError as error:
        if any(sign in str(error) for sign in _LOST):
            raise
        return None
    if pixels_HWC.shape[:2] != size[::-1]:
        return None
    return Decoded(Image.frombuffer(mode, size, pixels_HWC, "raw", mode, 0, 1), (width / by, height / by))


def _resized(decoded: Decoded, target: tuple[int, int]) -> Image.Image:
    """The picture at `target` size (width, height in px), antialiased bicubic.

    cykooz.resizer's Catmull-Rom filter is Pillow's bicubic one; both are 57 dB from the exact result, by rounding.
    """
    picture = decoded.picture
    if picture.size == target:
        return picture
    if not SIMD_RESIZE:
        return picture.resize(target, Image.Resampling.BICUBIC, (0, 0, *decoded.extent))
    if picture.mode == "RGBX":
        set_image_mode(picture, "RGB")  # to Pillow and the resizer it lies in memory like this
    resized = Image.new(picture.mode, target, None)
    options = cykooz_resizer.ResizeOptions(
        cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom),
        crop_box=cykooz_resizer.CropBox(0, 0, *decoded.extent),
    )
    if not hasattr(_of_this_thread, "resizer"):
        _of_this_thread.resizer = cykooz_resizer.Resizer()
    _of_this_thread.resizer.resize_pil(picture, resized, options)
    return resized


def _in_srgb(picture: Image.Image, image: Image.Image) -> Image.Image:
    """The picture converted as the profile of `image` asks. After resizing: both take their time by the pixel."""
    to_srgb = _to_srgb(image)
    converted = to_srgb(picture) if to_srgb else None
    if converted is None:
        converted = picture if picture.mode == "RGB" else picture.convert("RGB")
    return converted


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
