"""An invented dataset, added by one spec: all stages, a subset, merged indexes, and what the UI is given of it."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from PIL import Image

from md_assets.core.encoder_tag import encoder_tag
from md_assets.core.ledger import Ledger, Reason
from md_assets.core.names import sample_key
from md_assets.core.paths import DataRoot, StageDir
from md_assets.core.settings import ImageSettings, mds_settings
from md_assets.core.source import HubFile
from md_assets.core.spec import AnnotationSource, Caption, DatasetSpec, Member, Rejected, Sample, Subset
from md_assets.demo.containers import write_zip
from md_assets.demo.drawings import draw
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.demo.walkthrough import failure_of
from md_assets.orchestration.assets import dataset_assets
from md_assets.orchestration.resources import EncodersResource, HubResource, ImagesResource
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.stages.once import published
from md_assets.storage.mds import iter_rows
from md_assets_tests.conftest import TinyEncoders

REPO = "someone/stamps"


def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Sample | Rejected]:
    for member in members:
        key = sample_key(archive, member.name)
        yield Rejected(key, member.refused) if member.refused else Sample(key, member.data)


def parse(row: Mapping[str, Any]) -> Caption:
    return Caption(row["sheet"], sample_key(row["sheet"], row["file"]), row["motif"])


STAMPS = DatasetSpec(
    slug="stamps",
    title="Stamps",
    datasheet="Stamps: drawn for this test.",
    archives=("old/1", "old/2", "new/1"),
    archive_format="zip",
    locate=lambda archive: HubFile(REPO, f"{archive}.zip"),
    read_samples=read_samples,
    annotations=tuple(
        AnnotationSource(split, HubFile(REPO, f"{split}.jsonl"), ("sheet", "file", "motif"), parse)
        for split in ("old", "new")
    ),
    splits=("old", "new"),
    small=("old/1", "new/1"),
    subsets=(Subset("large", 400),),
)

CAPTIONS = {"old/1": ["a ship", "a crown", "an owl"], "new/1": ["a rocket", "a bridge"]}
"""Of each stamp that must be kept, in the order of its sheet."""


@pytest.fixture(scope="module")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which each sheet has a stamp that is too small, one without motif and, first, a large one."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "datasets" / REPO
    for seed, (archive, motifs) in enumerate(CAPTIONS.items()):
        sizes_px = [(400, 400), *[(300, 280)] * (len(motifs) - 1), (255, 300), (300, 300)]
        names = [f"{number}.png" for number in range(len(sizes_px))]
        images = [draw(10 * seed + number, *size).png() for number, size in enumerate(sizes_px)]
        write_zip(repository / f"{archive}.zip", zip(names, images, strict=True))
        rows = [{"sheet": archive, "file": name, "motif": motif} for name, motif in zip(names, motifs, strict=False)]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (repository / f"{archive.partition('/')[0]}.jsonl").write_text(lines)
    return root


@pytest.fixture
def definitions(
    hub_root: Path, tmp_path: Path, tiny_encoders: TinyEncoders, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dg.Definitions]:
    monkeypatch.setenv("MD_ASSETS_DATA", str(tmp_path / "datadir"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    encoders = EncodersResource(
        vae=str(tiny_encoders.vae),
        text_encoder=f"openclip:local-dir:{tiny_encoders.open_clip}",
        image_resolutions=[32, 64],
    )
    with LoopbackHub(hub_root) as hub:
        yield dg.Definitions(
            assets=dataset_assets(STAMPS),
            executor=dg.in_process_executor,
            resources={
                "hub": HubResource(endpoint=hub.endpoint),
                "images": ImagesResource(num_workers=0),
                "encoders": encoders,
            },
        )


def materialize(definitions: dg.Definitions, *names: str, archive: str | None = None) -> None:
    """Some of its assets in one run."""
    job = definitions.resolve_implicit_global_asset_job_def()
    keys = {dg.AssetKey(["stamps", name]) for name in names}
    with dg.DagsterInstance.ephemeral() as instance:
        result = job.get_subset(asset_selection=keys).execute_in_process(
            instance=instance, partition_key=archive, raise_on_error=False
        )
    assert result.success, failure_of(result)


def encode(definitions: dg.Definitions, root: DataRoot) -> None:
    """Latents of all archives, as the encoding processes make them."""
    encoders, hub = (definitions.resources or {})["encoders"], (definitions.resources or {})["hub"]
    events: list[dict[str, Any]] = []
    plan = LatentsPlan(
        data_root=str(root.path),
        dataset=STAMPS.slug,
        archives=tuple(CAPTIONS),
        mds_settings=mds_settings(STAMPS, ImageSettings()),
        encoders=encoders.settings(hub.client()),
        encoder_tag=encoders.tag(),
        num_workers=0,
        device="cpu",
    )
    encode_archives(plan, events.append)
    assert [event["archive"] for event in events if event["event"] == "published"] == list(CAPTIONS)


def counts(stage_dir: StageDir, archive: str) -> tuple[int, int, dict[str, int]]:
    ledger: Ledger | None = published(stage_dir, archive)
    assert ledger is not None and ledger.balances
    return ledger.read, ledger.kept, {reason: len(keys) for reason, keys in ledger.rejected.items()}


@pytest.mark.slow
def test_it_goes_through_all_stages_to_the_training_loader(
    definitions: dg.Definitions, tiny_encoders: TinyEncoders
) -> None:
    from md_assets.loader import build_latents_dataloader

    root = DataRoot.from_environment()
    materialize(definitions, "annotations")
    for archive in CAPTIONS:
        materialize(definitions, "raw", "mds", "mds_large", archive=archive)
    encode(definitions, root)
    for archive in CAPTIONS:
        materialize(definitions, "latents_large", archive=archive)
    materialize(definitions, "mds_index", "latents_index", "mds_large_index", "latents_large_index")

    tag = encoder_tag(str(tiny_encoders.vae), f"openclip:local-dir:{tiny_encoders.open_clip}")
    for archive, captions in CAPTIONS.items():
        left = len(captions)
        assert counts(root.raw("stamps"), archive) == (left + 2, left + 1, {Reason.TOO_SMALL: 1})
        assert counts(root.mds("stamps"), archive) == (left + 1, left, {Reason.NO_CAPTION: 1})
        assert counts(root.latents("stamps", tag), archive) == (left, left, {})
        assert counts(root.latents("stamps", tag, "large"), archive) == (left, 1, {Reason.NOT_IN_SUBSET: left - 1})
        rows = list(iter_rows(root.mds("stamps").data(archive)))
        assert [(row["key"], row["caption"]) for row in rows] == [
            (f"{archive}/{number}", caption) for number, caption in enumerate(captions)
        ]
        assert Image.open(io.BytesIO(rows[0]["jpg"])).size == (400, 400)
    streams = [root.latents("stamps", tag).index(split).parent for split in STAMPS.splits]
    loader = build_latents_dataloader(
        streams, batch_size=2, image_size=64, drop_last=False, num_workers=0, with_keys=True
    )
    keys = [key for batch in loader for key in batch["key"]]
    assert sorted(keys) == sorted(f"{archive}/{n}" for archive, c in CAPTIONS.items() for n in range(len(c)))


def test_the_ui_is_given_its_assets_partitions_and_checks(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)
    graph = definitions.resolve_asset_graph()
    names = ["archive", "annotations", "raw"]
    names += [name for stage in ("mds", "latents") for name in (stage, f"{stage}_large")]
    names += [f"{name}_index" for name in names[3:]]
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == {f"stamps/{name}" for name in names}
    for name in ("archive", "raw", "mds", "mds_large", "latents", "latents_large"):
        partitions = graph.get(dg.AssetKey(["stamps", name])).partitions_def
        assert partitions is not None and partitions.get_partition_keys() == list(STAMPS.archives)
    raw = graph.get(dg.AssetKey(["stamps", "raw"]))
    assert raw.group_name == "stamps" and STAMPS.datasheet in (raw.description or "")
    checked = {key.asset_key.path[-1] for key in graph.asset_check_keys}
    assert checked == {*names} - {"archive", "annotations"}
