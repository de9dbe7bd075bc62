"""Drawn pictures with captions that say what is on them: the samples of the miniature sources.

Here: one picture from one number. Not here: archives made of them, see `demo.miniatures`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_COLOURS = {
    "red": (214, 57, 57),
    "orange": (238, 140, 44),
    "yellow": (240, 205, 70),
    "green": (76, 160, 88),
    "teal": (45, 150, 150),
    "blue": (56, 104, 200),
    "violet": (132, 84, 180),
    "pink": (226, 120, 170),
}
_SHAPES = ("circle", "square", "triangle", "ring")
_NUMBERS = ("one", "two", "three", "four", "five")


@dataclass(frozen=True)
class Drawing:
    """A picture and what is on it."""

    image: Image.Image
    caption: str

    def jpeg(self, quality: int = 90) -> bytes:
        """The picture as JPEG of the given quality."""
        return self._saved("JPEG", quality=quality)

    def webp(self) -> bytes:
        """The picture as lossless WebP."""
        return self._saved("WEBP", lossless=True, quality=0, method=0)  # the fastest; pixels are the same

    def png(self) -> bytes:
        """The picture as PNG."""
        return self._saved("PNG", compress_level=1)

    def _saved(self, image_format: str, **options: Any) -> bytes:
        encoded = io.BytesIO()
        self.image.save(encoded, image_format, **options)
        return encoded.getvalue()


def draw(seed: int, width: int = 1024, height: int = 1024) -> Drawing:
    """Some shapes of one colour over a gradient of two others.

    Args:
        seed: the same number gives the same picture.
        width, height: px, ≥ 64.
    """
    rng = np.random.default_rng(seed)
    names = list(_COLOURS)
    top, bottom, colour = (names[i] for i in rng.choice(len(names), 3, replace=False))
    shape = _SHAPES[rng.integers(len(_SHAPES))]
    count = int(rng.integers(1, len(_NUMBERS) + 1))
    image = _gradient(rng, _COLOURS[top], _COLOURS[bottom], width, height)
    pen = ImageDraw.Draw(image)
    edge = min(width, height)
    for _ in range(count):
        radius = float(rng.uniform(0.08, 0.2)) * edge
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        _shape(pen, shape, float(x), float(y), radius, _COLOURS[colour])
    plural = "" if count == 1 else "s"
    caption = f"{_NUMBERS[count - 1]} {colour} {shape}{plural} over a {top} to {bottom} gradient"
    return Drawing(image, caption)


def _gradient(
    rng: np.random.Generator, top: tuple[int, ...], bottom: tuple[int, ...], width: int, height: int
) -> Image.Image:
    """From `top` to `bottom`, with a little grain, so that JPEGs have the size of photographs."""
    share = np.linspace(0, 1, height)[:, None, None]
    rows = np.array(top) * (1 - share) + np.array(bottom) * share
    grain = np.kron(rng.normal(0, 9, (height // 2 + 1, width // 2 + 1)), np.ones((2, 2)))[:height, :width, None]
    return Image.fromarray((rows + grain).clip(0, 255).astype(np.uint8))


def _shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=max(int(radius / 3), 2))
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
