"""Lists of signed links: reading one, and when its links expire.

Here: the list's format, and what an expired link means. Not here: fetching what a link leads to, see `storage.web`.
"""

from __future__ import annotations

import csv
import io
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from md_assets.core.errors import SettingsError, SourceError
from md_assets.core.source import LinkedFile, RemoteFile
from md_assets.storage.http import redact_url
from md_assets.storage.web import WebClient

COLUMNS = ("file_name", "cdn_link")
"""Of SA-1B's list, https://ai.meta.com/datasets/segment-anything-downloads/."""

LIST_BYTES = 64 * 2**20
"""A longer file is no list; 1,000 signed links have about 0.5 MB."""

NEVER = float("inf")


@dataclass(frozen=True)
class Link:
    """One row of a list.

    Attributes:
        url: signed, so not to be shown.
        expires_s: Unix time, None where the address does not tell.
    """

    url: str = field(repr=False)
    expires_s: float | None


class LinkLists:
    """The link lists that environment variables name; each is read once. May be shared by threads.

    Args:
        web: fetches lists that are addresses.
    """

    def __init__(self, web: WebClient) -> None:
        self._web = web
        self._lists: dict[str, Mapping[str, Link]] = {}
        self._lock = threading.Lock()

    def links(self, variable: str) -> Mapping[str, Link] | None:
        """The list that `variable` names, by file name; None where it is not set.

        Raises:
            SettingsError: what it names cannot be read, or is no list of links.
            SourceError: its address does not answer.
        """
        place = os.environ.get(variable)
        if not place:
            return None
        with self._lock:
            if place not in self._lists:
                self._lists[place] = self._read(variable, place)
            return self._lists[place]

    def locate(self, file: LinkedFile) -> RemoteFile:
        """A file by its link, expired or not; nothing is asked but the list.

        Raises:
            SourceError: reason `not_found` if the list has no link for it, or none is set; else as `links`.
        """
        links = self.links(file.list_variable) or {}
        name = f"{file.list_variable}:{file.name}"
        if file.name not in links:
            raise SourceError(
                f"{name}: the list of links has {len(links)}, but none for this file",
                f"Get a new list from the dataset's page and set {file.list_variable} to it",
                reason="not_found",
                transient=False,
            )
        link = links[file.name]
        return RemoteFile(name, link.url, None, None, "", "", via="web", expires_s=link.expires_s)

    def _read(self, variable: str, place: str) -> Mapping[str, Link]:
        is_address = place.startswith(("http://", "https://"))
        name = f"{variable} ({redact_url(place) if is_address else place})"
        if is_address:
            return parse_links(self._web.read(place, name, LIST_BYTES), name)
        try:
            with Path(place).expanduser().open("rb") as file:
                return parse_links(file.read(LIST_BYTES), name)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise SettingsError(
                f"{name}: the list of links cannot be read: {why}",
                f"Set {variable} to the file or the address of the list, or unset it",
            ) from error


def parse_links(content: bytes, name: str) -> dict[str, Link]:
    """The links of a list by file name. Of several for one file the one that expires last counts.

    Args:
        content: tab-separated, with the header `file_name`, `cdn_link`, in any order and with any other columns.
            Rows without name, or without an http or https address, are left out.
        name: what messages call the list.

    Raises:
        SettingsError: it is none.
    """
    text = content.decode("utf-8-sig", "replace")
    # No line is quoted in a message: it may hold a signed link.
    remedy = "It must be the tab-separated list of the dataset's page, with its first line; get it anew"
    if text.lstrip()[:1] == "<":
        raise SettingsError(f"{name}: it is a web page, not a list of links", remedy)
    found: dict[str, Link] = {}
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
        header = [title.strip() for title in next(rows, [])]
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            raise SettingsError(f"{name}: its first line does not name the column {' and '.join(missing)}", remedy)
        name_at, link_at = (header.index(column) for column in COLUMNS)
        for row in rows:
            cells = [cell.strip() for cell in row] + [""] * len(header)
            link = _link(cells[link_at])
            if link is None or not cells[name_at]:
                continue
            known = found.get(cells[name_at])
            if known is None or _lasts_s(link) > _lasts_s(known):
                found[cells[name_at]] = link
    except csv.Error as error:
        raise SettingsError(f"{name}: it is no tab-separated list: {error}", remedy) from error
    return found


def _link(address: str) -> Link | None:
    try:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return None
        (expiry,) = parse_qs(parts.query).get("oe", [""])[:1]
    except ValueError:
        return None
    return Link(address, float(int(expiry, 16)) if re.fullmatch("[0-9A-Fa-f]{1,8}", expiry) else None)


def _lasts_s(link: Link) -> float:
    return NEVER if link.expires_s is None else link.expires_s


def expiry_error(remote: RemoteFile) -> SourceError | None:
    """The error for a file whose link has expired, None for any other."""
    if remote.expires_s is None or remote.expires_s > time.time():
        return None
    variable = remote.name.partition(":")[0]
    return SourceError(
        f"{remote.name}: its link expired at {time_text(remote.expires_s)}",
        f"Get a new list of links from the dataset's page and set {variable} to it; what is done stays done",
        reason="link_expired",
        transient=False,
    )


def time_text(time_s: float) -> str:
    """A Unix time for people, to the minute, e.g. `2026-11-30 12:00 UTC`."""
    return f"{datetime.fromtimestamp(time_s, timezone.utc):%Y-%m-%d %H:%M} UTC"
