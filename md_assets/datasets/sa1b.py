"""Segment-Anything-1B: 11 million photographs, with captions that LLaVA wrote for PixArt-α.

**Source** · Meta's link list at <https://ai.meta.com/datasets/segment-anything-downloads/>, whose links are signed and
expire after about 30 days: set `MD_ASSETS_SA1B_LINKS` to the file or its URL. Without it, the mirror on the Hub,
`Aber-r/SA-1B_backup`.

**License** · SA-1B Dataset Research License for the images: research only, faces and licence plates are blurred.
OpenRAIL for the captions.

**Archives** · 1,000 tars of about 11 GB, `sa_000000.tar` … `sa_000999.tar`. A partition is `sa_000000` … `sa_000999`.

**Samples** · `sa_N.jpg`, beside its masks `sa_N.json`, which are no sample; the key is `sa_NNNNNN/sa_N`. 11,185,362
images in all, 1,500 px on the shorter side.

**Captions** · `SA1B_caption.tar.gz` of the Hub dataset `PixArt-alpha/SAM-LLaVA-Captions10M`: a text file `sa_N.txt` for
each image, without white space around it. It does not tell the archive, so the index is ordered by N. About 10 million
images have one; an image without is rejected in the mds stage as `no_caption`.

**Known defects** · The captions describe what a model saw, and some describe what is not there. The link list comes in
any order and has rows that are no archive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from md_assets.core.names import sample_key
from md_assets.core.source import HubFile, LinkedFile
from md_assets.core.spec import AnnotationSource, Caption, DatasetSpec, Member, Rejected, Sample

MIRROR_REPO = "Aber-r/SA-1B_backup"
CAPTIONS_REPO = "PixArt-alpha/SAM-LLaVA-Captions10M"
LINKS_VARIABLE = "MD_ASSETS_SA1B_LINKS"
ARCHIVES = 1_000
SMALL = 10
"""Archives of the reference's small subset: 1 % of the links. Their order varies, so ours are the first by name."""


def locate(archive: str) -> LinkedFile:
    return LinkedFile(f"{archive}.tar", LINKS_VARIABLE, mirror=HubFile(MIRROR_REPO, f"*{archive}.tar"))


def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Sample | Rejected]:
    for member in members:
        key = sample_key(archive, member.name)
        if member.refused:
            yield Rejected(key, member.refused)
        elif not member.name.lower().endswith(".json"):
            yield Sample(key, member.data)


def parse(row: Mapping[str, Any]) -> Caption:
    name = row["name"].rpartition("/")[2].removesuffix(".txt")
    number_of(name)
    return Caption("", name, row["text"].strip())


def number_of(key: str) -> int:
    """N of `sa_N`, with or without the archive in front."""
    name = key.rpartition("/")[2]
    digits = name.removeprefix("sa_")
    if digits == name or not (digits.isascii() and digits.isdecimal()):
        raise ValueError(f"{name!r} is not sa_N")
    return int(digits)


SPEC = DatasetSpec(
    slug="sa1b",
    title="Segment-Anything-1B",
    datasheet=__doc__ or "",
    archives=tuple(f"sa_{number:06}" for number in range(ARCHIVES)),
    archive_format="tar",
    locate=locate,
    read_samples=read_samples,
    annotations=(
        AnnotationSource(
            "captions",
            HubFile(CAPTIONS_REPO, "SA1B_caption.tar.gz"),
            ("name", "text"),
            parse,
            format="texts",
            number_of=number_of,
        ),
    ),
    small=tuple(f"sa_{number:06}" for number in range(SMALL)),
)
