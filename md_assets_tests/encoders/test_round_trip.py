"""The round trip: diffusers' own pictures of stored latents, and captions that are told from others."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from md_assets.encoders.batches import PreparedBatches, crops_of
from md_assets.encoders.bundle import Encoders
from md_assets.encoders.round_trip import recompute, round_trip


@pytest.fixture(scope="module")
def encoders(tiny_encoders) -> Encoders:
    return Encoders.load(tiny_encoders.settings(), "cpu")


def stored(encoders: Encoders, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The rows as they are stored."""
    prepared = PreparedBatches(encoders.preparation)
    monkeypatch.setattr(prepared, "_row", lambda row: row)
    return encoders.encode(prepared._batch("a", rows)).rows()  # type: ignore[arg-type]


def test_psnr_is_that_of_what_diffusers_decodes(encoders: Encoders, tiny_encoders, mds_rows, monkeypatch) -> None:
    rows = mds_rows("a", 2)
    latents = stored(encoders, rows, monkeypatch)
    facts = round_trip(encoders, recompute(encoders, latents), [row["jpg"] for row in rows]).facts
    model = AutoencoderKL.from_pretrained(tiny_encoders.vae, subfolder="vae").eval()
    assert facts["keys"] == ["a/0000", "a/0001"]
    for i, row in enumerate(latents):
        array = np.frombuffer(row["latents_64"], np.float16).astype(np.float32).reshape(1, 4, 8, 8)
        with torch.no_grad():
            plain_CHW = model.decode(torch.from_numpy(array) / 0.13025).sample[0]
        crop_CHW = crops_of("k", rows[i]["jpg"], [64])[64].float()
        mse = ((plain_CHW + 1) * 127.5).round().clamp(0, 255).sub(crop_CHW).square().mean().item()
        assert facts["psnr_db"]["64"][i] == pytest.approx(10 * math.log10(255**2 / mse), abs=0.05)
    assert [len(facts["psnr_db"][px]) for px in ("32", "64")] == [2, 2]


def test_a_caption_is_told_from_another(encoders: Encoders, mds_rows, monkeypatch) -> None:
    rows = mds_rows("a", 2)
    latents, jpegs = stored(encoders, rows, monkeypatch), [row["jpg"] for row in rows]
    assert max(round_trip(encoders, recompute(encoders, latents), jpegs).facts["caption_error"]) < 1e-3
    latents[1]["caption"] = "something else"
    right, wrong = round_trip(encoders, recompute(encoders, latents), jpegs).facts["caption_error"]
    assert right < 1e-3
    assert wrong > 0.1


def test_of_moments_the_mean_is_decoded(tiny_encoders, mds_rows, monkeypatch) -> None:
    psnr_db = []
    for mode in ("mean", "moments"):
        encoders = Encoders.load(tiny_encoders.settings(latent_mode=mode), "cpu")
        latents = stored(encoders, mds_rows("a", 1), monkeypatch)
        psnr_db.append(
            round_trip(encoders, recompute(encoders, latents), [mds_rows("a", 1)[0]["jpg"]]).facts["psnr_db"]
        )
    assert psnr_db[0] == psnr_db[1]


def test_facts_are_json_and_the_picture_is_small(encoders: Encoders, mds_rows, monkeypatch) -> None:
    rows = mds_rows("a", 4)
    latents, jpegs = stored(encoders, rows, monkeypatch), [row["jpg"] for row in rows]
    result = round_trip(encoders, recompute(encoders, latents), jpegs)
    assert json.loads(json.dumps(result.facts)) == result.facts
    assert result.picture is not None
    assert result.picture.startswith("data:image/jpeg;base64,")
    assert len(result.picture) < 14_000


def test_without_room_for_it_it_is_left_out(encoders: Encoders, mds_rows, monkeypatch) -> None:
    rows = mds_rows("a", 1)
    latents = stored(encoders, rows, monkeypatch)

    def full(latents_BChw):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoders.vae, "decode", full)
    result = round_trip(encoders, recompute(encoders, latents), [rows[0]["jpg"]])
    assert (result.facts, result.picture) == ({"skipped": "out of memory"}, None)
