"""How the reference takes an archive's images to MDS shards, step by step, to be measured against.

The steps are those of the seed document's scripts (see the record of each function), in words of our own. What they do
besides (downloads, progress bars, captions from annotations) is left out: a caption here is the image's name.

Here: the reference's way. Not here: ours (`stages.raw`, `stages.mds`), the measurement (`bench.images`).
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from md_assets.storage.child_process import end_with_parent

if TYPE_CHECKING:
    from streaming import MDSWriter

MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 256, 512
"""px; the scripts' defaults."""

COLUMNS = {"width": "int32", "height": "int32", "jpg": "jpeg", "caption": "str"}
SIZE_LIMIT_BYTES = 256 * 2**20


def load() -> None:
    """Import what the way needs, and keep torch to one core like any worker; once a process, before the clock runs."""
    import streaming  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    torch.set_num_threads(1)
    end_with_parent()


def convert(dataset: str, archive: Path, work: Path) -> int:
    """Take the images of one archive to MDS shards in `work/mds`.

    Args:
        dataset: slug; one of jdb, sa1b, diffdb, cc12m, which each go another way.
        archive: the upstream file; it stays.
        work: a new folder.

    Returns: the number of images written.
    """
    extracted, resized = work / "extracted", work / "resized"
    extracted.mkdir(parents=True)
    resized.mkdir()
    if dataset == "cc12m":
        return _write(work, _cc12m(archive, extracted))
    if dataset == "sa1b":
        _sa1b(archive, extracted, resized)
    else:
        # jdb and diffdb unpack the whole archive with the system's program, then resize file by file.
        unpack = ["unzip", "-q", str(archive), "-d"] if dataset == "diffdb" else ["tar", "-xzf", str(archive), "-C"]
        subprocess.run([*unpack, str(extracted)], check=True)
        for path in extracted.rglob("*.*"):
            _resize_file(path, resized / path.name)
    return _write(work, ((Image.open(path), path.stem) for path in resized.iterdir()))


def _sa1b(archive: Path, extracted: Path, resized: Path) -> None:
    """One member after the other is written to disk and resized."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.name.endswith(".jpg"):
                tar.extract(member, extracted, filter="data")
                _resize_file(extracted / member.name, resized / member.name)


def _cc12m(archive: Path, extracted: Path) -> Iterator[tuple[Image.Image, str]]:
    """Images are resized while shards are written, which encodes those that were, and copies the others' files."""
    with tarfile.open(archive) as tar:
        tar.extractall(extracted, filter="data")
    for text in sorted(extracted.glob("*.txt")):
        text.read_text()
        picture: Image.Image = Image.open(text.with_suffix(".jpg"))
        edge = min(picture.size)
        if edge > MAX_IMAGE_SIZE:
            picture = _downsize(picture)
        if edge >= MIN_IMAGE_SIZE:
            yield picture, text.stem
    shutil.rmtree(extracted)


def _resize_file(path: Path, to: Path) -> None:
    """Save an image again under its name, so in its format at Pillow's default quality: JPEG 75, lossy WebP 80."""
    picture: Image.Image = Image.open(path)
    edge = min(picture.size)
    if edge > MAX_IMAGE_SIZE:
        picture = _downsize(picture)
    if edge >= MIN_IMAGE_SIZE:
        picture.save(to)
    path.unlink()


def _downsize(picture: Image.Image) -> Any:
    from torchvision.transforms import InterpolationMode, Resize

    return Resize(MAX_IMAGE_SIZE, antialias=True, interpolation=InterpolationMode.BICUBIC)(picture)


def _write(work: Path, images: Iterator[tuple[Image.Image, str]]) -> int:
    """MDSWriter copies a JPEG that was opened from a file, and encodes any other picture at quality 75."""
    from streaming import MDSWriter

    writer: MDSWriter = MDSWriter(
        out=str(work / "mds"), columns=COLUMNS, compression=None, size_limit=SIZE_LIMIT_BYTES, max_workers=64
    )
    count = 0
    for picture, caption in images:
        writer.write({"jpg": picture, "caption": caption, "width": picture.width, "height": picture.height})
        count += 1
    writer.finish()
    return count
