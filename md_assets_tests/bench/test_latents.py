"""The latents benchmark, on models and archives of no size: its figures mean nothing here, but that it gives them."""

import pytest

from md_assets.bench.latents import Conditions, Speeds, conditions_here, measure, report
from md_assets.core.errors import SettingsError


def test_every_way_is_measured_in_each_round() -> None:
    conditions = Conditions(
        "tiny", archives=2, images=3, resolutions_px=(32, 64), batch_size=2, num_workers=0, device="cpu", rounds=2
    )
    speeds = measure(conditions)
    assert (len(speeds.stage), len(speeds.limit), len(speeds.reference)) == (2, 2, 2)
    assert min(speeds.stage + speeds.limit + speeds.reference) > 0
    assert speeds.peak_bytes > 2**20
    assert "6 images at 32 and 64 px" in report(conditions, speeds)


def test_ratios_are_medians_of_rounds() -> None:
    speeds = Speeds("cpu", stage=[2.0, 9.0, 3.0], limit=[4.0, 10.0, 4.0], reference=[1.0, 3.0, 2.0])
    assert (speeds.ratio("limit"), speeds.ratio("reference")) == (0.75, 2.0)


def test_what_cannot_be_measured_is_refused() -> None:
    assert conditions_here(models="tiny", num_workers=None).num_workers >= 1
    with pytest.raises(SettingsError, match=r"no models 'huge'.*default, mid, tiny"):
        conditions_here(models="huge")
    with pytest.raises(SettingsError, match="must be positive"):
        conditions_here(models="tiny", images=0)
