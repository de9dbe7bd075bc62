"""Archives like those of the sources, filled with pictures that are like photographs to a codec.

A picture is noise whose amplitude falls as 1/f^1.4 in luma and as 1/f^1.5, a third as strong, in chroma, below two
dozen flat polygons with hard edges. With that exponent files get as large as the sources' are: 2250×1500 px at JPEG
quality 92 take 0.87 MB (SA-1B: 11 GB for 11,186 images and their masks), 768×768 px as lossless WebP 0.84 MB
(DiffusionDB: 6.5 TB for 14 million of 512 to 768 px). Four such pictures are shifted around and mirrored, so that no
two files are equal.

Here: making the archives. Not here: what is measured with them, see `bench.images`.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Pixels = npt.NDArray[np.uint8]

JPEG_QUALITY = 92
LUMA_EXPONENT, CHROMA_EXPONENT = 1.4, 1.5
LUMA_STD, CHROMA_STD = 40, 12
"""In levels."""
POLYGONS = 24
BASE_PICTURES = 4


@dataclass(frozen=True)
class Source:
    """What the archives of a dataset look like.

    Attributes:
        container: of an archive.
        image_format: `JPEG` (4:2:0) or `WEBP` (lossless).
        width, height: px, of the largest picture.
        least_edge_px: pictures are cut to edges of this to the full length; None leaves them whole.
        member: the path of image number N in its archive, with `{n}`.
        beside: extension -> size in bytes of what lies beside each image.
    """

    container: Literal["tar", "tgz", "zip"]
    image_format: Literal["JPEG", "WEBP"]
    width: int
    height: int
    member: str
    least_edge_px: int | None = None
    beside: tuple[tuple[str, int], ...] = ()


SOURCES = {
    "jdb": Source("tgz", "JPEG", 1024, 1024, "./000/{n:06}.jpg"),
    "sa1b": Source("tar", "JPEG", 2250, 1500, "sa_{n}.jpg", beside=(("json", 50_000),)),
    "diffdb": Source("zip", "WEBP", 768, 768, "{n:06}.webp"),
    "cc12m": Source("tar", "JPEG", 1200, 1200, "{n:09}.jpg", 200, (("txt", 60), ("json", 300))),
}
"""By dataset, as `docs/benchmarks.md` describes them."""


def photograph(width: int, height: int, seed: int) -> Pixels:
    """H×W×3 levels, RGB, that go on where the opposite edge begins."""
    random = np.random.default_rng(seed)
    polygons = Image.new("YCbCr", (width, height), (128, 128, 128))
    draw = ImageDraw.Draw(polygons)
    for _ in range(POLYGONS):
        radius = random.uniform(0.03, 0.25) * min(width, height)
        angles = np.sort(random.uniform(0, 2 * np.pi, random.integers(3, 9)))
        corners = random.uniform((0, 0), (width, height)) + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
        level = tuple(int(v) for v in random.uniform((70, 110, 110), (190, 146, 146)))
        draw.polygon([tuple(corner) for corner in corners], fill=level)
    luma = LUMA_STD * _noise(height, width, LUMA_EXPONENT, random)
    chroma = [CHROMA_STD * _noise(height, width, CHROMA_EXPONENT, random) for _ in range(2)]
    levels = np.asarray(polygons, np.float32) + np.stack([luma, *chroma], -1)
    return np.asarray(Image.fromarray(levels.clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB"))


def _noise(height: int, width: int, exponent: float, random: np.random.Generator) -> npt.NDArray[Any]:
    """Of mean 0 and standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = frequency**-exponent * (random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape))
    plane = np.fft.irfft2(spectrum, s=(height, width))
    normalized: npt.NDArray[Any] = plane / plane.std()
    return normalized


def pictures(source: Source, count: int, seed: int) -> Iterator[Pixels]:
    """`count` different pictures, H×W×3."""
    random = np.random.default_rng(seed)
    bases = [
        photograph(source.width, source.height, seed * BASE_PICTURES + i) for i in range(min(count, BASE_PICTURES))
    ]
    for number in range(count):
        shift = random.integers((source.height, source.width))
        picture = np.roll(bases[number % len(bases)], shift, (0, 1))[:, :: random.choice((-1, 1))]
        if source.least_edge_px is not None:
            least = source.least_edge_px
            height, width = random.integers(least, (source.height + 1, source.width + 1))
            picture = picture[:height, :width]
        yield np.ascontiguousarray(picture)


def make_archive(source: Source, path: Path, count: int, seed: int) -> None:
    """An archive of `count` images at `path`; the same arguments give the same images."""
    members = _members(source, count, seed)
    if source.container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members:
                archive.writestr(name, data)
        return
    with tarfile.open(path, "w:gz" if source.container == "tgz" else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _members(source: Source, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    for number, picture in enumerate(pictures(source, count, seed)):
        name = source.member.format(n=number)
        file = io.BytesIO()
        options: dict[str, Any] = {"quality": JPEG_QUALITY} if source.image_format == "JPEG" else {"lossless": True}
        Image.fromarray(picture).save(file, source.image_format, **options)
        yield name, file.getvalue()
        for extension, size_bytes in source.beside:
            text = f"picture {number} "
            yield f"{name.rpartition('.')[0]}.{extension}", (text * (size_bytes // len(text) + 1)).encode()[:size_bytes]
