"""KV that came before its announcement: two links are not ordered with each other. Pure.

Kept for a moment and within a bound, because nothing proves yet that a router wants it.
"""

from collections.abc import Sequence

from common.ids import RequestId
from common.messages import KvHandoff

KEPT_S = 1.0
MAX_KEPT = 64

Frames = Sequence[memoryview]


class EarlyKv:
    def __init__(self) -> None:
        self._kept: dict[tuple[RequestId, int], tuple[KvHandoff, Frames, float]] = {}
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, handoff: KvHandoff, frames: Frames, now: float) -> None:
        self._kept[handoff.request, handoff.attempt] = (handoff, frames, now)
        if len(self._kept) > MAX_KEPT:
            self._drop_oldest()

    def take(self, request: RequestId, attempt: int) -> tuple[KvHandoff, Frames] | None:
        found = self._kept.pop((request, attempt), None)
        return found[:2] if found else None

    def on_tick(self, now: float) -> None:
        while self._kept and next(iter(self._kept.values()))[2] < now - KEPT_S:
            self._drop_oldest()

    def clear(self) -> None:
        self._kept.clear()

    def _drop_oldest(self) -> None:
        del self._kept[next(iter(self._kept))]
        self.num_dropped += 1
