"""TextCaps: 25,000 photographs with writing in them, each with five captions that read it.

**Source** · Hub dataset `lmms-lab/TextCaps`: <https://huggingface.co/datasets/lmms-lab/TextCaps>. The repository that
the reference names, `HuggingFaceM4/TextCaps`, is a loader script that no current `datasets` runs.

**License** · CC BY 4.0 for the captions; the images are of Open Images, CC BY 2.0.

**Archives** · 13 parquet files of train and 2 of validation, `data/train-NNNNN-of-00013*.parquet` and
`data/val-NNNNN-of-00002*.parquet`. A partition is `train/00000` … `train/00012`, `val/00000`, `val/00001`. Both splits
have one merged index, because training configs name one directory for both.

**Samples** · A row is a sample: `image` with the encoded file, `image_id`. The key is `<split>/NNNNN/<image_id>`.
21,953 rows of train and 3,166 of validation.

**Captions** · The first of `reference_strs`, as the reference takes it.

**Known defects** · The captions of the test split are withheld upstream, so it is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from md_assets.core.names import sample_key
from md_assets.core.source import HubFile
from md_assets.core.spec import DatasetSpec, Member, ParquetLayout, Rejected, Sample

REPO = "lmms-lab/TextCaps"
FILES_OF_SPLIT = {"train": 13, "val": 2}
CAPTIONS = "reference_strs"


def locate(archive: str) -> HubFile:
    split, _, number = archive.partition("/")
    return HubFile(REPO, f"data/{split}-{number}-of-{FILES_OF_SPLIT[split]:05}*.parquet")


def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Sample | Rejected]:
    for member in members:
        key = sample_key(archive, member.name)
        yield Rejected(key, member.refused) if member.refused else Sample(key, member.data, _first(member.fields))


def _first(fields: Mapping[str, Any]) -> str | None:
    """The first caption of a row, None where it has none."""
    captions = fields.get(CAPTIONS)
    return captions[0] if captions and isinstance(captions[0], str) else None


ARCHIVES = tuple(f"{split}/{number:05}" for split, files in FILES_OF_SPLIT.items() for number in range(files))

SPEC = DatasetSpec(
    slug="textcaps",
    title="TextCaps",
    datasheet=__doc__ or "",
    archives=ARCHIVES,
    archive_format="parquet",
    locate=locate,
    read_samples=read_samples,
    small=ARCHIVES,
    parquet=ParquetLayout(image="image", name="image_id", others=(CAPTIONS,)),
)
