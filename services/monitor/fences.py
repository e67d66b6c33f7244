"""Makes sure that processes put out of the group end: SIGKILL through their agents, repeated until one has proof."""

from dataclasses import dataclass

from common.ids import ProcessId
from common.messages import Signal
from services.monitor.actions import Outbox
from services.monitor.processes import ProcessTable
from services.monitor.ticks import TickClock

_SEND_AGAIN_S = 1.0
# A KILL that was sent to a process which then left its slot by itself arrives within this time or not at all.
_SETTLED_S = 3.0
ID_PREFIX = "fence:"


@dataclass(slots=True)
class _Fence:
    since: float
    after_s: float
    to_the_end: bool
    sent_at: float | None = None
    num_sent: int = 0


class Fences:
    def __init__(self, table: ProcessTable, outbox: Outbox, clock: TickClock) -> None:
        self._table, self._outbox, self._clock = table, outbox, clock
        self._fences: dict[ProcessId, _Fence] = {}

    def __contains__(self, process: ProcessId) -> bool:
        return process in self._fences

    def put_up(self, process: ProcessId, now: float, after_s: float = 0.0, to_the_end: bool = False) -> None:
        """``after_s``: time that it has to leave its slot by itself. ``to_the_end``: that it left does not save it."""
        if process not in self._fences and process not in self._table.gone:
            self._fences[process] = _Fence(now, after_s, to_the_end)
            self._send_due(process, now)

    def on_left(self, process: ProcessId) -> None:
        """It gave its slot back: nothing of it is in the way any more."""
        if (fence := self._fences.get(process)) is not None and not fence.to_the_end:
            del self._fences[process]

    def on_gone(self, process: ProcessId) -> None:
        self._fences.pop(process, None)

    def on_tick(self, now: float) -> None:
        for process in list(self._fences):
            self._send_due(process, now)

    def may_get_slot(self, process: ProcessId, now: float) -> bool:
        """False while a KILL may be under way to it."""
        record = self._table.get(process)
        return process not in self._fences and (
            record is None or record.doomed_at is None or self._clock.elapsed(record.doomed_at, now) > _SETTLED_S
        )

    def _send_due(self, process: ProcessId, now: float) -> None:
        fence = self._fences[process]
        if self._clock.elapsed(fence.since, now) < fence.after_s:
            return
        if fence.sent_at is not None and now - fence.sent_at < _SEND_AGAIN_S:
            return
        agent = self._table.agent_of(process, now)
        if agent is None:
            return  # it may come back; until then the slot number stays unused
        fence.sent_at, fence.num_sent = now, fence.num_sent + 1
        if record := self._table.get(process):
            record.doomed_at = now
        # A number of its own each time: an agent that has given up on one request answers that one with the failure.
        signal = Signal(f"{ID_PREFIX}{process}:{fence.num_sent}", process, agent[1], "KILL")
        self._outbox.send(agent[0], signal)
