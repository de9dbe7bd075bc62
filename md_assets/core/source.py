"""What the stages know of a file at its source: where it is and which content it has.

Here: the values that pass between a source (the Hub, a plain web server) and the stages.
Not here: how bytes are fetched, see `storage.hub` and `storage.http`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

BytesProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while a file is being fetched."""


@dataclass(frozen=True)
class Checksum:
    """A digest that a source publishes of a file.

    Attributes:
        algorithm: a name that `hashlib.new` knows.
        hexdigest: lower-case hexadecimal.
    """

    algorithm: Literal["sha256", "md5"]
    hexdigest: str


@dataclass(frozen=True)
class HubFile:
    """The address of a file in a repository of the Hugging Face Hub.

    Attributes:
        repo: `organisation/name`.
        path: the file's path inside the repository, with `/`. Where upstream's exact name is not known beforehand
            it may hold `*` (any characters, `/` too): exactly one file of the repository must then match.
        repo_type: `dataset` or `model`.
    """

    repo: str
    path: str
    repo_type: Literal["dataset", "model"] = "dataset"


@dataclass(frozen=True)
class WebFile:
    """The address of a file on a plain web server.

    Attributes:
        path: below the base address, without leading `/`.
        base_variable: the environment variable that names another base address than the default one.
        default_base: the official base address.
        checksum: of the official file; not expected of another base's.
    """

    path: str
    base_variable: str
    default_base: str
    checksum: Checksum | None = None


@dataclass(frozen=True)
class LinkedFile:
    """The address of a file whose link stands in a list, because links are signed and expire.

    Attributes:
        name: the file's name in the list.
        list_variable: the environment variable with the file or URL of the list.
        mirror: where the file lies on the Hub; taken where the variable is not set.
    """

    name: str
    list_variable: str
    mirror: HubFile


Address: TypeAlias = "HubFile | WebFile | LinkedFile"


@dataclass(frozen=True)
class RemoteFile:
    """A file with one definite content at its source.

    Attributes:
        name: how messages call it, e.g. `JourneyDB/JourneyDB:data/train/imgs/000.tgz`.
        url: where the bytes are; on the Hub pinned to a commit, so they cannot change under a download.
        size_bytes: the size that the source announces, None where it announces none.
        checksum: what the bytes must hash to, None where the source publishes none.
        content_id: changes exactly when the content does: LFS sha256, git blob id, ETag or md5. Empty where the
            source does not tell before the file is fetched; what is published of it then counts as current.
        revision: the commit, or whatever names the version of the source as a whole; may be empty.
        via: who fetches it: `hub` (the Hub's client) or `web` (plain HTTP).
        expires_s: Unix time at which `url` expires, None for one that does not.
    """

    name: str
    url: str
    size_bytes: int | None
    checksum: Checksum | None
    content_id: str
    revision: str
    via: Literal["hub", "web"] = "hub"
    expires_s: float | None = None
