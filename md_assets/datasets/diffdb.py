"""DiffusionDB: 14 million images that people made with Stable Diffusion, each with the prompt that made it.

**Source** · Hub dataset `poloclub/diffusiondb`, its large part: <https://huggingface.co/datasets/poloclub/diffusiondb>.

**License** · CC0 1.0: no rights are reserved for images, prompts and metadata.

**Archives** · 14,000 zips: `diffusiondb-large-part-1/part-000001.zip` … `part-010000.zip` and
`diffusiondb-large-part-2/part-010001.zip` … `part-014000.zip`, 6.5 TB in all. A partition is `part-000001` …
`part-014000`.

**Samples** · Every zip holds 1,000 lossless WebP images `<uuid>.webp` and `part-NNNNNN.json`, which is no sample. The
key is `part-NNNNNN/<uuid>`. Most are 512 to 768 px on the smaller edge.

**Captions** · `prompt` of `metadata-large.parquet` (14,000,000 rows, 13 columns), by `part_id` and `image_name`. The
same row has two safety scores, `image_nsfw` and `prompt_nsfw`, 0 to 1; a sample whose worse score is above
`safety_threshold`, or one of whose scores is missing or no number, is rejected in the mds stage as `nsfw`.

**Known defects** · `image_nsfw` is 2.0 where the generator had blurred the image already. The scores are the output of
classifiers, and some are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from md_assets.core.names import safe_name, sample_key
from md_assets.core.source import HubFile
from md_assets.core.spec import AnnotationSource, Caption, DatasetSpec, Member, Rejected, Sample

REPO = "poloclub/diffusiondb"
ARCHIVES = 14_000
ARCHIVES_IN_FIRST_FOLDER = 10_000
SMALL = 140
"""Archives of the reference's small subset: the first ones."""

SCORES = ("image_nsfw", "prompt_nsfw")


def locate(archive: str) -> HubFile:
    folder = 1 if int(archive.removeprefix("part-")) <= ARCHIVES_IN_FIRST_FOLDER else 2
    return HubFile(REPO, f"diffusiondb-large-part-{folder}/{archive}.zip")


def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Sample | Rejected]:
    for member in members:
        key = sample_key(archive, member.name)
        if member.refused:
            yield Rejected(key, member.refused)
        elif not member.name.lower().endswith(".json"):
            yield Sample(key, member.data)


def parse(row: Mapping[str, Any]) -> Caption:
    image_name, part_id = row["image_name"], row["part_id"]
    if not isinstance(image_name, str) or not isinstance(part_id, int):
        raise TypeError(f"image_name {image_name!r} is no text, or part_id {part_id!r} no whole number")
    name = safe_name(image_name)
    if name is None:
        raise ValueError(f"image_name {image_name!r} is no name of a file")
    archive = f"part-{part_id:06}"
    return Caption(archive, sample_key(archive, name), row["prompt"], _worst(row[score] for score in SCORES))


def _worst(scores: Iterator[float | None]) -> float:
    """The highest score, NaN where one is absent or NaN itself."""
    known = [math.nan if score is None else float(score) for score in scores]
    return math.nan if any(map(math.isnan, known)) else max(known)


SPEC = DatasetSpec(
    slug="diffdb",
    title="DiffusionDB",
    datasheet=__doc__ or "",
    archives=tuple(f"part-{number:06}" for number in range(1, ARCHIVES + 1)),
    archive_format="zip",
    locate=locate,
    read_samples=read_samples,
    annotations=(
        AnnotationSource(
            "captions",
            HubFile(REPO, "metadata-large.parquet"),
            ("image_name", "prompt", "part_id", *SCORES),
            parse,
            format="parquet",
            scored=True,
        ),
    ),
    small=tuple(f"part-{number:06}" for number in range(1, SMALL + 1)),
)
