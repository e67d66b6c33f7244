"""Newcomers that cannot reach everybody: found while a view is prepared, and kept from trying again at once (PROTOCOL
4.4). Pure.

A newcomer has written its first header into all members' heaps when it misses that of others and no longer its own. If
somebody has not found it there for adopt_timeout_s after that, the path between the two is broken: it would hold up
all who join with it, and, half in, the members too. It ends and comes back, with connections of its own, but not at
once: each failure in a row doubles the time until a process of its name gets a slot again.
"""

from collections import Counter

from common.config import MonitorConfig
from common.ids import ProcessId
from common.messages import View
from services.monitor.actions import Outbox
from services.monitor.failure_detector import Suspect
from services.monitor.prepared_view import PreparedView
from services.monitor.processes import ProcessTable
from services.monitor.ticks import TickClock

_LONGEST_PAUSE_S = 300.0

Gaps = frozenset[tuple[ProcessId, ProcessId]]  # (who misses, whose first header)


class JoinPaths:
    def __init__(self, config: MonitorConfig, table: ProcessTable, outbox: Outbox, clock: TickClock) -> None:
        self._config, self._table, self._outbox, self._clock = config, table, outbox, clock
        # Epoch prepared, gaps, since when these and no others.
        self._seen: tuple[int, Gaps, float] = (0, frozenset(), 0.0)
        self._pauses: dict[str, tuple[int, float, float]] = {}  # by name: failures in a row, the last one, how long

    def unreached(self, prepared: PreparedView | None, now: float) -> Suspect | None:
        """The newcomer with most broken paths. To be called at every tick: it compares with the ticks before."""
        gaps = _gaps(prepared, self._table) if prepared else frozenset()
        epoch = prepared.view.epoch if prepared else 0
        if not gaps or (epoch, gaps) != self._seen[:2]:
            self._seen = epoch, gaps, now
        assert prepared is not None or not gaps
        since = self._seen[2]
        if prepared is None or not gaps or self._clock.elapsed(since, now) <= self._config.adopt_timeout_s:
            return None
        in_gaps = Counter(process for gap in gaps for process in gap if process in prepared.newcomers)
        missed = Counter(process for _, process in gaps)
        worst = max(in_gaps, key=lambda process: (in_gaps[process], missed[process], process))
        ranks = {member.process: member.rank for member in prepared.view.members}
        others = sorted({ranks[process] for gap in gaps if worst in gap for process in gap if process != worst})
        return Suspect(worst, f"the path between it and ranks {others} is broken", since)

    def on_failed(self, process: ProcessId, now: float) -> None:
        """It was put out although it is there, and tells what it waits for."""
        record = self._table.get(process)
        if record is None or self._table.silence_s(record, now) > self._config.heartbeat_timeout_s:
            return
        name = record.hello.name
        number = self._pauses.get(name, (0, 0.0, 0.0))[0] + 1
        pause_s = min(_LONGEST_PAUSE_S, self._config.adopt_timeout_s * 2**number)
        self._pauses[name] = number, now, pause_s
        self._outbox.emit("join_paused", now, name=name, process=process, failures=number, pause_s=pause_s)

    def on_in_force(self, view: View) -> None:
        """All of its members reach each other."""
        for member in view.members:
            if (record := self._table.get(member.process)) is not None:
                self._pauses.pop(record.hello.name, None)

    def has_failed(self, process: ProcessId) -> bool:
        """The last time that it, or a former life of it, was to join."""
        record = self._table.get(process)
        return record is not None and record.hello.name in self._pauses

    def may_try(self, name: str, now: float) -> bool:
        _, failed_at, pause_s = self._pauses.get(name, (0, 0.0, 0.0))
        return not pause_s or self._clock.elapsed(failed_at, now) > pause_s


def _gaps(prepared: PreparedView, table: ProcessTable) -> Gaps:
    """Those that cannot be for lack of time: of newcomers that have announced themselves to all."""
    process_of: dict[int, ProcessId] = {member.rank: member.process for member in prepared.view.members}
    missed_by: dict[ProcessId, set[ProcessId]] = {}
    for member in prepared.view.members:
        record = table.get(member.process)
        missed_by[member.process] = {process_of[r] for r in record.beat.misses if r in process_of} if record else set()
    announced = {process for process in prepared.newcomers if missed_by[process] and process not in missed_by[process]}
    return frozenset(
        (process, missed) for process, all_missed in missed_by.items() for missed in all_missed & announced
    )
