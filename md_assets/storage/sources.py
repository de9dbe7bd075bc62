"""Every source behind one door: where a file lies, and fetching it, whoever serves it.

Here: which client an address belongs to. Not here: the Hub (`storage.hub`), the transfer itself (`storage.http`).
"""

from __future__ import annotations

from pathlib import Path

from md_assets.core.source import Address, BytesProgress, HubFile, RemoteFile
from md_assets.storage.hub import HubClient


class Sources:
    """Locates and fetches files of any address; may be shared by threads.

    Args:
        hub: the Hub's client.
    """

    def __init__(self, hub: HubClient) -> None:
        self.hub = hub

    def locate(self, address: Address) -> RemoteFile:
        """The file as its source has it now.

        Raises:
            SourceError: it is not there, or the source does not answer.
        """
        if isinstance(address, HubFile):
            return self.hub.locate(address)
        raise NotImplementedError(address)

    def fetch(self, remote: RemoteFile, destination: Path, progress: BytesProgress | None = None) -> Path:
        """Fetches a file that `locate` gave and returns `destination`; resumes, may be repeated.

        Raises:
            SourceError: see `HubClient.fetch`.
        """
        return self.hub.fetch(remote, destination, progress)
