"""Pictures, files of them and colour profiles, made for tests of the image rules."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

ADOBE_RGB_XYZ = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
SRGB_XYZ = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))
"""Rows X, Y, Z, columns red, green, blue, adapted to D50, from Adobe RGB (1998) and IEC 61966-2-1."""


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise with the spectrum of photographs (amplitude falls as 1/f), mostly grey, a little coloured."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = frequency**-1.1 * (random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape))
        plane = np.fft.irfft2(spectrum, s=(height, width))
        planes.append(plane / plane.std())
    levels = 128 + 45 * (0.85 * planes[0][..., None] + 0.4 * np.stack(planes, -1))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def blocks(seed: int = 0, channels: int = 3, edge_px: int = 32) -> Pixels:
    """10×9 flat squares of random colours: what a JPEG leaves nearly as it was in the middle of each."""
    squares = np.random.default_rng(seed).integers(0, 256, (9, 10, channels), dtype=np.uint8)
    return squares.repeat(edge_px, 0).repeat(edge_px, 1)


def middles(pixels: npt.NDArray[Any], edge_px: int = 32) -> npt.NDArray[Any]:
    """The middle pixel of each square of `blocks`."""
    return pixels[edge_px // 2 :: edge_px, edge_px // 2 :: edge_px].astype(float)


def encoded(image: Image.Image | Pixels, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def pixels_of(data: bytes) -> Pixels:
    return np.asarray(opened(data).convert("RGB"))


def psnr_db(one: npt.ArrayLike, other: npt.ArrayLike) -> float:
    error = np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def png_16_bit(samples_HWC: npt.NDArray[np.uint16], transparent: Sequence[int] | None = None) -> bytes:
    """A PNG of 16 bits a sample, which Pillow writes only in grey."""
    height, width, channels = samples_HWC.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples_HWC)
    keyed = b"" if transparent is None else _chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + keyed
    return start + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(bytes(10_000_000)))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def ycck_jpeg(cmyk: Image.Image) -> bytes:
    """A JPEG whose ink is stored as YCC and K, as Photoshop does it; Pillow writes plain CMYK only."""
    cyan, magenta, yellow, black = cmyk.split()
    ycc = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()
    inverted = [plane.point(lambda level: 255 - level) for plane in ycc]  # Adobe's files hold inverted ink
    data = encoded(Image.merge("CMYK", (*inverted, black)), "JPEG", quality=100, subsampling=0)
    adobe = data.index(b"\xff\xee\x00\x0eAdobe")
    return data[: adobe + 15] + b"\x02" + data[adobe + 16 :]  # transform 2: YCCK


def matrix_profile(description: str, xyz: Sequence[Sequence[float]], gamma: float) -> bytes:
    """An ICC profile (version 2) of an RGB space given by primaries and one exponent."""
    tags = {f"{colour}XYZ": _xyz([row[i] for row in xyz]) for i, colour in enumerate("rgb")}
    tags |= {f"{colour}TRC": _gamma(gamma) for colour in "rgb"}
    return _profile(description, b"RGB ", tags)


def grey_profile(description: str, gamma: float) -> bytes:
    """An ICC profile (version 2) of a grey space given by its exponent."""
    return _profile(description, b"GRAY", {"kTRC": _gamma(gamma)})


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def _gamma(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)


def _profile(description: str, space: bytes, tags: dict[str, bytes]) -> bytes:
    text = description.encode("ascii") + b"\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {"desc": described, "cprt": b"text" + bytes(4) + b"none\0", "wtpt": _xyz((0.9642, 1, 0.8249)), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def srgb_of(rgb: npt.ArrayLike, xyz: Sequence[Sequence[float]], gamma: float) -> npt.NDArray[Any]:
    """Pixels of a `matrix_profile` in sRGB, calculated without a colour management system."""
    linear = (np.asarray(rgb, float) / 255) ** gamma @ np.array(xyz).T @ np.linalg.inv(np.array(SRGB_XYZ)).T
    return 255 * srgb_curve(linear.clip(0, 1))


def srgb_curve(linear: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """IEC 61966-2-1: linear light 0–1 as stored 0–1."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
