"""The latents benchmark, on models and archives of no size: its figures mean nothing here, but that it gives them."""

import pytest

from md_assets.bench.latents import Conditions, Speeds, conditions_here, measure, report
from md_assets.core.errors import SettingsError


def test_every_way_is_measured_in_each_round() -> None:
    small = {"archives": 2, "images": 3, "resolutions_px": (32, 64), "batch_size": 2, "num_workers": 0, "rounds": 1}
    conditions = Conditions("tiny", device="cpu", model_dtype="float32", **small)
    said: list[str] = []
    speeds = measure(conditions, said.append)
    assert (len(speeds.stage), len(speeds.limit), len(speeds.reference)) == (1, 1, 1)
    assert len(said) == 1 and said[0].startswith("round 1: stage ")
    assert min(speeds.stage + speeds.limit + speeds.reference) > 0
    assert all(len(times) == 1 and times[0] > 0 for times in speeds.cpu_s.values())
    assert "ms an image" in report(conditions, speeds)
    assert speeds.peak_bytes > 2**20
    assert "6 images at 32 and 64 px" in report(conditions, speeds)


def test_costs_are_those_of_the_stages_hours() -> None:
    speeds = Speeds("a GPU", stage=[100.0], limit=[110.0], reference=[50.0], gpu_utilization=0.97, peak_bytes=3 * 2**30)
    said = report(Conditions("default", rounds=1, price_per_hour=3.6), speeds)
    assert "100.00 images/s (GPU utilization 97%, peak memory 3.0 GiB)" in said
    assert "at 3.6 an hour, a million images cost 10.00 by the stage, 20.00 by the reference's loop" in said
    assert "cost" not in report(Conditions("default", rounds=1), speeds)


def test_ratios_are_medians_of_rounds() -> None:
    speeds = Speeds("cpu", stage=[2.0, 9.0, 3.0], limit=[4.0, 10.0, 4.0], reference=[1.0, 3.0, 2.0])
    assert (speeds.ratio("limit"), speeds.ratio("reference")) == (0.75, 2.0)
    speeds = Speeds("cpu", cpu_s={"stage": [2.0, 9.0, 3.0], "limit": [1.0, 9.0, 2.0], "reference": [4.0, 9.0, 9.0]})
    assert (speeds.cpu_ratio("limit"), speeds.cpu_ratio("reference")) == (pytest.approx(2 / 3), 2.0)


def test_what_cannot_be_measured_is_refused() -> None:
    assert conditions_here(models="tiny", num_workers=None).num_workers >= 1
    with pytest.raises(SettingsError, match=r"no models 'huge'.*default, mid, tiny"):
        conditions_here(models="huge")
    assert conditions_here(models="tiny", model_dtype=None, price_per_hour=None).price_per_hour is None
    with pytest.raises(SettingsError, match="must be positive"):
        conditions_here(models="tiny", images=0)
    with pytest.raises(SettingsError, match="price of -1 is not positive"):
        conditions_here(models="tiny", price_per_hour=-1)
