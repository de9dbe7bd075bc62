"""The plan of a latents run: a value that travels as text, and what is done already."""

from dataclasses import replace

import pytest

from md_assets.core.errors import ArchiveError
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan


@pytest.fixture
def plan(latents_plan) -> LatentsPlan:
    return latents_plan({"train/000": 2})


def test_a_plan_survives_json(plan: LatentsPlan) -> None:
    other = replace(
        plan, mds_settings=mds_settings(JDB, ImageSettings(jpeg_quality=90)), device="cuda:1", num_workers=3
    )
    for one in (plan, other):
        assert LatentsPlan.from_json(one.to_json()) == one


def test_an_archive_is_current_once_it_is_published_and_until_something_changes(plan: LatentsPlan) -> None:
    assert plan.current("train/000") is None
    encode_archives(plan, lambda event: None)
    assert plan.current("train/000")
    assert replace(plan, batch_size=1, num_workers=2).current("train/000")
    for changed in ({"seed": 1}, {"text_storage": "trimmed"}, {"save_dtype": "float32"}):
        assert replace(plan, encoders=replace(plan.encoders, **changed)).current("train/000") is None


def test_mds_that_is_not_there_is_an_error(plan: LatentsPlan) -> None:
    with pytest.raises(ArchiveError, match="jdb train/001: mds is not published"):
        plan.current("train/001")
