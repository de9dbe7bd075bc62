"""Images that are none, or larger than fits: the sample is rejected with a reason, and memory stays small."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from md_assets.core.ledger import Reason
from md_assets.core.settings import ImageSettings
from md_assets.storage.images import StoredImage, prepare_image
from md_assets_tests.storage.made_images import blocks, encoded, opened, photo, pixels_of, png_header

DEFAULTS = ImageSettings()
SMALL_LIMITS = ImageSettings(min_image_size=32, max_image_size=48)
"""So that small files take the same ways as large ones."""

FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"subsampling": 0, "quality": 99}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        bytes(10_000),
        b"not an image",
        b"<html>403</html>",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 300 300\n",
        b"P6 300 300 255\n" + bytes(270_000),
        random.Random(1).randbytes(5000),
    ],
    ids=["empty", "nul", "nuls", "text", "page", "jpeg", "png", "gif", "webp", "postscript", "pnm", "noise"],
)
def test_what_is_no_image_of_a_known_format_is_undecodable(data: bytes) -> None:
    assert prepare_image(data, DEFAULTS) == Reason.UNDECODABLE


def test_formats_that_no_source_has_are_not_even_tried() -> None:
    picture = photo(300, 300)
    for format in ("PPM", "TGA", "ICO", "PCX", "JPEG2000", "EPS", "PDF", "DDS"):
        assert prepare_image(encoded(picture, format), DEFAULTS) == Reason.UNDECODABLE


@pytest.mark.parametrize(("format", "options"), FORMATS)
@pytest.mark.parametrize("size", [(45, 40), (90, 70)], ids=["fits", "resized"])
def test_a_cut_image_is_found_wherever_it_is_cut(format: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    """Only what lies behind the last pixel (checksums, end marks) may be missing: not a pixel then differs."""
    data = encoded(photo(*size), format, **options)
    whole = prepare_image(data, SMALL_LIMITS)
    assert isinstance(whole, StoredImage)
    accepted = []
    for cut in {*range(0, len(data), max(len(data) // 250, 1)), *range(len(data) - 40, len(data))}:
        result = prepare_image(data[:cut], SMALL_LIMITS)
        if isinstance(result, StoredImage):
            accepted.append(cut)
            assert np.array_equal(pixels_of(result.jpeg), pixels_of(whole.jpeg))
        else:
            assert result == Reason.UNDECODABLE
    assert not accepted or (format in ("PNG", "GIF", "BMP") and min(accepted) >= len(data) - 22)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_cut_is_found_though_an_image_that_fits_is_never_decoded_whole(options: dict[str, Any], mode: str) -> None:
    """The reduced decode, by which original bytes are judged, finds what a full one finds."""
    data = encoded(photo(500, 400).convert(mode), "JPEG", **options)
    assert isinstance(kept := prepare_image(data, DEFAULTS), StoredImage) and kept.original
    cuts = [*range(2, len(data), 997), *range(len(data) - 40, len(data))]
    assert [cut for cut in cuts if prepare_image(data[:cut], DEFAULTS) != Reason.UNDECODABLE] == []
    for cut in cuts[-40:]:
        with pytest.raises(OSError, match="truncated"):
            opened(data[:cut])


def test_floating_point_pixels_have_no_white() -> None:
    assert prepare_image(encoded(np.zeros((300, 300), np.float32), "TIFF"), DEFAULTS) == Reason.UNDECODABLE


@given(st.sampled_from(range(len(FORMATS))), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8))
@settings(max_examples=300, deadline=None)
def test_damaged_bytes_give_a_picture_or_a_reason(number: int, changes: list[tuple[float, int]]) -> None:
    data = bytearray(SAMPLES[number])
    for place, value in changes:
        data[min(int(place * len(data)), len(data) - 1)] = value
    result = prepare_image(bytes(data), SMALL_LIMITS)
    if isinstance(result, StoredImage):
        assert min(result.width, result.height) in range(32, 49)
        assert (result.width, result.height) == opened(result.jpeg).size
    else:
        assert result in (Reason.UNDECODABLE, Reason.TOO_LARGE, Reason.TOO_SMALL)


SAMPLES = [encoded(photo(90, 70), format, **options) for format, options in FORMATS]


# More pixels than fit


def sized(width: int, height: int) -> dict[str, bytes]:
    """Small files of each format whose headers promise this size."""
    jpeg = bytearray(encoded(photo(64, 64), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    gif = bytearray(encoded(blocks(), "GIF"))
    gif[6:10] = struct.pack("<HH", width, height)
    frame = bytes(gif).index(b",\0\0\0\0" + struct.pack("<HH", 320, 288))
    gif[frame + 5 : frame + 9] = struct.pack("<HH", width, height)
    bmp = bytearray(encoded(blocks(), "BMP"))
    bmp[18:26] = struct.pack("<ii", width, height)
    tiff = bytearray(encoded(photo(64, 64), "TIFF"))
    for tag, value in ((256, width), (257, height)):
        entry = bytes(tiff).index(struct.pack("<HHI", tag, 4, 1))  # an unsigned 32-bit number
        tiff[entry + 8 : entry + 12] = struct.pack("<I", value)
    return {
        "png": png_header(width, height),
        "jpeg": bytes(jpeg),
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "tiff": bytes(tiff),
    }


@pytest.mark.parametrize("format", ["png", "jpeg", "gif", "bmp", "tiff"])
def test_a_bomb_is_too_large_and_nothing_of_it_is_decoded(tmp_path: Path, format: str) -> None:
    """30,000 × 30,000 pixels would be 2.7 GB. Measured in a process of its own."""
    bomb = tmp_path / "bomb.jpg"
    bomb.write_bytes(sized(30_000, 30_000)[format])
    assert bomb.stat().st_size < 300_000
    code = f"""
