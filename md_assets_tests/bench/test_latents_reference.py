"""The reference's loop: that it makes what the stage makes, but for its noise, so that speeds can be compared."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from md_assets.bench import latents_reference
from md_assets.bench.latents_reference import ReferenceLoop, reference_speed
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.storage.mds import ShardWriter, iter_rows


@pytest.fixture
def plan(latents_plan) -> LatentsPlan:
    plan = latents_plan({"train/000": 5, "train/001": 2}, batch_size=4, device="cpu")
    return replace(plan, encoders=replace(plan.encoders, model_dtype="float32"))


def test_its_rows_are_those_of_the_stage(plan: LatentsPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []

    class Kept(ShardWriter):
        def write(self, row: Any) -> None:
            written.append(row)
            super().write(row)

    monkeypatch.setattr(latents_reference, "ShardWriter", Kept)
    assert min(reference_speed(plan, "cpu", 7)) > 0
    encode_archives(plan, lambda event: None)
    ours = [row for archive in plan.archives for row in iter_rows(plan.latents_dir.data(archive))]
    assert [row["key"] for row in written] == [row["key"] for row in ours]
    for row, other in zip(written, ours, strict=True):
        assert {c: row[c] for c in ("caption", "width", "height")} == {
            c: other[c] for c in ("caption", "width", "height")
        }
        text, plain = (np.frombuffer(r["caption_latents"], np.float16).astype(np.float32) for r in (other, row))
        np.testing.assert_allclose(text, plain, rtol=2e-3, atol=2e-3)
        assert len(row["latents_64"]) == len(other["latents_64"])


def test_its_latents_have_the_means_of_the_stages(plan: LatentsPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise; pictures are resized by Pillow there, which is a grey level off at most."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self: self.mean)
    rows: list[Any] = []
    monkeypatch.setattr(ShardWriter, "write", lambda self, row: rows.append(row))
    ReferenceLoop(plan, torch.device("cpu")).speed(plan, 7)
    monkeypatch.undo()
    means = replace(plan, encoders=replace(plan.encoders, latent_mode="mean"))
    encode_archives(means, lambda event: None)
    ours = [row for archive in plan.archives for row in iter_rows(means.latents_dir.data(archive))]
    for row, other in zip(rows, ours, strict=True):
        one, two = (np.frombuffer(r["latents_64"], np.float16).astype(np.float32) for r in (row, other))
        assert np.linalg.norm(one - two) < 0.02 * np.linalg.norm(two)
