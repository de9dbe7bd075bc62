"""The demo as a newcomer runs it, twice, and what others then read of its data."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from md_assets.core.paths import DataRoot
from md_assets.demo.journeydb import REJECTED_BY_MDS, REJECTED_BY_RAW, SAMPLES_PER_ARCHIVE
from md_assets.storage.mds import iter_rows
from md_assets_tests.end_to_end.conftest import Commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEPT_BY_RAW = SAMPLES_PER_ARCHIVE - sum(REJECTED_BY_RAW.values())
KEPT = KEPT_BY_RAW - sum(REJECTED_BY_MDS.values())
MATERIALIZED = ("train/000", "train/001", "valid/000")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, DataRoot]]:
    """The output of a first and of a second `md-assets demo`, and the data root that they filled."""
    folder = tmp_path_factory.mktemp("demo")
    commands = Commands.bare(folder)
    command = [sys.executable, "-m", "md_assets.cli", "demo", "--folder", "demo_data"]
    outputs = [commands.finish(commands.start(*command), 300) for _ in range(2)]
    yield outputs[0], outputs[1], DataRoot(folder / "demo_data" / "datadir")
    commands.end()


def table_rows(output: str) -> list[tuple[str, str, int, int, int]]:
    """(archive, stage, read, kept, rejected) of each row of the table."""
    rows, archive = [], ""
    for line in output.splitlines():
        match = re.match(r"│ (\S*)\s*│ (raw|mds|latents)\s*│\s*([\d,]+) │\s*([\d,]+) │\s*([\d,]+) │", line)
        if match:
            archive = match[1] or archive
            rows.append((archive, match[2], *(int(match[i].replace(",", "")) for i in (3, 4, 5))))
    return rows


def test_it_ends_with_a_table_of_every_archive_and_stage(demo: tuple[str, str, DataRoot]) -> None:
    rejected = SAMPLES_PER_ARCHIVE - KEPT_BY_RAW
    expected = [
        row
        for archive in MATERIALIZED
        for row in (
            (archive, "raw", SAMPLES_PER_ARCHIVE, KEPT_BY_RAW, rejected),
            (archive, "mds", KEPT_BY_RAW, KEPT, KEPT_BY_RAW - KEPT),
            (archive, "latents", KEPT, KEPT, 0),
        )
    ]
    for output in demo[:2]:
        assert table_rows(output) == expected
        assert f"The training loader sees {3 * KEPT} samples" in output
        assert "demo --ui --folder demo_data" in output or "demo --ui\n" in output


def test_the_second_time_does_nothing_twice_and_says_so(demo: tuple[str, str, DataRoot]) -> None:
    first, second, _ = demo
    assert "9 archive stages published, 0 passed over" in first
    assert "Nothing was done twice: all 9 archive stages had been published before" in second
    assert "0 archive stages published, 9 passed over" in second


def test_a_reader_like_the_reference_loader_reads_every_row(demo: tuple[str, str, DataRoot]) -> None:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    root = demo[2]
    clean_stale_shared_memory()
    latents = root.path / "jdb" / "mds_latents_sdxl1_dfnclipH14" / "train"
    dataset = StreamingDataset(local=str(latents), shuffle=False, batch_size=1)
    expected = [key_and_caption for a in MATERIALIZED[:2] for key_and_caption in keys_and_captions(root, a)]
    assert len(dataset) == len(expected) == 2 * KEPT
    for position, (key, caption) in enumerate(expected):
        sample = dataset[position]
        assert (sample["key"], sample["caption"]) == (key, caption)
        text = np.frombuffer(sample["caption_latents"], dtype=np.float16).reshape(1, 77, 64)
        small = np.frombuffer(sample["latents_256"], dtype=np.float16).reshape(-1, 32, 32)
        large = np.frombuffer(sample["latents_512"], dtype=np.float16).reshape(-1, 64, 64)
        assert small.shape[0] == large.shape[0] == 4
        assert all(np.isfinite(array).all() for array in (text, small, large))
    del dataset


def keys_and_captions(root: DataRoot, archive: str) -> list[tuple[str, str]]:
    return [(row["key"], row["caption"]) for row in iter_rows(root.mds("jdb").data(archive))]


def test_the_loader_trains_on_both_splits(demo: tuple[str, str, DataRoot]) -> None:
    from md_assets.loader import build_latents_dataloader

    latents = demo[2].path / "jdb" / "mds_latents_sdxl1_dfnclipH14"
    loader = build_latents_dataloader(
        [latents / "train", latents / "valid"], batch_size=8, image_size=512, drop_last=False, num_workers=0
    )
    batches = list(loader)
    assert sum(len(batch["image_latents"]) for batch in batches) == 3 * KEPT
    assert batches[0]["image_latents"].shape == (8, 4, 64, 64)
    assert batches[0]["caption_latents"].shape == (8, 1, 77, 64)


def test_verify_and_status_agree_with_it(demo: tuple[str, str, DataRoot], tmp_path: Path) -> None:
    commands = Commands.bare(tmp_path)
    verified = commands.finish(commands.start(sys.executable, "-m", "md_assets.cli", "verify", data_root=demo[2].path))
    assert "21 checks passed, 0 failed" in verified  # 3 archives x (2 of raw + 2 of mds + 3 of latents)
    status = commands.finish(commands.start(sys.executable, "-m", "md_assets.cli", "status", data_root=demo[2].path))
    assert re.search(r"mds_latents_sdxl1_dfnclipH14\s*│\s*3 │\s*400 │\s*102 │\s*102 │", status)
    commands.end()