import pathlib
from md_assets.core.settings import ImageSettings
from md_assets.storage.images import prepare_image
from md_assets_tests.storage.memory import peak_mib
data, before = pathlib.Path({str(bomb)!r}).read_bytes(), peak_mib()
print(prepare_image(data, ImageSettings()), peak_mib() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, grown_mib = done.stdout.split()
    assert reason == Reason.TOO_LARGE and int(grown_mib) < 20


@pytest.mark.parametrize("format", ["png", "jpeg", "gif", "bmp", "tiff"])
def test_size_limits_are_judged_by_the_header(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded")

    for kind in {type(Image.open(io.BytesIO(data))) for data in sized(600, 500).values()}:
        monkeypatch.setattr(kind, "load", fail)
    at_limit = ImageSettings(max_image_pixels=600 * 500)
    assert prepare_image(sized(601, 500)[format], at_limit) == Reason.TOO_LARGE
    assert prepare_image(sized(255, 500)[format], at_limit) == Reason.TOO_SMALL
    assert prepare_image(sized(600, 500)[format], at_limit) == Reason.UNDECODABLE  # by `fail`: it was to be decoded


def test_exactly_the_limit_is_kept() -> None:
    data = encoded(photo(600, 500), "PNG")
    assert isinstance(prepare_image(data, ImageSettings(max_image_pixels=300_000)), StoredImage)
    assert prepare_image(data, ImageSettings(max_image_pixels=299_999)) == Reason.TOO_LARGE


def test_what_a_jpeg_cannot_hold_is_too_large() -> None:
    assert prepare_image(encoded(Image.new("L", (65_501, 256)), "PNG"), DEFAULTS) == Reason.TOO_LARGE
    kept = prepare_image(encoded(Image.new("L", (256, 65_500)), "PNG"), DEFAULTS)
    assert isinstance(kept, StoredImage) and kept.height == 65_500


def test_text_that_unpacks_to_much_is_undecodable_and_not_unpacked(tmp_path: Path) -> None:
    """A zTXt chunk of 256 KB that unpacks to 256 MB, in a picture that is fine."""
    code = """
import struct, zlib
from md_assets.core.settings import ImageSettings
from md_assets.storage.images import prepare_image
from md_assets_tests.storage.made_images import encoded, photo
from md_assets_tests.storage.memory import peak_mib
packer = zlib.compressobj(9)
text = b"k\\0\\0" + b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
png = encoded(photo(300, 300), "PNG")
before = peak_mib()
print(prepare_image(png[:33] + chunk + png[33:], ImageSettings()), peak_mib() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, grown_mib = done.stdout.split()
    assert reason == Reason.UNDECODABLE and int(grown_mib) < 60
