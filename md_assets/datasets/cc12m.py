"""Conceptual Captions 12M: 11 million web images, each with the cleaned alt text of its page.

**Source** · Hub dataset `pixparse/cc12m-wds`: <https://huggingface.co/datasets/pixparse/cc12m-wds>.

**License** · Conceptual 12M's own: free for any purpose, provided as it is, acknowledgement of Google appreciated. The
images have the licences of the pages that they come from.

**Archives** · 2,176 WebDataset tars `cc12m-train-0000.tar` … `cc12m-train-2175.tar`. A partition is
`cc12m-train-0000` … `cc12m-train-2175`.

**Samples** · Consecutive files whose names are equal up to the first dot belong together: an image, `.txt` and
`.json`. The key is `cc12m-train-NNNN/<name>`. The shorter edge is at most 512 px in the published set, and below 256 px
in many. The subset `minres512`, images with a smaller edge of at least 512 px, has shards of its own.

**Captions** · `<name>.txt` beside the image, of which the first 5,000 characters are cleaned in the mds stage as
DeepFloyd-IF does it. Nothing but full stops counts as empty. A `.txt` without an image is counted as
`orphan_captions`; an image without, or whose text is empty when cleaned, is rejected as `no_caption`.

**Known defects** · Names of persons are replaced by `<PERSON>` upstream. Images whose address was dead when the set was
fetched are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from md_assets.core.names import sample_key
from md_assets.core.source import HubFile
from md_assets.core.spec import DatasetSpec, Member, OrphanCaption, Rejected, Sample, Subset

REPO = "pixparse/cc12m-wds"
ARCHIVES = 2_176
SMALL = 23
"""Archives of the reference's small subset: the first ones."""

CAPTION, METADATA = "txt", "json"
"""Extensions of what belongs to an image; any other file is an image, whatever it calls itself."""


def locate(archive: str) -> HubFile:
    return HubFile(REPO, f"{archive}.tar")


def read_samples(archive: str, members: Iterator[Member]) -> Iterator[Sample | Rejected | OrphanCaption]:
    for name, group in groupby(members, _sample_name):
        key = sample_key(archive, name)
        images, caption = [], None
        for member in group:
            extension = member.name.rpartition(".")[2].lower()
            if extension in (CAPTION, METADATA):
                if member.refused:
                    yield Rejected(sample_key(archive, member.name), member.refused)
                elif extension == CAPTION and caption is None:
                    caption = member.data.decode("utf-8", "replace")
            else:
                images.append(member)
        for image in images:  # a second one has the first one's key, and is rejected for it
            yield Rejected(key, image.refused) if image.refused else Sample(key, image.data, caption)
        if caption is not None and not images:
            yield OrphanCaption(key)


def _sample_name(member: Member) -> str:
    """A member's name up to the first dot of its last part; a name that begins with a dot is whole."""
    folder, slash, file = member.name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0] or file}"


SPEC = DatasetSpec(
    slug="cc12m",
    title="Conceptual Captions 12M",
    datasheet=__doc__ or "",
    archives=tuple(f"cc12m-train-{number:04}" for number in range(ARCHIVES)),
    archive_format="tar",
    locate=locate,
    read_samples=read_samples,
    small=tuple(f"cc12m-train-{number:04}" for number in range(SMALL)),
    caption_cleaning="deepfloyd",
    subsets=(Subset("minres512", 512),),
)
