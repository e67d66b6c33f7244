"""Attempts that are over: what comes late for them is dropped. Pure, bounded.

When the oldest tombstone falls out, a late announcement could come to life again; its router does not know the attempt
any more and answers Abort, so the bound costs a little work and never a token.
"""

from common.ids import RequestId

MAX_TOMBSTONES = 8192


class Tombstones:
    def __init__(self) -> None:
        self._ended: dict[RequestId, int] = {}

    def __len__(self) -> int:
        return len(self._ended)

    def bury(self, request: RequestId, attempt: int) -> None:
        """``attempt`` and all earlier ones are over."""
        ended = max(attempt, self._ended.pop(request, attempt))
        self._ended[request] = ended
        if len(self._ended) > MAX_TOMBSTONES:
            del self._ended[next(iter(self._ended))]

    def covers(self, request: RequestId, attempt: int) -> bool:
        return attempt <= self._ended.get(request, attempt - 1)

    def clear(self) -> None:
        self._ended.clear()
