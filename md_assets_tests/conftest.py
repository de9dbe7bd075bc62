"""Fixtures that more than one test module uses: tiny encoders, and archives published without their sources."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from md_assets.bench.postgres_server import postgres_server
from md_assets.core.errors import SettingsError
from md_assets.core.ledger import Ledger
from md_assets.core.paths import DataRoot
from md_assets.core.schema import MDS_COLUMNS
from md_assets.core.settings import EncoderSettings, ImageSettings, mds_settings
from md_assets.datasets.jdb import SPEC as JDB
from md_assets.demo.tiny_encoders import write_tiny_clip, write_tiny_open_clip, write_tiny_t5, write_tiny_vae
from md_assets.stages.latents_plan import LatentsPlan
from md_assets.storage.mds import ShardWriter, ledgered_files
from md_assets.storage.publish import publish, scratch, with_files, workspace

# Shells give jobs in the background an ignored SIGINT. Dagster makes SIGTERM behave like SIGINT, and what is ignored is
# inherited: processes that tests start could not be terminated.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported, here and in the processes that tests start: the suite runs in three processes, and torch's
# threads wait for each other by spinning. With a thread for each core, tiny models take five times as long. Encoding
# processes take a thread for each core whatever this says, so they are to wait without spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@contextmanager
def set_postgres_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """Set the environment in which `deploy/dagster.postgres.yaml` finds a server with an empty database."""
    try:
        with postgres_server(durable=False) as variables:
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            yield variables
    except SettingsError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))


Row = dict[str, Any]
MdsRows = Callable[..., list[Row]]
PublishMds = Callable[..., Ledger]
MakePlan = Callable[..., LatentsPlan]


@pytest.fixture(autouse=True)
def no_threads_of_another_test() -> Iterator[None]:
    """An encoding process that a test plays takes a thread of torch for each core."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def no_session_of_another_test() -> Iterator[None]:
    """huggingface_hub remembers its session, and with it whether it was offline when the session was made."""
    yield
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import reset_sessions

        reset_sessions()


@dataclass(frozen=True)
class TinyEncoders:
    """Folders of a VAE and an open_clip model that load in no time."""

    vae: Path
    open_clip: Path

    def settings(self, **changes: Any) -> EncoderSettings:
        """Settings that use them, at resolutions that a CPU encodes in milliseconds."""
        defaults: dict[str, Any] = {
            "vae": str(self.vae),
            "text_encoder": f"openclip:local-dir:{self.open_clip}",
            "vae_revision": "tiny-vae",
            "text_encoder_revision": "tiny-clip",
            "image_resolutions": (32, 64),
        }
        return EncoderSettings(**{**defaults, **changes})


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> TinyEncoders:
    folder = tmp_path_factory.mktemp("encoders")
    return TinyEncoders(write_tiny_vae(folder / "tinyvae"), write_tiny_open_clip(folder / "tinyclip"))


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's folder with a CLIP text encoder of transformers."""
    return write_tiny_clip(tmp_path_factory.mktemp("encoders") / "tinypipeline")


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a T5 encoder alone."""
    return write_tiny_t5(tmp_path_factory.mktemp("encoders") / "tinyt5")


@pytest.fixture
def latents_plan(tmp_path: Path, tiny_encoders: TinyEncoders, mds_rows: MdsRows, publish_mds: PublishMds) -> MakePlan:
    """A function (archive -> rows, **fields of the plan) that publishes mds and plans to encode all of it."""

    def make(counts: Mapping[str, int], **changes: Any) -> LatentsPlan:
        for archive, count in counts.items():
            publish_mds(DataRoot(tmp_path), "jdb", archive, mds_rows(archive, count))
        fields: dict[str, Any] = {
            "data_root": str(tmp_path),
            "dataset": "jdb",
            "archives": tuple(counts),
            "mds_settings": mds_settings(JDB, ImageSettings()),
            "encoders": tiny_encoders.settings(),
            "encoder_tag": "tiny",
            "num_workers": 0,
        }
        return LatentsPlan(**{**fields, **changes})

    return make


def _jpeg(seed: int, width: int, height: int) -> bytes:
    """Smooth colours with some noise: compresses like a photograph, and no two seeds are alike."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels += random.integers(-8, 9, pixels.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="session")
def mds_rows() -> MdsRows:
    """A function (archive, count) -> rows of mds, each with its own image and caption."""

    def make(archive: str, count: int, width: int = 90, height: int = 70) -> list[Row]:
        return [
            {
                "key": f"{archive}/{i:04}",
                "jpg": _jpeg(i, width, height),
                "caption": f"picture {i} of {archive}",
                "width": width,
                "height": height,
            }
            for i in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def publish_mds() -> PublishMds:
    """A function (root, dataset, archive, rows) that publishes mds shards of these rows, and returns their ledger."""

    def make(
        root: DataRoot, dataset: str, archive: str, rows: Sequence[Row], images: ImageSettings | None = None
    ) -> Ledger:
        stage_dir = root.mds(dataset)
        with workspace(stage_dir.ledger(archive)) as own:
            shards = scratch(own, "shards")
            with ShardWriter(shards, MDS_COLUMNS) as writer:
                for row in rows:
                    writer.write(row)
            ledger = Ledger(
                dataset=dataset,
                archive=archive,
                stage="mds",
                read=len(rows),
                kept=len(rows),
                rejected={},
                bytes_in=0,
                bytes_out=0,
                seconds=0.0,
                source={"name": f"{archive}.tgz", "content_id": "c" * 64, "revision": "r" * 40},
                inputs={"raw": "i" * 64},
                settings=mds_settings(JDB, images or ImageSettings()),
                versions={},
                files=(),
            )
            return publish(stage_dir, shards, with_files(ledger, ledgered_files(shards, archive)))

    return make
