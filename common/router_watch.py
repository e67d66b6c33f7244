"""Which routers are gone for good, so that nobody computes on for clients that nobody can reach. Pure.

The directory is the judge, but one without any router says nothing. A router may be missing in it for a moment, while
it or the monitor starts anew, so only a long absence counts, in which the router itself says nothing either: it may
have lost the monitor alone. A router that was only stopped finds its requests unknown here, and places them again.
"""

from collections.abc import Collection

from common.ids import ProcessId
from common.messages import Directory


class RouterWatch:
    """``patience_s``: how long a router may be missing."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._listed: frozenset[ProcessId] = frozenset()
        self._version = (0, 0)
        self._missing_since: dict[ProcessId, float] = {}

    def on_directory(self, directory: Directory) -> None:
        version = (directory.term, directory.version)
        if version >= self._version:
            self._version = version
            self._listed = frozenset(worker.process for worker in directory.of_kind("router"))

    def on_word(self, router: ProcessId) -> None:
        """Of anybody; from a router it means that it lives."""
        self._missing_since.pop(router, None)

    def lost(self, routers: Collection[ProcessId], now: float) -> frozenset[ProcessId]:
        """Those of ``routers``, which are all that have requests here, that have been missing for long enough. What one
        of them asks for later is given as much time again."""
        missing = [router for router in routers if self._listed and router not in self._listed]
        self._missing_since = {router: self._missing_since.get(router, now) for router in missing}
        lost = frozenset(r for r, since in self._missing_since.items() if now - since >= self._patience_s)
        self._missing_since = {router: since for router, since in self._missing_since.items() if router not in lost}
        return lost
