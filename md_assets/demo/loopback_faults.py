"""What can be made to go wrong in a loopback server: refusals, cuts, stalls, slow or damaged answers.

Here: the list of faults to come and which request takes which. Not here: carrying them out, see
`demo.loopback_http`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

Place = Literal["listing", "resolve", "head", "body"]
"""`listing`: a repository's description or tree. `resolve`: the server's own answer for a file, HEAD or GET.
`head`: a web server's answer to HEAD only. `body`: the answer with the file's bytes, from the storage behind the Hub
for an LFS file."""


@dataclass
class Fault:
    """One way in which an answer differs from a good one.

    Attributes:
        glob: matched against `organisation/name/path` (`organisation/name` at a listing), on a web server against the
            path below its address; `*` includes `/`.
        place: which kind of request it befalls.
        times: how many requests more, None for all.
        status, headers: answer with this status and these headers instead.
        after_bytes: of this answer's body, when a cut or stall sets in.
        cut: close the connection then.
        stall_s: send nothing for so long then.
        bytes_per_s: send no faster.
        corrupt: send other bytes, same size.
        html: send an HTML page with status 200.
        ignore_range: send the whole file though a part was asked for.
        wrong_range: send the whole file as 206 with its true `Content-Range`, not the one asked for.
    """

    glob: str
    place: Place = "body"
    times: int | None = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    after_bytes: int = 0
    cut: bool = False
    stall_s: float = 0.0
    bytes_per_s: float | None = None
    corrupt: bool = False
    html: bool = False
    ignore_range: bool = False
    wrong_range: bool = False


class Faults:
    """The faults to come. A request takes the first that fits, so faults for one file befall it in turn."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        """Appends a fault of any kind; the methods below are its common forms."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """From now on all answers are good."""
        with self._lock:
            self._faults.clear()

    def pending(self) -> int:
        """How many faults with a limited number have not been used up."""
        with self._lock:
            return sum(fault.times is not None for fault in self._faults)

    def take(self, place: Place, name: str) -> Fault | None:
        """The fault for a request, counted down."""
        with self._lock:
            for fault in self._faults:
                if fault.place == place and fnmatchcase(name, fault.glob):
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times <= 0:
                            self._faults.remove(fault)
                    return fault
        return None

    def status(
        self,
        glob: str,
        status: int,
        headers: Mapping[str, str] | None = None,
        *,
        place: Place = "resolve",
        times: int | None = 1,
    ) -> None:
        """Answers with an error status, e.g. 429 with `{"RateLimit": '"resolvers";r=0;t=2'}`."""
        self.add(Fault(glob, place, times, status=status, headers=headers or {}))

    def cut(self, glob: str, after_bytes: int, *, times: int | None = 1) -> None:
        """Closes the connection after so many bytes of the body."""
        self.add(Fault(glob, times=times, after_bytes=after_bytes, cut=True))

    def stall(self, glob: str, stall_s: float, after_bytes: int = 0, *, times: int | None = 1) -> None:
        """Falls silent for `stall_s` after so many bytes of the body, then goes on."""
        self.add(Fault(glob, times=times, after_bytes=after_bytes, stall_s=stall_s))

    def throttle(self, glob: str, bytes_per_s: float, *, times: int | None = None) -> None:
        """Sends no faster than this."""
        self.add(Fault(glob, times=times, bytes_per_s=bytes_per_s))

    def corrupt(self, glob: str, *, times: int | None = 1) -> None:
        """Sends bytes other than those announced, as many."""
        self.add(Fault(glob, times=times, corrupt=True))

    def html(self, glob: str, *, place: Place = "body", times: int | None = 1) -> None:
        """Sends an HTML page with status 200."""
        self.add(Fault(glob, place, times, html=True))
