"""The demo as a newcomer runs it, twice, from an installed package outside the checkout, and what others then read of
its data."""

import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from md_assets.core.paths import DataRoot
from md_assets.datasets import spec_of
from md_assets.demo import conceptual12m
from md_assets.demo.sandbox import MINIATURES
from md_assets.demo.walkthrough import archives_of_demo
from md_assets.storage.mds import iter_rows
from md_assets_tests.end_to_end.conftest import REPOSITORY, Commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2500)]

LEFT = {slug: len(archives_of_demo(slug)) * (m.samples - m.lost) for slug, m in MINIATURES.items()}
"""Samples of each dataset that have latents."""

ARCHIVE_STAGES = 3 * sum(len(archives_of_demo(slug)) for slug in MINIATURES) + 2 * len(archives_of_demo("cc12m"))
"""raw, mds and latents of every archive, and both stages of cc12m's subset."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the package installed from a built wheel.

    The dependencies (6 GB) are those of this environment, by a .pth file; that the declared list of them is complete is
    `test_conventions`' to show. This checkout is not on its path.
    """
    folder = tmp_path_factory.mktemp("install")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    copy = folder / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for name in filter(None, files.stdout.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            target.write_bytes((REPOSITORY / name).read_bytes())
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(copy)], check=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    dependencies = Path(site.stdout.strip()) / "dependencies.pth"
    dependencies.write_text(f"{sysconfig.get_path('purelib')}\n")
    return environment / "bin"


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, DataRoot]:
    """The output of a first and of a second `md-assets demo`, and the data root that they filled."""
    folder = tmp_path_factory.mktemp("demo")
    first, second = (run([str(installed / "md-assets"), "demo"], folder) for _ in range(2))
    return first, second, DataRoot(folder / "demo_data" / "datadir")


Row = tuple[str, str, str, int, int, int, str]
"""Dataset, archive, stage, read, kept, rejected, reasons."""


def table_rows(output: str) -> list[Row]:
    """Each row of the tables."""
    rows: list[Row] = []
    slug = archive = ""
    for line in output.splitlines():
        slug = line.strip() if line.strip() in MINIATURES else slug
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == 8 and cells[2].isdecimal():
            archive = cells[0] or archive
            rows.append((slug, archive, cells[1], int(cells[2]), int(cells[3]), int(cells[4]), cells[5]))
    return rows


def reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))


def expected_rows() -> Iterator[Row]:
    for slug, miniature in MINIATURES.items():
        by_raw, by_mds = miniature.rejected_by_raw, miniature.rejected_by_mds
        kept = miniature.samples - sum(by_raw.values())
        left = kept - sum(by_mds.values())
        inside = conceptual12m.IN_MINRES512
        for archive in archives_of_demo(slug):
            yield slug, archive, "raw", miniature.samples, kept, miniature.samples - kept, reasons(by_raw)
            yield slug, archive, "mds", kept, left, kept - left, reasons(by_mds)
            if slug == "cc12m":
                yield slug, archive, "mds_minres512", left, inside, left - inside, f"not_in_subset {left - inside}"
            yield slug, archive, "latents", left, left, 0, ""
            if slug == "cc12m":
                yield slug, archive, "latents_minres512", left, inside, left - inside, f"not_in_subset {left - inside}"


def test_it_ends_with_tables_of_every_archive_and_stage(demo: tuple[str, str, DataRoot]) -> None:
    for output in demo[:2]:
        assert table_rows(output) == list(expected_rows())
        assert "md-assets demo --ui\n" in output


def test_the_package_that_ran_it_is_not_this_checkout(installed: Path, tmp_path: Path) -> None:
    place = run([str(installed / "python"), "-c", "import md_assets; print(md_assets.__file__)"], tmp_path)
    assert str(installed.parent) in place


def test_the_loader_mixes_all_datasets_and_the_readmes_table_has_their_counts(
    demo: tuple[str, str, DataRoot],
) -> None:
    shares = ", ".join(f"{slug} {count}" for slug, count in LEFT.items())
    for output in demo[:2]:
        assert f"The training loader mixes all of them: {sum(LEFT.values())} samples in an epoch, {shares}." in output
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert {slug: int(n) for slug, n in re.findall(r"^\| `(\w+)` \|.*_.* (\d+) \|$", readme, re.MULTILINE)} == LEFT


