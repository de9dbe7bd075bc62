"""What one dataset is: the four things that vary, and nothing else.

Here: `DatasetSpec` and the values that pass between an archive, a dataset's reader and the stages.
Not here: any dataset (see `datasets/`), and any I/O: a reader receives members that `storage.archives`
opened, so it never sees a path or a file handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from md_assets.core.source import Address

ArchiveFormat = Literal["tar", "zip", "parquet"]

AnnotationFormat = Literal["json_lines", "parquet", "texts", "coco_captions"]
"""What an annotations file is, and what one of its rows is:
    json_lines: a tar (compressed or not) or plain file of one JSON object a line; the object.
    parquet: a table; column -> value, of the columns that are asked for.
    texts: a tar of many small text files; `name` (the member's safe name) and `text`.
    coco_captions: a zip with COCO's captions JSON; for each annotation `file_name` (of its image) and `caption`.
"""


@dataclass(frozen=True)
class Member:
    """One entry of an archive, or why it cannot be one.

    Attributes:
        name: the entry's name with `/`, relative, without `.` and `..`, everything else percent-encoded
            where it could harm (control characters, bytes that are not UTF-8); unique names stay unique.
        data: the entry's bytes; empty when `refused`.
        refused: a reason (`core.ledger.Reason`) when the entry must not be read: a link, a device, a name
            that leads outside, more bytes than the limit. None for a usable entry.
        fields: of a row of a parquet archive, its other columns; empty in a tar or zip.
    """

    name: str
    data: bytes
    refused: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One image of an archive, with what the archive itself says of it.

    Attributes:
        key: unique within the dataset, stable; becomes the row's `key` in every stage.
        image: the encoded image as upstream stores it.
        caption: the caption where the archive carries it, else None (it then comes from annotations).
    """

    key: str
    image: bytes
    caption: str | None = None


@dataclass(frozen=True)
class Rejected:
    """One sample of an archive that is not kept, and why (`core.ledger.Reason`)."""

    key: str
    reason: str


@dataclass(frozen=True)
class OrphanCaption:
    """A caption in an archive that has no image of this key; counted, but no sample."""

    key: str


SampleReader = Callable[[str, Iterator[Member]], Iterator[Sample | Rejected | OrphanCaption]]
"""(archive ID, its members in order) -> its samples in order. Members that are no samples are skipped."""


@dataclass(frozen=True)
class Caption:
    """One row of an annotations file: the caption of one sample.

    Attributes:
        archive: the ID of the archive that holds the sample; empty where the file does not tell, and then the
            source has `number_of`.
        key: the sample's key, spelled as the dataset's reader spells it; without `archive/` where that is not told.
        text: the caption as upstream spells it.
        unsafe: how unsafe for work the sample is, as float32; the worst of several scores, NaN where one is absent.
            None in a dataset without scores.
    """

    archive: str
    key: str
    text: str
    unsafe: float | None = None


@dataclass(frozen=True)
class AnnotationSource:
    """A file of captions outside the archives, indexed once.

    Attributes:
        name: the stem of the index below `<ds>/annotations/`; for a dataset with splits the split's name.
        file: where it lies.
        columns: the fields that every row must have; a row without one counts as broken, and a file in
            whose first 1,000 rows no row has it is refused.
        parse: one row as a `Caption`; raises KeyError, TypeError or ValueError for a broken row.
        format: what the file is.
        member: the file inside the container, where it holds several.
        number_of: where rows do not tell their archive: a key (of a sample, or of a `Caption`) -> the sample's number,
            by which the index is ordered. Numbers of an archive lie close together. Raises ValueError.
        first_of_several: whether a sample may have several captions, of which the first is taken.
        scored: whether rows have `Caption.unsafe`.
    """

    name: str
    file: Address
    columns: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Caption]
    format: AnnotationFormat = "json_lines"
    member: str = ""
    number_of: Callable[[str], int] | None = None
    first_of_several: bool = False
    scored: bool = False


@dataclass(frozen=True)
class ParquetLayout:
    """How samples lie in a parquet archive.

    Attributes:
        image: the column with the encoded image: a struct with `bytes` (and `path`), or plain bytes.
        name: the column that names the sample uniquely in its file.
        others: further columns that the reader is given.
    """

    image: str
    name: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subset:
    """A part of a dataset with shards of its own, selected from those of the whole and never encoded again.

    Attributes:
        name: in asset keys and paths, e.g. `minres512` in `mds_minres512`.
        min_edge_px: the smaller edge, before any resizing, that an image of the subset has at least.
    """

    name: str
    min_edge_px: int


@dataclass(frozen=True)
class RawOnly:
    """Something that a dataset has besides its archives and that is only fetched: a test split, for instance.

    Attributes:
        name: its path below `<ds>/raw/`, e.g. `test/imgs`; of an archive without suffix.
        file: where it lies.
        what: one line for people.
        images: whether it is an archive of images, kept like any other's. Otherwise it is one JSON-lines file in a
            tar, which is published as it is, unpacked.
    """

    name: str
    file: Address
    what: str
    images: bool

    @property
    def asset(self) -> str:
        """The last part of its asset's key, which all of one folder share: `raw_test` for `test/imgs`."""
        return f"raw_{self.name.partition('/')[0]}"


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset as the platform sees it.

    Attributes:
        slug: its name everywhere: module, asset-key prefix, group, directory, command-line argument.
        title: its name for people.
        datasheet: the dataset module's docstring; shown in the UI.
        archives: all archive IDs in upstream's order, with the split in front where there are splits.
        archive_format: the container of an archive.
        locate: archive ID -> where that archive lies.
        read_samples: how samples are read from an archive.
        annotations: captions outside the archives; empty where the archives carry them.
        splits: the splits, each of which gets merged indexes of its own; empty for a single one.
        small: the IDs of the ~1 % subset for trying things out.
        parquet: how samples lie in an archive, where archives are parquet files.
        caption_cleaning: how captions are cleaned when shards are made: not at all, or as DeepFloyd-IF does it.
        subsets: parts that get shards and merged indexes of their own.
        raw_only: what is fetched beside the archives.
    """

    slug: str
    title: str
    datasheet: str
    archives: tuple[str, ...]
    archive_format: ArchiveFormat
    locate: Callable[[str], Address]
    read_samples: SampleReader
    annotations: tuple[AnnotationSource, ...] = ()
    splits: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    parquet: ParquetLayout | None = None
    caption_cleaning: Literal["", "deepfloyd"] = ""
    subsets: tuple[Subset, ...] = ()
    raw_only: tuple[RawOnly, ...] = ()

    @property
    def scored(self) -> bool:
        """Whether samples have safety scores, which `safety_threshold` judges."""
        return any(source.scored for source in self.annotations)

    def split_of(self, archive: str) -> str:
        """The split that `archive` belongs to; empty for a dataset without splits."""
        return archive.partition("/")[0] if self.splits else ""

    def annotation_of(self, archive: str) -> AnnotationSource | None:
        """The annotations file that covers `archive`, None where the archives carry their captions."""
        for source in self.annotations:
            if not self.splits or source.name == self.split_of(archive):
                return source
        return None
