"""A member that takes longer for its own work than the others do, for long enough. Pure; decides nothing.

All rounds of a group last equally long, so the time that counts is what a rank reports of its own: between its waits
for others, on the wall (`common.pace`). Twice a second the mean of each member's rounds since the last look is compared
with the median of the others. Time counts against a member only while the group computes, and not at all over a late
tick: then the monitor, and for all it knows the others too, stood still themselves.
"""

from dataclasses import dataclass
from statistics import median

from common.config import MonitorConfig
from common.ids import ProcessId
from common.messages import View
from services.monitor.failure_detector import Suspect
from services.monitor.processes import ProcessTable
from services.monitor.ticks import TickClock

_LOOK_S = 0.5
_MIN_ROUNDS = 5  # between two looks; fewer say nothing about a mean


@dataclass(frozen=True, slots=True)
class _Seen:
    num_rounds: int
    own_us: int


class SlowRanks:
    def __init__(self, config: MonitorConfig, table: ProcessTable, clock: TickClock) -> None:
        self._config, self._table, self._clock = config, table, clock
        self._looked_at = 0.0
        self._last: dict[ProcessId, _Seen] = {}
        self._slow_s: dict[ProcessId, float] = {}

    def restart(self) -> None:
        """A new view: other members, other loads."""
        self._last.clear()
        self._slow_s.clear()

    def look(self, view: View, now: float) -> Suspect | None:
        """To be called at every tick. The slowest of those that have been too slow for too long."""
        config = self._config
        passed_s = now - self._looked_at
        if not config.slow_factor or passed_s < _LOOK_S:
            return None
        was_late = self._clock.elapsed(self._looked_at, now) < 0.9 * passed_s
        self._looked_at = now
        if was_late:
            self.restart()
        round_us = self._mean_rounds(view)
        if len(round_us) < len(view.members) or len(round_us) < 2:
            return None
        ratios = {process: own / _median_of_others(round_us, process) for process, own in round_us.items()}
        for process, ratio in ratios.items():
            self._slow_s[process] = self._slow_s.get(process, 0.0) + passed_s if ratio > config.slow_factor else 0.0
        due = [process for process in ratios if self._slow_s[process] >= config.slow_for_s]
        if not due:
            return None
        slowest = max(due, key=lambda process: (ratios[process], process))
        own_ms, usual_ms = round_us[slowest] / 1000, _median_of_others(round_us, slowest) / 1000
        text = f"slow: {own_ms:.1f} ms of own time a round, {usual_ms:.1f} ms is usual"
        return Suspect(slowest, f"{text}, for {self._slow_s[slowest]:.1f} s", now - self._slow_s[slowest])

    def _mean_rounds(self, view: View) -> dict[ProcessId, float]:
        """Microseconds of own time in a round, of the members that have computed enough rounds since the last look."""
        found = {}
        for member in view.members:
            record = self._table.get(member.process)
            if record is None:
                continue
            counters = record.beat.counters
            seen = _Seen(counters.get("compute_rounds", 0), counters.get("own_us", 0))
            last = self._last.get(member.process)
            if last is None:
                self._last[member.process] = seen
            elif seen.num_rounds - last.num_rounds >= _MIN_ROUNDS:
                self._last[member.process] = seen
                found[member.process] = max(1.0, (seen.own_us - last.own_us) / (seen.num_rounds - last.num_rounds))
        return found


def _median_of_others(values: dict[ProcessId, float], process: ProcessId) -> float:
    return median(value for other, value in values.items() if other != process)
