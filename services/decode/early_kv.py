"""KV that came before its announcement: two links are not ordered with each other. Pure.

Kept for a moment and within bounds, because nothing proves yet that a router wants it. What is dropped here is missing
later, and the attempt is refused then.
"""

from collections.abc import Sequence

from common.ids import RequestId
from common.messages import KvHandoff, KvPart

KEPT_S = 1.0
MAX_KEPT = 256
MAX_BYTES = 64 << 20

Frames = Sequence[memoryview]
_Key = tuple[RequestId, int, int]


class EarlyKv:
    def __init__(self) -> None:
        # (request, attempt, number): in order of arrival.
        self._kept: dict[_Key, tuple[KvPart | KvHandoff, Frames, float]] = {}
        self._num_kept = 0
        self.num_bytes = self.num_dropped = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, message: KvPart | KvHandoff, frames: Frames, now: float) -> None:
        self._num_kept += 1
        self._kept[message.request, message.attempt, self._num_kept] = (message, frames, now)
        self.num_bytes += _num_bytes(frames)
        while len(self._kept) > MAX_KEPT or (self.num_bytes > MAX_BYTES and len(self._kept) > 1):
            self._drop_oldest()

    def take(self, request: RequestId, attempt: int) -> list[tuple[KvPart | KvHandoff, Frames]]:
        """All of that attempt, in the order in which it came."""
        keys = [key for key in self._kept if key[:2] == (request, attempt)]
        return [self._remove(key)[:2] for key in keys]

    def on_tick(self, now: float) -> None:
        while self._kept and next(iter(self._kept.values()))[2] < now - KEPT_S:
            self._drop_oldest()

    def clear(self) -> None:
        self._kept.clear()
        self.num_bytes = 0

    def _drop_oldest(self) -> None:
        self._remove(next(iter(self._kept)))
        self.num_dropped += 1

    def _remove(self, key: _Key) -> tuple[KvPart | KvHandoff, Frames, float]:
        kept = self._kept.pop(key)
        self.num_bytes -= _num_bytes(kept[1])
        return kept


def _num_bytes(frames: Frames) -> int:
    return sum(frame.nbytes for frame in frames)
