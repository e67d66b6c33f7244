"""Evidence against members of the current view that heartbeats, or their lack, give. Pure; decides nothing.

silent     nothing heard for heartbeat_timeout_s of the monitor's own on-time ticks
stuck      heartbeats come, but no progress for that long while another member waits for this one
behind     the published view's epoch not reported, and no progress made, within adopt_timeout_s: who loads repaired
           experts makes progress, and gets up to prepare_timeout_s
half in    some have entered the prepared view, so that all were ready; for adopt_timeout_s nobody has followed, and who
           is missing has made no progress: a first header was lost on its way
"""

from dataclasses import dataclass

from common.config import MonitorConfig
from common.ids import ProcessId
from common.messages import Member, View
from services.monitor.prepared_view import PreparedView
from services.monitor.processes import ProcessTable, reports
from services.monitor.ticks import TickClock


@dataclass(frozen=True, slots=True)
class Suspect:
    process: ProcessId
    evidence: str
    since: float


class FailureDetector:
    def __init__(self, config: MonitorConfig, table: ProcessTable, clock: TickClock) -> None:
        self._config, self._table, self._clock = config, table, clock
        self._standstill: dict[ProcessId, tuple[int, float]] = {}  # of awaited members: progress, and since when
        self._adopting: dict[ProcessId, tuple[int, float]] = {}  # of members that are behind: the same
        self._entering: tuple[tuple[tuple[ProcessId, int], ...], float] | None = None  # of who is not in: the same

    def silent(self, view: View, now: float) -> list[Suspect]:
        found = []
        for member in view.members:
            process = self._table.get(member.process)
            if process is not None and self._table.silence_s(process, now) > self._config.heartbeat_timeout_s:
                silence_s = self._table.silence_s(process, now)
                found.append(Suspect(member.process, f"no heartbeat for {silence_s:.1f} s", process.heard_at))
        return found

    def behind(self, view: View, published_at: float, now: float) -> list[Suspect]:
        """To be called at every tick: it compares with what was seen at the ticks before."""
        found = []
        for member in view.members:
            if self.has_adopted(member, view):
                continue
            process = self._table.get(member.process)
            progress = process.beat.progress if process else -1
            last, since = self._adopting.get(member.process, (progress, published_at))
            if progress != last:
                since = now
            self._adopting[member.process] = (progress, since)
            late = self._clock.elapsed(since, now) > self._config.adopt_timeout_s
            if late or self._clock.elapsed(published_at, now) > self._config.prepare_timeout_s:
                evidence = f"view {view.epoch} not adopted within {self._clock.elapsed(published_at, now):.1f} s"
                found.append(Suspect(member.process, evidence, published_at))
        return found

    def has_adopted(self, member: Member, view: View) -> bool:
        process = self._table.get(member.process)
        return process is not None and reports(process, member.incarnation) >= view.epoch

    def stuck(self, view: View, now: float) -> list[Suspect]:
        """To be called at every tick: it compares with what was seen at the ticks before."""
        awaited: dict[int, list[int]] = {}
        for member in view.members:
            process = self._table.get(member.process)
            if process is not None and process.beat.epoch == view.epoch:
                for rank in process.beat.waits_for:
                    if rank != member.rank:
                        awaited.setdefault(rank, []).append(member.rank)
        found = []
        for member in view.members:
            process = self._table.get(member.process)
            if process is None or member.rank not in awaited:
                self._standstill.pop(member.process, None)
                continue
            progress, since = self._standstill.get(member.process, (-1, now))
            if progress != process.beat.progress:
                since = now
                self._standstill[member.process] = (process.beat.progress, now)
            if self._clock.elapsed(since, now) > self._config.heartbeat_timeout_s:
                waiters = sorted(awaited[member.rank])
                found.append(Suspect(member.process, f"no progress while ranks {waiters} wait for it", since))
        return found

    def is_half_in(self, prepared: PreparedView | None, now: float) -> bool:
        """To be called at every tick: it compares with what was seen at the ticks before."""
        if prepared is None or not prepared.entered or prepared.is_in_force:
            self._entering = None
            return False
        records = [self._table.get(process) for process in prepared.waiting]
        seen = tuple((record.id, record.beat.progress) for record in records if record is not None)
        if self._entering is None or self._entering[0] != seen:
            self._entering = seen, now
        return self._clock.elapsed(self._entering[1], now) > self._config.adopt_timeout_s

    def restart(self) -> None:
        """A new view: whatever was awaited belonged to the old one."""
        self._standstill.clear()
        self._adopting.clear()
        self._entering = None