def test_the_second_time_does_nothing_twice_and_says_so(demo: tuple[str, str, DataRoot]) -> None:
    first, second, _ = demo
    assert f"{ARCHIVE_STAGES} archive stages published, 0 passed over" in first
    assert f"Nothing was done twice: all {ARCHIVE_STAGES} archive stages had been published before" in second
    assert f"0 archive stages published, {ARCHIVE_STAGES} passed over" in second


def test_a_reader_like_the_reference_loader_reads_every_row(demo: tuple[str, str, DataRoot]) -> None:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    root = demo[2]
    clean_stale_shared_memory()
    latents = root.path / "jdb" / "mds_latents_sdxl1_dfnclipH14" / "train"
    dataset = StreamingDataset(local=str(latents), shuffle=False, batch_size=1)
    expected = [key_and_caption for a in archives_of_demo("jdb") for key_and_caption in keys_and_captions(root, a)]
    assert len(dataset) == len(expected) == LEFT["jdb"]
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


SHARES = {"jdb": 1, "diffdb": 1, "cc12m": 2, "sa1b": 2, "textcaps": 1, "coco2014": 1}
"""Parts of an epoch, whatever there is of each."""


@pytest.mark.parametrize("image_size", [256, 512])
def test_a_training_over_all_six_stops_in_an_epoch_and_goes_on(
    demo: tuple[str, str, DataRoot], image_size: int
) -> None:
    from md_assets.loader import LatentsStream, build_latents_dataloader

    streams, dataset_of = [], {}
    for slug, share in SHARES.items():
        stage_dir, archives = demo[2].latents(slug, "sdxl1_dfnclipH14"), archives_of_demo(slug)
        streams.append(LatentsStream(stage_dir.index(spec_of(slug).split_of(archives[0])).parent, proportion=share))
        dataset_of |= {row["key"]: slug for archive in archives for row in iter_rows(stage_dir.data(archive))}
    total, cells = sum(LEFT.values()), image_size // 8
    assert len(dataset_of) == total

    def build() -> Any:
        options = {"caption_drop_prob": 0.25, "num_workers": 2, "with_keys": True, "drop_last": False}
        return build_latents_dataloader(streams, batch_size=8, image_size=image_size, **options)

    def step(batch: dict[str, Any]) -> tuple[list[str], list[float], float]:
        """What a training takes of a batch."""
        images, captions, mask = batch["image_latents"], batch["caption_latents"], batch["drop_caption_mask"]
        count = len(batch["key"])
        assert (images.shape, captions.shape) == ((count, 4, cells, cells), (count, 1, 77, 64))
        assert (str(images.dtype), str(captions.dtype)) == ("torch.float16",) * 2
        assert mask.shape == (count,) and set(mask.tolist()) <= {0.0, 1.0}
        loss = images.float().square().mean() + (captions.float() * mask[:, None, None, None]).abs().mean()
        assert loss.isfinite()
        return batch["key"], mask.tolist(), loss.item()

    loader, epochs, state = build(), [[], []], None
    for epoch in epochs:
        for batch in loader:
            epoch.append(step(batch))
            if epoch is epochs[1] and len(epoch) == 3:
                state = loader.state_dict()
        seen = Counter(dataset_of[key] for keys, _, _ in epoch for key in keys)
        assert seen.total() == total
        for slug, share in SHARES.items():
            assert abs(seen[slug] - total * share / sum(SHARES.values())) <= 1
    kept = [value for epoch in epochs for _, mask, _ in epoch for value in mask]
    assert 0.6 < sum(kept) / len(kept) < 0.9
    assert epochs[0] != epochs[1]

    resumed = build()
    resumed.load_state_dict(state)
    assert [step(batch) for batch in resumed] == epochs[1][3:]


def test_verify_and_status_agree_with_it(demo: tuple[str, str, DataRoot], tmp_path: Path) -> None:
    commands = Commands.bare(tmp_path)
    verified = commands.finish(commands.start(sys.executable, "-m", "md_assets.cli", "verify", data_root=demo[2].path))
    assert re.search(r"\d+ checks passed, 0 failed", verified)
    status = commands.finish(commands.start(sys.executable, "-m", "md_assets.cli", "status", data_root=demo[2].path))
    # done, failed (not known without Dagster's records), stale, pruned, missing, read, kept
    assert re.search(r"mds_latents_sdxl1_dfnclipH14\s*│\s*2 │\s*│\s*0 │\s*0 │\s*398 │\s*36 │\s*36 │", status)
    commands.end()
