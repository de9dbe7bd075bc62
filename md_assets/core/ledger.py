"""The ledger: what happened to every sample of one archive in one stage, exactly.

Here: its fields, its balance, its JSON form. Not here: writing it (`storage.publish`), showing it
(`orchestration.metadata`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from md_assets.core.errors import MdAssetsError
from md_assets.core.settings import fingerprint


class Reason:
    """Why a sample is rejected: stable words for ledgers, tables and statistics."""

    TOO_SMALL = "too_small"
    TOO_LARGE = "too_large"
    UNDECODABLE = "undecodable"
    NO_CAPTION = "no_caption"
    DUPLICATE_KEY = "duplicate_key"
    UNSAFE_MEMBER = "unsafe_member"
    UNREADABLE_MEMBER = "unreadable_member"
    NSFW = "nsfw"
    FURTHER_CAPTION = "further_caption"
    NOT_IN_SUBSET = "not_in_subset"
    NOT_FINITE = "not_finite"


@dataclass(frozen=True)
class OutputFile:
    """A published file: its path relative to the stage's directory, size, and lower-case hex sha256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Pruned:
    """The mark of an archive whose data were removed on purpose; its accounting stays.

    Attributes:
        at: when, ISO 8601 in UTC.
        bytes_freed: size of what was removed.
    """

    at: str
    bytes_freed: int


@dataclass(frozen=True)
class Ledger:
    """One archive in one stage.

    Attributes:
        dataset, archive, stage: which one. `stage` is `annotations` for a caption index.
        read: samples that the stage was given.
        kept: samples that it published.
        rejected: reason -> keys of the samples that it did not publish, in archive order.
        bytes_in, bytes_out: bytes of the data read and published.
        seconds: wall time of the stage for this archive.
        source: of the archive itself, handed down through all stages: `name`, `content_id`, `revision`.
        inputs: input name -> content id of what this stage read; together with the fingerprint it decides
            whether the archive is current.
        settings: every setting that decides the stored bytes.
        versions: package -> version of the software that decides them.
        files: what was published.
        details: further facts of the stage, e.g. `orphan_captions` or the latents' shapes.
        pruned: set once the data were removed; nothing else changes then, so that what was made of them stays current.
    """

    dataset: str
    archive: str
    stage: str
    read: int
    kept: int
    rejected: dict[str, list[str]]
    bytes_in: int
    bytes_out: int
    seconds: float
    source: dict[str, str]
    inputs: dict[str, str]
    settings: dict[str, Any]
    versions: dict[str, str]
    files: tuple[OutputFile, ...]
    details: dict[str, Any] = field(default_factory=dict)
    pruned: Pruned | None = None

    @property
    def fingerprint(self) -> str:
        """Changes when a setting does; archives of different fingerprints are never merged."""
        return fingerprint(self.settings)

    @property
    def rejected_count(self) -> int:
        return sum(len(keys) for keys in self.rejected.values())

    @property
    def balances(self) -> bool:
        """Whether every sample read was either kept or rejected."""
        return self.read == self.kept + self.rejected_count

    @property
    def content_id(self) -> str:
        """Changes when what the next stage reads does: the published files and the rejected keys."""
        content = {
            "files": [[f.path, f.bytes, f.sha256] for f in self.files],
            "rejected": self.rejected,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def is_current(self, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> bool:
        """Whether the archive was made from these inputs with these settings.

        An empty content id, of a source that does not tell it beforehand, counts as the one that was read.
        """
        same = all(self.inputs.get(name) == content_id for name, content_id in inputs.items() if content_id)
        return same and self.inputs.keys() == inputs.keys() and self.fingerprint == fingerprint(settings)

    def to_json(self) -> str:
        """The file's text; reading it back gives an equal ledger."""
        body = asdict(self)
        body["files"] = [asdict(f) for f in self.files]
        ordered = {"dataset": self.dataset, "archive": self.archive, "stage": self.stage}
        ordered |= {"fingerprint": self.fingerprint, "content_id": self.content_id}
        return json.dumps({**ordered, **body}, indent=1, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Ledger:
        """Parse a ledger.

        Args:
            text: the file's text.
            where: what to call the file in an error.

        Raises:
            MdAssetsError: the text is no ledger, or what it says of itself is not true.
        """
        try:
            body = json.loads(text)
            said_fingerprint, said_content_id = body.pop("fingerprint"), body.pop("content_id")
            body["files"] = tuple(OutputFile(**f) for f in body["files"])
            body["pruned"] = Pruned(**pruned) if (pruned := body.get("pruned")) else None
            ledger = cls(**body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MdAssetsError(f"{where} is no ledger: {error}", "Delete it and run the archive again.") from error
        if (ledger.fingerprint, ledger.content_id) != (said_fingerprint, said_content_id):
            raise MdAssetsError(f"{where} was edited after it was written", "Delete it and run the archive again.")
        return ledger


@dataclass(frozen=True)
class LedgerNumbers:
    """What statistics need of a ledger, read at a fraction of the cost: nothing that it says of itself is recomputed.

    Attributes:
        rejected: reason -> samples.
        files: path relative to the stage's directory -> bytes.
        settings: those of the ledger, which `fingerprint` stands for.

    The others are as in `Ledger`.
    """

    archive: str
    fingerprint: str
    content_id: str
    read: int
    kept: int
    rejected: dict[str, int]
    bytes_out: int
    seconds: float
    inputs: dict[str, str]
    settings: dict[str, Any]
    files: dict[str, int]
    details: dict[str, Any]
    pruned: Pruned | None

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> LedgerNumbers:
        """Parse a ledger; see `Ledger.from_json`, which also finds what was edited in it."""
        try:
            body = json.loads(text)
            return cls(
                archive=body["archive"],
                fingerprint=body["fingerprint"],
                content_id=body["content_id"],
                read=body["read"],
                kept=body["kept"],
                rejected={reason: len(keys) for reason, keys in body["rejected"].items()},
                bytes_out=body["bytes_out"],
                seconds=body["seconds"],
                inputs=body["inputs"],
                settings=body["settings"],
                files={file["path"]: file["bytes"] for file in body["files"]},
                details=body["details"],
                pruned=Pruned(**pruned) if (pruned := body.get("pruned")) else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MdAssetsError(f"{where} is no ledger: {error}", "Delete it and run the archive again.") from error
