"""Fixtures of the stage tests: a Hub with a small miniature JourneyDB, and the stages run against it."""

import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot, Stage, StageDir
from md_assets.core.schema import latents_column, latents_columns
from md_assets.core.settings import ImageSettings
from md_assets.core.source import RemoteFile
from md_assets.datasets.jdb import REPO, SPEC
from md_assets.demo.drawings import draw
from md_assets.demo.journeydb import write_annotations, write_miniature_journeydb, write_tgz
from md_assets.demo.loopback_hub import LoopbackHub
from md_assets.stages.annotations import index_annotations
from md_assets.stages.mds import convert_archive
from md_assets.stages.once import Outcome
from md_assets.stages.raw import fetch_archive
from md_assets.storage.hub import HubClient
from md_assets.storage.image_pool import ImagePool
from md_assets.storage.mds import ShardWriter, ledgered_files
from md_assets.storage.publish import publish, scratch, with_files, workspace
from md_assets.storage.raw_tar import RawSample, iter_raw_tar
from md_assets.storage.retry import TransferPolicy

ARCHIVES = ("train/000", "train/001", "valid/000")
SAMPLES, SIZE_PX = 12, 520
"""Of each archive: raw keeps 7 of 12, mds 6 of these. Pictures of 520 px must be resized to 512."""

POLICY = TransferPolicy(connect_timeout_s=2, stall_timeout_s=0.5, listing_timeout_s=5, attempts=2, first_delay_s=0.01)


@dataclass
class JourneyDb:
    """A miniature JourneyDB behind a Hub, and what the stages publish of it below `root`."""

    hub: LoopbackHub
    root: DataRoot
    policy: TransferPolicy = POLICY
    token: str | None = None

    @property
    def repository(self) -> Path:
        return self.hub.repositories.root / "datasets" / REPO

    def upstream(self, archive: str) -> Path:
        """The tgz as the Hub has it."""
        return self.repository / SPEC.locate(archive).path

    def hub_client(self) -> HubClient:
        """A new one, which asks for the listing anew."""
        return HubClient(self.hub.endpoint, self.token, policy=self.policy)

    def raw(self, archive: str = "train/000", images: ImageSettings | None = None, **options: Any) -> Outcome:
        """Run the raw stage in this process."""
        client = self.hub_client()
        images = images or ImageSettings()
        options = {"pool": ImagePool(0), "fetcher": client, **options}
        return fetch_archive(SPEC, archive, lambda: client.locate(SPEC.locate(archive)), self.root, images, **options)

    def annotations(self, split: str = "train", **options: Any) -> Outcome:
        """Run the annotations stage."""
        (source,) = (source for source in SPEC.annotations if source.name == split)
        client = self.hub_client()
        return index_annotations(SPEC, source, client.locate(source.file), self.root, fetcher=client, **options)

    def mds(self, archive: str = "train/000", images: ImageSettings | None = None, **options: Any) -> Outcome:
        """Run the mds stage."""
        return convert_archive(SPEC, archive, self.root, images or ImageSettings(), **options)

    def dir(self, stage: Stage) -> StageDir:
        made = {"raw": self.root.raw, "mds": self.root.mds, "annotations": self.root.annotations}
        return self.root.latents("jdb", "tiny") if stage == "latents" else made[stage]("jdb")

    def put_archive(self, archive: str, members: Mapping[str, bytes | None]) -> None:
        """Replace an archive at the Hub; None makes a symbolic link."""
        write_tgz(self.upstream(archive), list(members.items()))

    def put_prompts(self, split: str, prompts: Mapping[str, Any]) -> None:
        """Replace the annotations of a split."""
        (source,) = (source for source in SPEC.annotations if source.name == split)
        write_annotations(self.repository, source.file, prompts)

    def put_lines(self, split: str, lines: bytes) -> None:
        """Replace the annotations of a split by these bytes."""
        (source,) = (source for source in SPEC.annotations if source.name == split)
        write_tgz(self.repository / source.file.path, [("anno.jsonl", lines)])

    def raw_samples(self, archive: str = "train/000") -> list[RawSample]:
        """What raw published, compared with its ledger."""
        stage_dir = self.dir("raw")
        ledger = Ledger.from_json(stage_dir.ledger(archive).read_text(), "")
        return list(iter_raw_tar(stage_dir.data(archive), ledger.files[0]))

    def files(self) -> dict[str, bytes]:
        """Everything below the data root but ledgers, by path."""
        paths = sorted(p for p in self.root.path.rglob("*") if p.is_file())
        ledgers = {p for p in paths if p.suffix == ".json" and p.name != "index.json"}
        return {str(p.relative_to(self.root.path)): p.read_bytes() for p in paths if p not in ledgers}

    def temporaries(self) -> list[str]:
        """What is hidden below the data root: workspaces and what is in them."""
        hidden = (p.relative_to(self.root.path) for p in self.root.path.rglob("*"))
        return sorted(str(p) for p in hidden if any(part.startswith(".") for part in p.parts))


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own login must not reach a test."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))


