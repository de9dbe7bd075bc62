"""Names that come from archives, made safe, and the sample keys that follow from them.

Here: text to text. Not here: reading archives, see `storage.archives`.
"""

from __future__ import annotations

from collections.abc import Sequence

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Endings, in lower case, that a sample's key is given without."""


def safe_name(name: str) -> str | None:
    """A member's name as a harmless relative path, or None where it leads outside.

    Args:
        name: as the archive spells it; bytes that are not UTF-8 as surrogates (`surrogateescape`).

    Returns: the name without `.` and empty parts, with control characters, line ends, backslashes, `%` and
        undecodable bytes percent-encoded, so different names stay different. None for an absolute
        name, one with `..`, and one with nothing left.
    """
    if name.startswith("/"):
        return None
    parts = _parts(name)
    if not parts or ".." in parts:
        return None
    return "/".join(map(_safe_part, parts))


def refused_name(name: str) -> str:
    """What to call a member whose name `safe_name` refuses.

    Args:
        name: as `safe_name` takes it.

    Returns: a harmless relative path: `..` and a leading `/` are percent-encoded too, so that no safe name is like it
        and different names stay different.
    """
    spelled = "/".join("%2E%2E" if part == ".." else _safe_part(part) for part in _parts(name))
    return f"%2F{spelled}" if name.startswith("/") else spelled or "%2E"


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _safe_part(part: str) -> str:
    if part.isprintable() and "%" not in part and "\\" not in part:
        return part  # nearly always, in a fraction of the time
    return "".join(map(_safe_character, part))


def _safe_character(character: str) -> str:
    if character.isprintable() and character not in "%\\":
        return character
    return _percent_encoded(character)


def _percent_encoded(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def sample_key(archive: str, name: str) -> str:
    """The key of a sample: its archive's ID and its own name, so it is unique within the dataset.

    Args:
        archive: the archive's ID, e.g. `train/000`.
        name: the member's safe name inside the archive. A leading folder called like the archive
            (`000/` in `train/000`) says nothing more and is left out.

    Returns: e.g. `train/000/0a1b2c`: without image suffix, and with dots percent-encoded, because
        WebDataset ends a key at the first dot.
    """
    folder, slash, rest = name.partition("/")
    if slash and folder == archive.rpartition("/")[2]:
        name = rest
    stem, dot, suffix = name.rpartition(".")
    if dot and stem and f".{suffix.lower()}" in IMAGE_SUFFIXES:
        name = stem
    return f"{archive}/{name.replace('.', '%2E')}"


def first_of(names: Sequence[str], count: int = 3) -> str:
    """The first of many names, and how many more there are: `a, b, c and 9 more`."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
