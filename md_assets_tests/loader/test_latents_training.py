"""A loop as a training's over latents that the stage itself encoded, of six datasets, at both sizes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from md_assets.core.paths import DataRoot
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.loader import LatentsStream, build_latents_dataloader
from md_assets.stages.index import merge_indexes
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan

COUNTS = {"jdb": 6, "diffdb": 5, "cc12m": 4, "sa1b": 3, "textcaps": 2, "coco2014": 4}
SHARES = {"jdb": 1, "diffdb": 1, "cc12m": 2, "sa1b": 2, "textcaps": 1, "coco2014": 1}
"""Of an epoch's 24 samples: 3, 3, 6, 6, 3 and 3."""


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, tiny_encoders, mds_rows, publish_mds) -> dict[str, Path]:
    """Directories of latents at 256 and 512 px, by dataset."""
    root = DataRoot(tmp_path_factory.mktemp("data"))
    settings = mds_settings(JDB, ImageSettings())
    encoders = tiny_encoders.settings(image_resolutions=(256, 512))
    directories = {}
    for dataset, count in COUNTS.items():
        publish_mds(root, dataset, "train/000", [{**r, "key": f"{dataset}/{r['key']}"} for r in mds_rows("a", count)])
        plan = LatentsPlan(str(root.path), dataset, ("train/000",), settings, encoders, "tiny", num_workers=0)
        encode_archives(plan, lambda event: None)
        merged = merge_indexes(plan.latents_dir, "train", plan.archives, plan.settings)
        assert merged is not None
        directories[dataset] = merged.path.parent
    return directories


def build(datasets: dict[str, Path], image_size: int) -> Any:
    streams: Sequence[LatentsStream] = [LatentsStream(datasets[name], proportion=SHARES[name]) for name in COUNTS]
    return build_latents_dataloader(
        streams, batch_size=4, image_size=image_size, caption_drop_prob=0.25, num_workers=2, with_keys=True
    )


@pytest.mark.parametrize("image_size", [256, 512])
def test_a_training_over_six_datasets_stops_and_goes_on(datasets: dict[str, Path], image_size: int) -> None:
    cells = image_size // 8
    loader = build(datasets, image_size)
    seen, masks, state = [], [], None
    for epoch in range(2):
        for number, batch in enumerate(loader):
            assert batch["image_latents"].shape == (4, 4, cells, cells)
            assert batch["caption_latents"].shape == (4, 1, 77, 64)
            assert batch["image_latents"].dtype == batch["caption_latents"].dtype == torch.float16
            assert batch["drop_caption_mask"].shape == (4,)
            assert set(batch["drop_caption_mask"].tolist()) <= {0.0, 1.0}
            seen.append(batch["key"])
            masks.append(batch["drop_caption_mask"].tolist())
            if (epoch, number) == (1, 2):
                state = loader.state_dict()
        of_epoch = [key.split("/")[0] for keys in seen[-6:] for key in keys]
        assert Counter(of_epoch) == {"jdb": 3, "diffdb": 3, "cc12m": 6, "sa1b": 6, "textcaps": 3, "coco2014": 3}
    assert len(seen) == 12
    assert 0 < sum(value == 0.0 for batch in masks for value in batch) < 24  # 12 expected of 48
    assert state is not None

    resumed = build(datasets, image_size)
    resumed.load_state_dict(state)
    rest = [(batch["key"], batch["drop_caption_mask"].tolist()) for batch in resumed]
    assert rest == list(zip(seen[9:], masks[9:], strict=True))


def test_datasets_of_other_encoders_are_not_mixed(
    datasets: dict[str, Path], tmp_path: Path, latents_plan, tiny_clip: Path
) -> None:
    from md_assets.core.errors import SettingsError

    plan = latents_plan({"train/000": 2})
    plan = replace(plan, encoders=replace(plan.encoders, text_encoder=str(tiny_clip), image_resolutions=(256,)))
    encode_archives(plan, lambda event: None)
    merged = merge_indexes(plan.latents_dir, "train", plan.archives, plan.settings)
    assert merged is not None
    with pytest.raises(SettingsError, match=r"cannot be mixed: caption latents \(1, 77, 64\) and \(1, 77, 32\)"):
        build_latents_dataloader([datasets["jdb"], merged.path.parent], batch_size=1)