@pytest.fixture(scope="session")
def hub_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub's directory, written once; not to be changed."""
    folder = tmp_path_factory.mktemp("hub_files")
    write_miniature_journeydb(folder, ARCHIVES, SAMPLES, SIZE_PX)
    return folder


@pytest.fixture
def jdb(hub_files: Path, tmp_path: Path) -> Iterator[JourneyDb]:
    """A copy of the miniature at a Hub of its own, and an empty data root."""
    shutil.copytree(hub_files, tmp_path / "hub")
    with LoopbackHub(tmp_path / "hub") as hub:
        yield JourneyDb(hub, DataRoot(tmp_path / "data"))


@pytest.fixture
def ready(jdb: JourneyDb) -> JourneyDb:
    """With raw of train/000 and the captions of train published: what mds needs."""
    jdb.raw()
    jdb.annotations()
    return jdb


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """A function (seed, width, height) -> a drawn picture's JPEG."""

    def make(seed: int = 0, width: int = 300, height: int = 300) -> bytes:
        return draw(seed, width, height).jpeg()

    return make


def png(width: int, height: int) -> bytes:
    """A PNG whose header tells this size, with the pixels of a 256×256 one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8-bit grey
    pixels = zlib.compress(bytes(257 * 256))  # a filter byte, then the row
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


LATENT_SHAPES = {"caption_latents": (1, 3, 4), "latents_32": (2, 4, 4)}
LAYOUT = {"caption_latents": [1, 3, 4], "image_latents": {"32": [2, 4, 4]}, "dtype": "float16"}


def latents_row(key: str, **changes: Any) -> dict[str, Any]:
    """A row of latents with random values."""
    random = np.random.default_rng(len(key))
    arrays = {c: random.standard_normal(shape).astype(np.float16).tobytes() for c, shape in LATENT_SHAPES.items()}
    return {"key": key, "caption": f"picture {key}", **arrays, "width": 300, "height": 260, **changes}


@pytest.fixture(scope="session")
def publish_latents() -> Callable[..., Ledger]:
    """A function (stage_dir, archive, rows, **ledger fields) that publishes them as the latents stage does."""

    def make(stage_dir: StageDir, archive: str, rows: list[dict[str, Any]] | int = 3, **changes: Any) -> Ledger:
        if isinstance(rows, int):
            rows = [latents_row(f"{archive}/{number}") for number in range(rows)]
        defaults: dict[str, Any] = {
            "dataset": stage_dir.dataset,
            "archive": archive,
            "stage": "latents",
            "read": len(rows),
            "kept": len(rows),
            "rejected": {},
            "bytes_in": 1,
            "bytes_out": 0,
            "seconds": 1.0,
            "source": {},
            "inputs": {},
            "settings": {"made": "by test"},
            "versions": {},
            "files": (),
            "details": LAYOUT,
        }
        with workspace(stage_dir.ledger(archive)) as own:
            shards = scratch(own, "shards")
            with ShardWriter(shards, latents_columns((32,), save_images=False)) as writer:
                for row in rows:
                    writer.write(row)
            files = ledgered_files(shards, archive)
            return publish(stage_dir, shards, with_files(Ledger(**{**defaults, **changes}), files))

    assert latents_column(32) in LATENT_SHAPES
    return make


def wait_until(condition: Callable[[], bool], within_s: float = 30) -> None:
    """Return when the condition holds; fail when it does not in time."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def remote_of(jdb: JourneyDb, archive: str) -> RemoteFile:
    """An archive as the Hub lists it now."""
    return jdb.hub_client().locate(SPEC.locate(archive))
