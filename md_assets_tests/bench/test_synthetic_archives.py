"""Synthesized archives: the sources' containers, formats and sizes of files."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from md_assets.bench.synthetic_archives import SOURCES, make_archive, photograph, pictures
from md_assets.datasets import spec_of
from md_assets.storage.archives import iter_members

SMALL = {slug: dataclasses.replace(source, width=300, height=200) for slug, source in SOURCES.items()}


@pytest.mark.parametrize("slug", SOURCES)
def test_an_archive_is_read_like_one_of_its_dataset(slug: str, tmp_path: Path) -> None:
    path = tmp_path / "archive"
    make_archive(SMALL[slug], path, 6, seed=0)
    spec = spec_of(slug)
    members = iter_members(path, spec.archive_format, 2**20)
    samples = list(spec.read_samples(spec.archives[0], members))
    images = [Image.open(io.BytesIO(sample.image)) for sample in samples]
    assert [image.format for image in images] == [SOURCES[slug].image_format] * 6
    sizes = {image.size for image in images}
    assert len(sizes) > 3 if slug == "cc12m" else sizes == {(300, 200)}
    assert len({sample.image for sample in samples}) == 6


def test_the_same_arguments_give_the_same_pictures() -> None:
    first, again, other = (list(pictures(SMALL["cc12m"], 5, seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_files_are_as_large_as_the_sources_are() -> None:
    """Bits a pixel: SA-1B has 2.3 with its masks, DiffusionDB about 11."""
    for format, options, expected in (("JPEG", {"quality": 92}, 2.4), ("WEBP", {"lossless": True}, 11.4)):
        file = io.BytesIO()
        Image.fromarray(photograph(768, 768, seed=0)).save(file, format, **options)
        assert len(file.getvalue()) * 8 / 768**2 == pytest.approx(expected, rel=0.15)
