"""Plain TCP streams that the kernel closes when their process dies (docs/architecture.md, processes).

    never seen --opened--> OPEN --last connection closed--> CLOSED --opened again--> OPEN
                            |---last connection timed out--> never seen

A closed lifeline is a suspicion only: a process that reconnects opens the next one within moments. Whoever never
opened one to this monitor is not suspected at all, and neither is who has one that the network ended: the kernel of
that process has said nothing, so its silence is judged by its heartbeats.
"""

from common.ids import ProcessId
from services.monitor.ticks import TickClock


class Lifelines:
    def __init__(self, clock: TickClock, suspicion_s: float) -> None:
        self._clock, self._suspicion_s = clock, suspicion_s
        self._open: dict[ProcessId, set[int]] = {}
        self._closed_at: dict[ProcessId, float] = {}

    def on_opened(self, process: ProcessId, connection: int) -> None:
        self._open.setdefault(process, set()).add(connection)
        self._closed_at.pop(process, None)

    def on_closed(self, process: ProcessId, connection: int, now: float) -> None:
        connections = self._open.get(process, set())
        connections.discard(connection)
        if not connections and self._open.pop(process, None) is not None:
            self._closed_at[process] = now

    def on_timed_out(self, process: ProcessId, connection: int) -> None:
        """Nothing answers at the other end, nor refuses."""
        connections = self._open.get(process, set())
        connections.discard(connection)
        if not connections:
            self._open.pop(process, None)

    def is_open(self, process: ProcessId) -> bool:
        return process in self._open

    def forget(self, process: ProcessId) -> None:
        self._open.pop(process, None)
        self._closed_at.pop(process, None)

    def closed_at(self, process: ProcessId) -> float | None:
        return self._closed_at.get(process)

    def is_cut(self, process: ProcessId, now: float) -> bool:
        """Closed for longer than a reconnect takes."""
        closed_at = self._closed_at.get(process)
        return closed_at is not None and self._clock.elapsed(closed_at, now) >= self._suspicion_s

    def is_cut_for(self, process: ProcessId, seconds: float, now: float) -> bool:
        closed_at = self._closed_at.get(process)
        return closed_at is not None and self._clock.elapsed(closed_at, now) >= seconds
