"""The miniature Conceptual Captions 12M: texts that the real cleaner cleans as the miniature says."""

import io

import pytest
from PIL import Image

from md_assets.core.spec import Member, OrphanCaption
from md_assets.datasets.cc12m import SPEC, read_samples
from md_assets.demo.conceptual12m import ARCHIVES, IN_MINRES512, MINIATURE, texts
from md_assets.storage.caption_cleaning import cleaned_caption


@pytest.mark.parametrize("position", range(8))
def test_texts_are_cleaned_as_said(position: int) -> None:
    text, cleaned = texts(position, "three red rings over a blue to teal gradient")
    assert cleaned_caption(text.decode("utf-8", "replace")) == cleaned


@pytest.mark.parametrize("archive", ARCHIVES)
def test_some_pictures_are_large_enough_for_the_subset_and_one_just_is_not(archive: str) -> None:
    (subset,) = SPEC.subsets
    content = MINIATURE.content(archive, MINIATURE.samples, 480)
    samples = {s.key: s for s in read_samples(archive, (Member(n, d or b"") for n, d in content.members))}
    edges = [min(Image.open(io.BytesIO(samples[key].image)).size) for key in content.kept]
    assert sum(edge >= subset.min_edge_px for edge in edges) == IN_MINRES512
    assert subset.min_edge_px - 1 in edges


def test_an_archive_has_an_orphan_text() -> None:
    content = MINIATURE.content(ARCHIVES[0], MINIATURE.samples, 64)
    found = read_samples(ARCHIVES[0], (Member(name, data or b"") for name, data in content.members))
    assert [sample.key for sample in found if isinstance(sample, OrphanCaption)] == [f"{ARCHIVES[0]}/orphan"]
