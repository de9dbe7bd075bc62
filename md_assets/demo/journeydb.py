"""A miniature JourneyDB: the real repository's layout with drawn pictures, some of which must be rejected.

Here: writing the repository's files. Not here: serving them, see `demo.loopback_hub`.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from md_assets.core.ledger import Reason
from md_assets.core.source import HubFile
from md_assets.datasets.jdb import ANNOTATION_FILES, REPO, SPEC, locate
from md_assets.demo.drawings import draw

SAMPLES_PER_ARCHIVE = 40

ARCHIVES = ("train/000", "train/001", "valid/000", "valid/001")
"""Archives that the miniature has. The demo leaves the last one to be materialized by hand."""

REJECTED_BY_RAW: Mapping[str, int] = {
    Reason.TOO_SMALL: 2,
    Reason.UNDECODABLE: 1,
    Reason.DUPLICATE_KEY: 1,
    Reason.UNSAFE_MEMBER: 1,
}
REJECTED_BY_MDS: Mapping[str, int] = {Reason.NO_CAPTION: 1}
"""Samples of each archive that must be rejected, by stage and reason."""


@dataclass(frozen=True)
class MiniatureArchive:
    """What an archive's tgz holds.

    Attributes:
        members: (name, bytes) in order; bytes None for a symbolic link.
        prompts: member name -> prompt, as the annotations have them.
    """

    members: Sequence[tuple[str, bytes | None]]
    prompts: Mapping[str, str]


def miniature_archive(archive: str, samples: int = SAMPLES_PER_ARCHIVE, size_px: int = 1024) -> MiniatureArchive:
    """An archive with `samples` files, among them every kind that must be rejected.

    Args:
        archive: its ID, from which everything in it follows.
        samples: files in the tgz, ≥ 10.
        size_px: edge of the square pictures; every fifth is a little wider.
    """
    number = archive.rpartition("/")[2]
    members: list[tuple[str, bytes | None]] = []
    prompts: dict[str, str] = {}
    for position in range(samples - 2):
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"md_assets/{archive}/{position}")
        name = f"./{number}/{identity}.jpg"
        seed = identity.int % 2**32
        width, height = (size_px * 3 // 2, size_px) if position % 5 == 4 else (size_px, size_px)
        if position in (3, 4):
            width, height = 300, 200
        drawing = draw(seed, width, height)
        jpeg = drawing.jpeg()
        members.append((name, jpeg[: len(jpeg) // 2] if position == 5 else jpeg))
        if position != 6:
            prompts[name] = f"{drawing.caption} --ar {'3:2' if width > height else '1:1'} --v 5"
    members.append(members[0])
    members.append((f"./{number}/link.jpg", None))
    prompts[f"./{number}/{uuid.UUID(int=0)}.jpg"] = "a caption whose image is absent"
    return MiniatureArchive(members, prompts)


def write_miniature_journeydb(
    hub_root: Path,
    archives: Iterable[str] = ARCHIVES,
    samples: int = SAMPLES_PER_ARCHIVE,
    size_px: int = 1024,
) -> Path:
    """Write the repository below `hub_root`, unless it is there.

    Args:
        hub_root: the directory that a loopback Hub serves.
        archives: IDs to write.
        samples, size_px: see `miniature_archive`.

    Returns: the repository's directory. The same arguments give the same bytes.
    """
    repository = hub_root / "datasets" / REPO
    if repository.exists():
        return repository
    unfinished = repository.with_name(f".{repository.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an interrupted call, perhaps with other arguments
    prompts: dict[str, dict[str, str]] = {split: {} for split in SPEC.splits}
    for archive in archives:
        content = miniature_archive(archive, samples, size_px)
        write_tgz(unfinished / locate(archive).path, content.members)
        prompts[SPEC.split_of(archive)].update(content.prompts)
    for split, path in ANNOTATION_FILES.items():
        write_annotations(unfinished, HubFile(REPO, path), prompts[split])
    unfinished.rename(repository)
    return repository


def write_annotations(repository: Path, file: HubFile, prompts: Mapping[str, str]) -> None:
    """Write a split's annotations: a tgz of one JSON-lines file."""
    rows = "".join(json.dumps({"img_path": name, "prompt": prompt}) + "\n" for name, prompt in prompts.items())
    name = Path(file.path).name.removesuffix(".tgz")
    write_tgz(repository / file.path, [(name, rows.encode())])


def write_tgz(path: Path, members: Iterable[tuple[str, bytes | None]]) -> None:
    """Write a gzipped tar; bytes None make a symbolic link out of the archive. The same members give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=1) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "../../../etc/passwd"
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
