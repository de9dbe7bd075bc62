"""Every dataset by Dagster's own command line, from loopback sources to latents that one loader mixes.

One command takes one archive through everything. Images are small and so are the resolutions, because the start of the
encoding processes takes the time.
"""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from md_assets.core.ledger import Ledger, Reason
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.datasets import spec_of
from md_assets.demo import conceptual12m
from md_assets.demo.miniatures import Miniature
from md_assets.demo.sandbox import MINIATURES, Sandbox
from md_assets.stages.once import published
from md_assets.stages.verify import verify_dataset
from md_assets.storage.mds import iter_rows
from md_assets_tests.end_to_end.conftest import Commands

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2500)]

SIZE_PX = 300
TAG = "sdxl1_dfnclipH14"

ARCHIVES: Mapping[str, str] = {slug: miniature.archives[0] for slug, miniature in MINIATURES.items()} | {
    "textcaps": "val/00000"
}
"""The archive of each dataset that is materialized."""

CONFIG = {
    "resources": {
        "images": {"config": {"num_workers": 0}},
        "encoders": {"config": {"image_resolutions": [32, 64], "num_processes": 1}},
    }
}

ANNOTATIONS: Mapping[str, Mapping[str, tuple[int, Mapping[str, int]]]] = {
    # of two archives each: 22 pictures, of which one has no prompt, and one prompt without picture
    "jdb": {"train": (44, {}), "valid": (44, {})},
    # of two archives each: 18 pictures and one row without
    "diffdb": {"captions": (38, {})},
    # of two archives each: 14 pictures, of which one has no text, and one text without picture; README.txt
    "sa1b": {"captions": (28, {"broken_row": 1})},
    # 14 pictures, of which one has no caption, with three each; one caption without picture
    "coco2014": {"captions": (14, {Reason.FURTHER_CAPTION: 26})},
}
"""Dataset -> file of captions -> rows kept, and rejected by reason."""

ORPHANS = {"jdb": 1, "diffdb": 1, "cc12m": 1, "sa1b": 1, "textcaps": 0, "coco2014": 1}
"""Captions without image that each archive has."""

each = pytest.mark.parametrize("miniature", MINIATURES.values(), ids=lambda miniature: miniature.slug)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataRoot:
    """The data root after one command for each dataset, two at a time."""
    sandbox = Sandbox(tmp_path_factory.mktemp("six"))
    sandbox.prepare(size_px=SIZE_PX)
    with sandbox.served() as environment, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda slug: materialize(slug, sandbox, environment), MINIATURES))
    return sandbox.data


def materialize(slug: str, sandbox: Sandbox, environment: Mapping[str, str]) -> None:
    """One `dagster asset materialize` of all assets of a dataset for one archive, with Dagster records of its own."""
    folder = sandbox.path / f"run_{slug}"
    folder.mkdir()
    (folder / "dagster.yaml").write_bytes((sandbox.dagster_home / "dagster.yaml").read_bytes())
    commands = Commands(folder, {**environment, "DAGSTER_HOME": str(folder)})
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "md_assets.definitions"]
    command += ["--select", " or ".join(f'key:"{slug}/{name}"' for name in assets(slug))]
    command += ["--partition", ARCHIVES[slug], "--config-json", json.dumps(CONFIG)]
    commands.finish(commands.start(*command), 1200)
    commands.end()


def assets(slug: str) -> list[str]:
    spec = spec_of(slug)
    stages = ["mds", "latents"] + [f"{stage}_{subset.name}" for stage in ("mds", "latents") for subset in spec.subsets]
    return ["annotations"] * bool(spec.annotations) + ["raw", *stages, *(f"{stage}_index" for stage in stages)]


def ledger(stage_dir: StageDir, archive: str) -> Ledger:
    found = published(stage_dir, archive)
    assert found is not None, f"{stage_dir.path} {archive} is not published"
    return found


def counts(found: Ledger) -> tuple[int, int, dict[str, int]]:
    assert found.balances
    return found.read, found.kept, {reason: len(keys) for reason, keys in found.rejected.items()}


def kept(miniature: Miniature) -> Mapping[str, str]:
    """Key -> caption of what must be left, in order."""
    return miniature.content(ARCHIVES[miniature.slug], miniature.samples, SIZE_PX).kept


@each
def test_counts_of_every_stage_are_those_of_the_planted_faults(miniature: Miniature, data: DataRoot) -> None:
    slug, archive = miniature.slug, ARCHIVES[miniature.slug]
    after_raw = miniature.samples - sum(miniature.rejected_by_raw.values())
    left = miniature.samples - miniature.lost
    raw, mds, latents = data.raw(slug), data.mds(slug), data.latents(slug, TAG)
    assert counts(ledger(raw, archive)) == (miniature.samples, after_raw, dict(miniature.rejected_by_raw))
    assert counts(ledger(mds, archive)) == (after_raw, left, dict(miniature.rejected_by_mds))
    assert counts(ledger(latents, archive)) == (left, left, {})
    assert ledger(mds, archive).details["orphan_captions"] == ORPHANS[slug]


@each
def test_keys_and_captions_are_those_of_the_source_in_its_order(miniature: Miniature, data: DataRoot) -> None:
    slug, archive = miniature.slug, ARCHIVES[miniature.slug]
    for stage_dir in (data.mds(slug), data.latents(slug, TAG)):
        rows = [(row["key"], row["caption"]) for row in iter_rows(stage_dir.data(archive))]
        assert rows == list(kept(miniature).items())


