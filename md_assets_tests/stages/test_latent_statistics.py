"""Statistics of latents: the numbers themselves, and that ledgers have those of what is published."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.schema import CAPTION_LENGTH_COLUMN
from md_assets.stages.latent_statistics import (
    ENCODED_AT,
    STATISTICS,
    LatentStatistics,
    named_values,
    sampled_statistics,
)
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.storage.mds import iter_rows
from md_assets.storage.publish import read_ledger
from md_assets_tests.stages.conftest import LAYOUT

B, C, L, D = 7, 4, 5, 6


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """B rows in float16, far from 0 for their spread."""
    random = np.random.default_rng(0)
    shapes = {"caption_latents": (B, 1, L, D), "latents_32": (B, C, 4, 4), "latents_64": (B, C, 8, 8)}
    return {column: (8 + random.standard_normal(shape)).astype(np.float16) for column, shape in shapes.items()}


def exactly(values: np.ndarray) -> Any:
    return pytest.approx(values, rel=1e-12)


def test_mean_and_std_of_each_channel_are_those_of_all_rows_and_cells(arrays: dict[str, np.ndarray]) -> None:
    statistics = LatentStatistics()
    for rows in (slice(0, 3), slice(3, B)):  # in batches
        part = {column: array[rows].astype(np.float32) for column, array in arrays.items()}
        statistics.add(part, [L] * len(part["latents_32"]))
    found = statistics.as_details()
    assert found["rows"] == B
    for column in ("latents_32", "latents_64"):
        exact = arrays[column].astype(np.float64)
        assert found[column]["mean"] == exactly(exact.mean((0, 2, 3)))
        assert found[column]["std"] == exactly(exact.std((0, 2, 3)))


def test_norms_are_of_a_captions_own_positions(arrays: dict[str, np.ndarray]) -> None:
    lengths = [L, 1, 3, 2, L, 4, 1]
    statistics = LatentStatistics()
    statistics.add(arrays, lengths)
    norms = np.linalg.norm(arrays["caption_latents"][:, 0].astype(np.float64), axis=-1)
    of_captions = np.array([norms_L[:length].mean() for norms_L, length in zip(norms, lengths, strict=True)])
    found = statistics.as_details()["caption_norm"]
    assert (found["mean"], found["std"]) == (exactly(of_captions.mean()), exactly(of_captions.std()))


def test_of_no_rows_there_is_nothing_to_say() -> None:
    assert LatentStatistics().as_details() == {"rows": 0}
    assert named_values({"rows": 0}) == {}


def test_each_number_has_a_name() -> None:
    statistics = {
        "rows": 3,
        "latents_32": {"mean": [1.0, 2.0], "std": [3.0, float("nan")]},
        "caption_norm": {"mean": 5.0, "std": 6.0},
    }
    assert named_values(statistics) == {
        "latents_32 mean of channel 0": 1.0,
        "latents_32 mean of channel 1": 2.0,
        "latents_32 std of channel 0": 3.0,
        "caption_norm mean": 5.0,
        "caption_norm std": 6.0,
    }


def test_a_few_rows_are_read_where_a_ledger_has_none(tmp_path: Path, publish_latents: Callable[..., Ledger]) -> None:
    stage_dir = DataRoot(tmp_path).latents("jdb", "tiny")
    publish_latents(stage_dir, "train/000", 9)
    rows = [row for number, row in enumerate(iter_rows(stage_dir.data("train/000"))) if number in (0, 4, 8)]
    found = sampled_statistics(stage_dir.data("train/000"), LAYOUT, 3)
    values = np.stack([np.frombuffer(row["latents_32"], np.float16).reshape(2, 4, 4) for row in rows])
    assert found["rows"] == 3
    assert found["latents_32"]["mean"] == exactly(values.astype(np.float64).mean((0, 2, 3)))


@pytest.mark.parametrize("text", ["openclip", "t5"])
def test_the_ledger_has_the_statistics_of_what_is_published(
    latents_plan: Callable[..., LatentsPlan], tiny_t5: Path, text: str
) -> None:
    plan = latents_plan({"train/000": 5, "train/001": 0}, batch_size=3)
    if text == "t5":
        plan = replace(plan, encoders=replace(plan.encoders, text_encoder=str(tiny_t5)))
    began_s = int(time.time())
    encode_archives(plan, lambda event: None)
    details = details_of(plan.latents_dir, "train/000")
    lengths = [row.get(CAPTION_LENGTH_COLUMN) for row in iter_rows(plan.latents_dir.data("train/000"))]
    assert all(lengths) == (text == "t5")
    read_again = sampled_statistics(plan.latents_dir.data("train/000"), details, 5)
    # Rows were added in other groups; of a std near 0, what cancels leaves 1e-10 of a norm of 5.
    assert named_values(details[STATISTICS]) == pytest.approx(named_values(read_again), rel=1e-12, abs=1e-9)
    assert details[STATISTICS]["rows"] == 5 and len(named_values(details[STATISTICS])) == 2 * 2 * 4 + 2
    assert details_of(plan.latents_dir, "train/001")[STATISTICS] == {"rows": 0}
    assert began_s <= datetime.fromisoformat(details[ENCODED_AT]).timestamp() <= time.time()


def details_of(stage_dir: StageDir, archive: str) -> dict[str, Any]:
    ledger = read_ledger(stage_dir.ledger(archive))
    assert ledger is not None
    return ledger.details
