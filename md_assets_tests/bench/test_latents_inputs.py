"""What the latents benchmark encodes: rows as mds has them, and models of the sizes that their names promise."""

import io
import json
from pathlib import Path

from PIL import Image

from md_assets.bench.latents_inputs import ARCHITECTURES, publish_mds, write_text, write_vae
from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.stages.once import upstream_ledger
from md_assets.storage.mds import iter_rows


def test_archives_are_those_of_mds(tmp_path: Path) -> None:
    settings, stage_dir = mds_settings(JDB, ImageSettings()), DataRoot(tmp_path).mds("jdb")
    publish_mds(DataRoot(tmp_path), "jdb", "train/000", 4, settings)
    assert upstream_ledger(stage_dir, "train/000", settings).kept == 4
    rows = list(iter_rows(stage_dir.data("train/000")))
    assert [row["key"] for row in rows] == [f"train/000/{number:06}" for number in range(4)]
    for row in rows:
        assert Image.open(io.BytesIO(row["jpg"])).size == (row["width"], row["height"])
        assert min(row["width"], row["height"]) == 512


def test_models_have_the_sizes_of_their_architecture(tmp_path: Path) -> None:
    tiny = ARCHITECTURES["tiny"]
    vae = json.loads((write_vae(tmp_path / "vae", tiny) / "vae" / "config.json").read_text())
    assert tuple(vae["block_out_channels"]) == tiny.vae_channels
    text = json.loads((write_text(tmp_path / "text", tiny) / "open_clip_config.json").read_text())["model_cfg"]
    assert text["text_cfg"]["width"] == tiny.text_width


def test_the_default_architecture_is_that_of_the_default_pair() -> None:
    default = ARCHITECTURES["default"]
    assert default.vae_channels == (128, 256, 512, 512)
    assert (default.text_width, default.text_layers, default.text_heads) == (1024, 24, 16)