@each
def test_stored_images_are_jpegs_within_the_limits(miniature: Miniature, data: DataRoot) -> None:
    rows = list(iter_rows(data.mds(miniature.slug).data(ARCHIVES[miniature.slug])))
    assert all(row["jpg"][:2] == b"\xff\xd8" and 256 <= min(row["width"], row["height"]) <= 512 for row in rows)


@pytest.mark.parametrize("slug", ANNOTATIONS)
def test_captions_outside_the_archives_are_indexed_to_the_row(slug: str, data: DataRoot) -> None:
    expected = {
        name: (rows + sum(rejected.values()), rows, rejected) for name, (rows, rejected) in ANNOTATIONS[slug].items()
    }
    sources = spec_of(slug).annotations
    assert {s.name: counts(ledger(data.annotations(slug), s.name)) for s in sources} == expected


@pytest.mark.parametrize("stage", ["mds", "latents"])
def test_the_subset_has_the_large_images_only(stage: str, data: DataRoot) -> None:
    archive, left = ARCHIVES["cc12m"], MINIATURES["cc12m"].samples - MINIATURES["cc12m"].lost
    whole, part = (
        data.mds("cc12m", subset) if stage == "mds" else data.latents("cc12m", TAG, subset)
        for subset in ("", "minres512")
    )
    inside = conceptual12m.IN_MINRES512
    assert counts(ledger(part, archive)) == (left, inside, {Reason.NOT_IN_SUBSET: left - inside})
    rows = [row for row in iter_rows(whole.data(archive)) if min(row["width"], row["height"]) >= 512]
    assert list(iter_rows(part.data(archive))) == rows
    assert json.loads(part.index("").read_text())["md_assets"]["samples"] == inside


def test_everything_published_verifies_and_has_the_settings_of_its_dataset(data: DataRoot) -> None:
    for slug, archive in ARCHIVES.items():
        verdicts = [verdict for _, _, verdict in verify_dataset(spec_of(slug), data)]
        assert verdicts and all(verdict.passed for verdict in verdicts)
        assert ledger(data.mds(slug), archive).settings == mds_settings(spec_of(slug), ImageSettings())


def directory(slug: str, data: DataRoot, subset: str = "") -> Path:
    """What a training config names; of a dataset with splits that of the archive's."""
    return data.latents(slug, TAG, subset).index(spec_of(slug).split_of(ARCHIVES[slug])).parent


@each
def test_streamings_own_reader_reads_every_row_from_the_merged_index(miniature: Miniature, data: DataRoot) -> None:
    """Of textcaps, too, whose shards lie two folders below the index of both splits."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(directory(miniature.slug, data)), shuffle=False, batch_size=1)
    rows = [(dataset[position]["key"], dataset[position]["caption"]) for position in range(len(dataset))]
    assert rows == list(kept(miniature).items())


def samples_by_dataset(streams: Sequence[object]) -> Counter[str]:
    """Samples of each dataset in an epoch of the training loader."""
    from md_assets.loader import build_latents_dataloader

    loader = build_latents_dataloader(
        streams, batch_size=7, image_size=64, drop_last=False, num_workers=0, with_keys=True
    )
    keys = [key for batch in loader for key in batch["key"]]
    assert all(batch["image_latents"].shape[1:] == (4, 8, 8) for batch in loader)
    return Counter(slug for key in keys for slug, archive in ARCHIVES.items() if key.startswith(f"{archive}/"))


def test_one_loader_mixes_all_six_by_a_list_of_directories(data: DataRoot) -> None:
    seen = samples_by_dataset([directory(slug, data) for slug in ARCHIVES])
    assert seen == {slug: len(kept(miniature)) for slug, miniature in MINIATURES.items()}


def test_proportions_decide_how_many_samples_of_each_an_epoch_has(data: DataRoot) -> None:
    from md_assets.loader.streams import LatentsStream

    shares = dict.fromkeys(ARCHIVES, 0.1) | {"jdb": 0.5}
    streams = [LatentsStream(directory(slug, data), proportion=share) for slug, share in shares.items()]
    total = sum(len(kept(miniature)) for miniature in MINIATURES.values())
    seen = samples_by_dataset(streams)
    assert sum(seen.values()) == total
    assert all(abs(seen[slug] - share * total) <= 1 for slug, share in shares.items())


def test_the_mix_of_the_references_512_px_training_is_a_list_of_its_directories(data: DataRoot) -> None:
    """configs/res_512_pretrain.yaml: sa1b, the large images of cc12m, textcaps and train of jdb."""
    named = [directory("sa1b", data), directory("cc12m", data, "minres512"), directory("textcaps", data)]
    assert [str(path.relative_to(data.path)) for path in [*named, directory("jdb", data)]] == [
        "sa1b/mds_latents_sdxl1_dfnclipH14",
        "cc12m/mds_minres512_latents_sdxl1_dfnclipH14",
        "textcaps/mds_latents_sdxl1_dfnclipH14",
        "jdb/mds_latents_sdxl1_dfnclipH14/train",
    ]
    expected = {slug: len(kept(MINIATURES[slug])) for slug in ("sa1b", "textcaps", "jdb")}
    assert samples_by_dataset([*named, directory("jdb", data)]) == {**expected, "cc12m": conceptual12m.IN_MINRES512}
