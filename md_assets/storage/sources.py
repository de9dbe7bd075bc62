"""Every source behind one door: where a file lies, and fetching it, whoever serves it.

Here: which client an address belongs to. Not here: the Hub (`storage.hub`), web servers (`storage.web`), lists of links
(`storage.links`), the transfer itself (`storage.http`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from md_assets.core.errors import SourceError
from md_assets.core.source import Address, BytesProgress, HubFile, LinkedFile, RemoteFile
from md_assets.storage.hub import HubClient
from md_assets.storage.links import LinkLists, expiry_error
from md_assets.storage.web import WebClient

if TYPE_CHECKING:
    import requests


class Sources:
    """Locates and fetches files of any address; may be shared by threads. Make one for each run.

    Args:
        hub: the Hub's client, whose policy holds for the others too.

    Attributes:
        lists: the lists of links.
    """

    def __init__(self, hub: HubClient) -> None:
        self.hub = hub
        self._web = WebClient(hub.policy)
        self.lists = LinkLists(self._web)

    def locate(self, address: Address) -> RemoteFile:
        """The file as its source has it now. Each listing, list of links and file of a web server is asked for once.

        A link is given even if it has expired: what is published already needs none. `fetch` refuses it.

        Raises:
            SettingsError: the environment variable of a web server or list of links is wrong.
            SourceError: it is not there, or the source does not answer.
        """
        address = self._in_effect(address)
        if isinstance(address, HubFile):
            return self.hub.locate(address)
        return self.lists.locate(address) if isinstance(address, LinkedFile) else self._web.locate(address)

    def _in_effect(self, address: Address) -> Address:
        """The mirror's address instead of a linked file's where no list of links is set."""
        if isinstance(address, LinkedFile) and self.lists.links(address.list_variable) is None:
            return address.mirror
        return address

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> RemoteFile:
        """Fetches a file that `locate` gave, and returns it as it turned out, with size and content id.

        Resumes, may be repeated.

        Raises:
            SourceError: reason `link_expired`, before any request or when the server refuses a link that expired
                meanwhile; else see `HubClient.fetch` and `storage.http.download`.
        """
        if remote.via == "hub":
            return self.hub.fetch(remote, destination, progress)
        if error := expiry_error(remote):
            raise error

        def explain(response: requests.Response) -> SourceError | None:
            return expiry_error(remote) if response.status_code in (401, 403, 410) else None

        return self._web.fetch(remote, destination, progress, explain)

    def content_ids(self, addresses: Mapping[str, Address]) -> tuple[dict[str, str], list[str]]:
        """The content id of each file that its source has, and the keys of those that are absent.

        A source that tells no content id before a file is fetched gives the file's name.

        Raises:
            SettingsError, SourceError: as `locate` does, but for files that are not there; a repository must be.
        """
        in_effect = map(self._in_effect, addresses.values())
        for repo, repo_type in {(file.repo, file.repo_type) for file in in_effect if isinstance(file, HubFile)}:
            self.hub.listing(repo, repo_type)
        ids: dict[str, str] = {}
        absent: list[str] = []
        for key, address in addresses.items():
            try:
                remote = self.locate(address)
            except SourceError as error:
                if error.reason != "not_found":
                    raise
                absent.append(key)
            else:
                ids[key] = remote.content_id or remote.name.rpartition(":")[2].rpartition("/")[2]
        return ids, absent
