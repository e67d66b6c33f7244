"""Ranks that leave by command are emptied of experts first, so that no survivor waits for a repair.

    staying --drain, or surplus after a scaling--> emptying --others hold all that it holds--> may go
                                                   emptying --empty_s--> may go; its experts are repaired in the view

Emptying copies experts to those who stay, in as many migrations as their memory for incoming experts needs. Where every
expert of a leaving rank has another copy already, it is empty from the start.
"""

from collections.abc import Sequence

from common.config import MonitorConfig
from common.ids import ProcessId
from common.placement import repair
from common.placement_steps import next_step
from common.view import ranks
from services.monitor.group import Group
from services.monitor.migration import Migration
from services.monitor.ticks import TickClock


class Emptying:
    """``drained``: processes that a command wants out of the group, and the command."""

    def __init__(self, config: MonitorConfig, group: Group, migration: Migration, clock: TickClock) -> None:
        self._config, self._group, self._migration, self._clock = config, group, migration, clock
        self.drained: dict[ProcessId, str] = {}
        self._since: dict[ProcessId, float] = {}

    def advance(self, leaving: Sequence[ProcessId], now: float) -> str | None:
        """After every event, with all members that are to leave. None: wait. Otherwise they may go, all of them, and
        the text says what was left undone."""
        self._since = {process: self._since.get(process, now) for process in leaving}
        self._migration.is_closed_to_plans = bool(leaving)
        if not leaving:
            return None
        if any(self._clock.elapsed(since, now) > self._config.empty_s for since in self._since.values()):
            return f", not emptied within {self._config.empty_s:g} s: what it alone held is read from the checkpoint"
        return "" if self._is_empty_without(leaving, now) else None

    def _is_empty_without(self, leaving: Sequence[ProcessId], now: float) -> bool:
        """Whether all experts have copies outside ``leaving``; if not, the next of them move there."""
        view, moving = self._group.current, self._migration.moving
        if view is None:
            return True
        if moving is not None and not moving.yields:
            return False
        staying = [member.rank for member in view.members if member.process not in leaving]
        present = view.placement.physical_to_logical
        repaired = repair(present, staying, self._group.experts.num_logical_experts)
        step = next_step(present, repaired.physical_to_logical, ranks(view), self._migration.num_staging)
        if step is None:
            return True
        self._migration.move(step, "ranks that leave are emptied", now)
        return False
