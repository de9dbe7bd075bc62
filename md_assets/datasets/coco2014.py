"""MS-COCO 2014: its 40,504 validation photographs, each with captions that people wrote; the evaluation set.

**Source** · <http://images.cocodataset.org>. `MD_ASSETS_COCO_URL` names another server with the same files.

**License** · CC BY 4.0 for the annotations; the images are from Flickr and keep their terms.

**Archives** · One, `zips/val2014.zip` (6.6 GB). The partition is `val2014`.

**Samples** · Every file of the zip is an image, `val2014/COCO_val2014_NNNNNNNNNNNN.jpg`; its key is
`val2014/COCO_val2014_NNNNNNNNNNNN`.

**Captions** · `annotations/captions_val2014.json` in `annotations/annotations_trainval2014.zip`: about five for each
image, of which the first is taken.

**Known defects** · 640 px on the longer edge, so the smaller one is mostly below 512 px, and the 512 px latents are of
images made larger, as in the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from md_assets.core.names import safe_name, sample_key
from md_assets.core.source import Checksum, WebFile
from md_assets.core.spec import AnnotationSource, Caption, DatasetSpec, Member, Rejected, Sample

ARCHIVE = "val2014"
BASE_VARIABLE = "MD_ASSETS_COCO_URL"
OFFICIAL_BASE = "http://images.cocodataset.org"
IMAGES_MD5 = "a3d79f5ed8d289b7a7554ce06a5782b3"
ANNOTATIONS_MD5 = "0a379cfc70b0e71301e0f377548639bd"


def locate(archive: str) -> WebFile:
    return WebFile(f"zips/{archive}.zip", BASE_VARIABLE, OFFICIAL_BASE, Checksum("md5", IMAGES_MD5))


def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Sample | Rejected]:
    for member in members:
        key = sample_key(archive, member.name)
        yield Rejected(key, member.refused) if member.refused else Sample(key, member.data)


def parse(row: Mapping[str, Any]) -> Caption:
    file_name, text = row["file_name"], row["caption"]
    if not isinstance(file_name, str):
        raise TypeError(f"file_name is {type(file_name).__name__}, not text")
    name = safe_name(file_name)
    if name is None:
        raise ValueError(f"file_name {file_name!r} is no name of a file")
    return Caption(ARCHIVE, sample_key(ARCHIVE, name), text)


SPEC = DatasetSpec(
    slug="coco2014",
    title="MS-COCO 2014",
    datasheet=__doc__ or "",
    archives=(ARCHIVE,),
    archive_format="zip",
    locate=locate,
    read_samples=read_samples,
    annotations=(
        AnnotationSource(
            "captions",
            WebFile(
                "annotations/annotations_trainval2014.zip",
                BASE_VARIABLE,
                OFFICIAL_BASE,
                Checksum("md5", ANNOTATIONS_MD5),
            ),
            ("file_name", "caption"),
            parse,
            format="coco_captions",
            member="annotations/captions_val2014.json",
            first_of_several=True,
        ),
    ),
    small=(ARCHIVE,),
)
