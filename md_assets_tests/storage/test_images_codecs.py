"""The fast ways of decoding and resizing: they show what Pillow shows, and find what is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from md_assets.core.ledger import Reason
from md_assets.core.settings import ImageSettings
from md_assets.storage import images
from md_assets.storage.images import StoredImage, prepare_image, stored_size
from md_assets_tests.storage.made_images import encoded, opened, photo, pixels_of, psnr_db

SMALL = ImageSettings(min_image_size=32, max_image_size=128, jpeg_quality=100)
PHOTO = photo(400, 330)
FIT, RESIZED = photo(120, 100), photo(300, 260)

JPEGS = {
    "progressive": encoded(PHOTO, "JPEG", quality=92, progressive=True),
    "restarts": encoded(PHOTO, "JPEG", quality=92, restart_marker_blocks=3),
    "rgb": encoded(PHOTO, "JPEG", quality=92, keep_rgb=True),
    "grey": encoded(PHOTO.convert("L"), "JPEG", quality=92),
} | {
    sampling: simplejpeg.encode_jpeg(np.array(PHOTO), 92, colorsubsampling=sampling)
    for sampling in ("444", "422", "420", "440", "411")
}


def stored(data: bytes, settings: ImageSettings = SMALL) -> StoredImage:
    result = prepare_image(data, settings)
    assert isinstance(result, StoredImage), result
    return result


def lossless(data: bytes) -> Image.Image:
    picture = opened(data).convert("RGB")
    return picture.resize(stored_size(*picture.size, SMALL.max_image_size), Image.Resampling.BICUBIC)


def decoded_by_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled, at each decode from now on, with whether simplejpeg did it."""
    taken: list[bool] = []
    decode = images._decode_jpeg

    def watched(*arguments: Any) -> Any:
        decoded = decode(*arguments)
        taken.append(decoded is not None)
        return decoded

    monkeypatch.setattr(images, "_decode_jpeg", watched)
    return taken


@pytest.mark.parametrize("kind", JPEGS)
def test_every_kind_of_jpeg_is_resized_as_pillow_does_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = decoded_by_simplejpeg(monkeypatch)
    best = lossless(JPEGS[kind])
    limit_db = psnr_db(pixels_of(encoded(best, "JPEG", quality=100)), best)
    assert psnr_db(pixels_of(stored(JPEGS[kind]).jpeg), best) > min(limit_db - 0.3, 50)  # Pillow rounds too
    assert taken == [True]


@pytest.mark.parametrize("size", [(301, 263), (517, 523), (1033, 1047)])
def test_a_reduced_picture_lies_where_the_whole_one_lies(size: tuple[int, int]) -> None:
    """Of sizes that are no multiple of the reduction the last column and row are less than a pixel."""
    data = encoded(photo(*size), "JPEG", quality=95)
    best = lossless(data)
    limit_db = psnr_db(pixels_of(encoded(best, "JPEG", quality=100)), best)
    assert psnr_db(pixels_of(stored(data).jpeg), best) > limit_db - 1
    pillow_only = opened(data)
    pillow_only.format = "MPO"  # what simplejpeg leaves alone
    decoded = images.decode(data, pillow_only, (256, 256))
    assert psnr_db(images._resized(decoded, best.size), best) > 38


def test_memory_of_a_huge_jpeg_is_that_of_a_reduced_one() -> None:
    data = encoded(Image.new("RGB", (8200, 8200)), "JPEG")
    decoded = images.decode(data, Image.open(images.io.BytesIO(data)), (1024, 1024))
    assert decoded.picture.size == (1025, 1025)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_without_simd_the_picture_is_the_same_but_for_rounding(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert images.SIMD_RESIZE
    data = encoded(PHOTO.convert(mode), "TIFF")
    fast = pixels_of(stored(data).jpeg)
    monkeypatch.setattr(images, "SIMD_RESIZE", False)
    assert psnr_db(fast, pixels_of(stored(data).jpeg)) > 46


def parts_missing() -> dict[str, bytes]:
    """JPEGs that end as they should, but of which a part is gone."""
    made = {}
    for name, picture in (("fits", FIT), ("resized", RESIZED)):
        data = encoded(picture, "JPEG", quality=92)
        restarts = encoded(picture, "JPEG", quality=92, restart_marker_blocks=2)
        progressive = encoded(picture, "JPEG", quality=92, progressive=True)
        made |= {
            f"{name}-short": data[: len(data) // 2] + b"\xff\xd9",
            f"{name}-progressive": progressive[: len(progressive) // 2] + b"\xff\xd9",
            f"{name}-restart": restarts.replace(b"\xff\xd3", b"\xff\xd6", 1),
        }
    return made


@pytest.mark.parametrize("name", sorted(parts_missing()))
def test_a_jpeg_of_which_a_part_is_missing_is_undecodable_though_pillow_takes_it(name: str) -> None:
    data = parts_missing()[name]
    opened(data)
    assert prepare_image(data, SMALL) == Reason.UNDECODABLE


@pytest.mark.parametrize("picture", [FIT, RESIZED], ids=["fits", "resized"])
def test_bytes_too_many_do_no_harm(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """libjpeg warns of them, so simplejpeg refuses; Pillow reads the picture, of which nothing is missing."""
    data = encoded(picture, "JPEG", quality=92)
    filled = data[:-2] + bytes(300) + data[-2:]
    taken = decoded_by_simplejpeg(monkeypatch)
    assert psnr_db(pixels_of(stored(filled).jpeg), pixels_of(stored(data).jpeg)) > 45
    assert taken == [False, True]


def test_what_simplejpeg_finds_other_than_pillow_is_for_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = decoded_by_simplejpeg(monkeypatch)
    for kind in ("CMYK", "MPO"):
        options: dict[str, Any] = {"save_all": True, "append_images": [PHOTO]} if kind == "MPO" else {}
        picture = PHOTO.convert("CMYK") if kind == "CMYK" else PHOTO
        stored(encoded(picture, "MPO" if kind == "MPO" else "JPEG", **options))
    assert taken == [False, False]
