"""What happened, for people: the last events, each with its number in this monitor's life and its wall time."""

from collections import deque
from typing import Any

NUM_KEPT = 200


class EventLog:
    """``wall_offset_s`` turns the monotonic times of the state machines into wall time; the shell measures it once."""

    def __init__(self, wall_offset_s: float = 0.0) -> None:
        self._wall_offset_s = wall_offset_s
        self._num_recorded = 0
        self._kept: deque[dict[str, Any]] = deque(maxlen=NUM_KEPT)

    def wall(self, now: float) -> float:
        return round(now + self._wall_offset_s, 4)

    def record(self, kind: str, now: float, fields: dict[str, object]) -> dict[str, Any]:
        self._num_recorded += 1
        event = {"type": "event", "seq": self._num_recorded, "time": self.wall(now), "kind": kind, **fields}
        self._kept.append(event)
        return event

    def kept(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return list(self._kept)
