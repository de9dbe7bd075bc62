"""What one dataset is: the four things that vary, and nothing else.

Here: `DatasetSpec` and the values that pass between an archive, a dataset's reader and the stages.
Not here: any dataset (see `datasets/`), and any I/O: a reader receives members that `storage.archives`
opened, so it never sees a path or a file handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from md_assets.core.source import HubFile

ArchiveFormat = Literal["tar", "zip", "parquet"]


@dataclass(frozen=True)
class Member:
    """One entry of an archive, or why it cannot be one.

    Attributes:
        name: the entry's name with `/`, relative, without `.` and `..`, everything else percent-encoded
            where it could harm (control characters, bytes that are not UTF-8); unique names stay unique.
        data: the entry's bytes; empty when `refused`.
        refused: a reason (`core.ledger.Reason`) when the entry must not be read: a link, a device, a name
            that leads outside, more bytes than the limit. None for a usable entry.
    """

    name: str
    data: bytes
    refused: str | None = None


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


SampleReader = Callable[[str, Iterator[Member]], Iterator[Sample | Rejected]]
"""(archive ID, its members in order) -> its samples in order. Members that are no samples are skipped."""


@dataclass(frozen=True)
class Caption:
    """One row of an annotations file: the caption of one sample.

    Attributes:
        archive: the ID of the archive that holds the sample.
        key: the sample's key, spelled as the dataset's reader spells it.
        text: the caption as upstream spells it.
    """

    archive: str
    key: str
    text: str


@dataclass(frozen=True)
class AnnotationSource:
    """A file of captions outside the archives, indexed once.

    Attributes:
        name: the stem of the index below `<ds>/annotations/`; for a dataset with splits the split's name.
        file: where it lies on the Hub: a tar (compressed or not) that holds one JSON-lines file.
        columns: the fields that every row must have; a row without one counts as broken, and a file in
            whose first 1,000 rows no row has it is refused.
        parse: one row as a `Caption`; raises KeyError, TypeError or ValueError for a broken row.
    """

    name: str
    file: HubFile
    columns: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Caption]


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
    """

    slug: str
    title: str
    datasheet: str
    archives: tuple[str, ...]
    archive_format: ArchiveFormat
    locate: Callable[[str], HubFile]
    read_samples: SampleReader
    annotations: tuple[AnnotationSource, ...] = ()
    splits: tuple[str, ...] = ()
    small: tuple[str, ...] = field(default=())

    def split_of(self, archive: str) -> str:
        """The split that `archive` belongs to; empty for a dataset without splits."""
        return archive.partition("/")[0] if self.splits else ""

    def annotation_of(self, archive: str) -> AnnotationSource | None:
        """The annotations file that covers `archive`, None where the archives carry their captions."""
        for source in self.annotations:
            if not self.splits or source.name == self.split_of(archive):
                return source
        return None
