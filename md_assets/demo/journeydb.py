"""A miniature JourneyDB: the real repository's layout with drawn pictures, some of which must be rejected.

Here: the repository's files. Not here: serving them, see `demo.loopback_hub`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from md_assets.core.ledger import Reason
from md_assets.core.names import safe_name, sample_key
from md_assets.core.source import HubFile
from md_assets.datasets.jdb import ANNOTATION_FILES, REPO, SPEC, locate
from md_assets.demo.containers import write_tgz
from md_assets.demo.drawings import Drawing
from md_assets.demo.miniatures import FAULTY, NO_CAPTION_AT, Content, Miniature, pictures, written_once

SAMPLES_PER_ARCHIVE, SIZE_PX = 24, 640
"""Of the demo: files in an archive, and the edge of most pictures."""

ARCHIVES = ("train/000", "train/001", "valid/000", "valid/001")
"""Archives that the miniature has."""

REJECTED_BY_RAW: Mapping[str, int] = {**FAULTY, Reason.DUPLICATE_KEY: 1, Reason.UNSAFE_MEMBER: 1}
REJECTED_BY_MDS: Mapping[str, int] = {Reason.NO_CAPTION: 1}
"""Samples of each archive that must be rejected, by stage and reason."""

TEST_IMAGES = 4
"""Images of the test split, none of which must be rejected; there is a question on each."""


@dataclass(frozen=True)
class MiniatureArchive:
    """What an archive's tgz holds.

    Attributes:
        members: (name, bytes) in order; bytes None for a symbolic link.
        prompts: member name -> prompt, as the annotations have them.
        kept: key -> prompt of what mds must hold, in order.
    """

    members: Sequence[tuple[str, bytes | None]]
    prompts: Mapping[str, str]
    kept: Mapping[str, str]


def miniature_archive(archive: str, samples: int = SAMPLES_PER_ARCHIVE, size_px: int = SIZE_PX) -> MiniatureArchive:
    """An archive with `samples` files, among them every kind that must be rejected.

    Args:
        archive: its ID, from which everything in it follows.
        samples: files in the tgz, ≥ 10.
        size_px: edge of the square pictures; every fifth is a little wider.
    """
    number = archive.rpartition("/")[2]
    members: list[tuple[str, bytes | None]] = []
    prompts: dict[str, str] = {}
    kept: dict[str, str] = {}
    for picture in pictures(archive, samples - 2, size_px):
        name = f"./{number}/{picture.identity}.jpg"
        members.append((name, picture.file(Drawing.jpeg)))
        if picture.position != NO_CAPTION_AT:
            width, height = picture.drawing.image.size
            prompts[name] = f"{picture.drawing.caption} --ar {'3:2' if width > height else '1:1'} --v 5"
            if picture.usable:
                kept[sample_key(archive, safe_name(name) or "")] = prompts[name]
    members.append(members[0])
    members.append((f"./{number}/link.jpg", None))
    prompts[f"./{number}/{uuid.UUID(int=0)}.jpg"] = "a caption whose image is absent"
    return MiniatureArchive(members, prompts, kept)


def write_miniature_journeydb(
    hub_root: Path,
    archives: Iterable[str] = ARCHIVES,
    samples: int = SAMPLES_PER_ARCHIVE,
    size_px: int = SIZE_PX,
) -> Path:
    """Write the repository below `hub_root`, unless it is there.

    Args:
        hub_root: the directory that a loopback Hub serves.
        archives: IDs to write; the test split comes with them.
        samples, size_px: see `miniature_archive`.

    Returns: the repository's directory. The same arguments give the same bytes.
    """

    def write(repository: Path) -> None:
        prompts: dict[str, dict[str, str]] = {split: {} for split in SPEC.splits}
        for archive in archives:
            content = miniature_archive(archive, samples, size_px)
            write_tgz(repository / locate(archive).path, content.members)
            prompts[SPEC.split_of(archive)].update(content.prompts)
        for split, path in ANNOTATION_FILES.items():
            write_annotations(repository, HubFile(REPO, path), prompts[split])
        _write_test_split(repository)

    return written_once(hub_root / "datasets" / REPO, write)


def _write_test_split(repository: Path) -> None:
    images = [(f"./imgs/{p.identity}.jpg", p.drawing) for p in pictures("test", TEST_IMAGES, 300, _KEPT_SIZES)]
    write_tgz(repository / "data/test/imgs.tgz", [(name, drawing.jpeg()) for name, drawing in images])
    questions = [{"img_path": name, "Question": "What is on it?", "Answer": d.caption} for name, d in images]
    rows = "".join(json.dumps(question) + "\n" for question in questions)
    write_tgz(repository / "data/test/test_questions.jsonl.tgz", [("test_questions.jsonl", rows.encode())])


_KEPT_SIZES = {position: (300, 300) for position in range(TEST_IMAGES)}


def write_annotations(repository: Path, file: HubFile, prompts: Mapping[str, str]) -> None:
    """Write a split's annotations: a tgz of one JSON-lines file."""
    rows = "".join(json.dumps({"img_path": name, "prompt": prompt}) + "\n" for name, prompt in prompts.items())
    name = Path(file.path).name.removesuffix(".tgz")
    write_tgz(repository / file.path, [(name, rows.encode())])


def _content(archive: str, samples: int, size_px: int) -> Content:
    content = miniature_archive(archive, samples, size_px)
    return Content(content.members, list(content.prompts.items()), content.kept)


def _write(hub_root: Path, web_root: Path, samples: int, size_px: int) -> None:
    write_miniature_journeydb(hub_root, ARCHIVES, samples, size_px)


MINIATURE = Miniature(
    SPEC.slug, ARCHIVES, REJECTED_BY_RAW, REJECTED_BY_MDS, _content, _write, SAMPLES_PER_ARCHIVE, SIZE_PX
)
