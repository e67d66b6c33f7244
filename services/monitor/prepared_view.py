"""A view that comes next if all of its members get ready: two-phase join (PROTOCOL 4).

    prepared --every member, newcomers too, reports its epoch--> in force
             --a view with a higher number-------------------> dropped

The monitor does not see who is ready: ready is said in round headers, and binds. So a prepared view is never taken
back, only overtaken by a higher number.
"""

from dataclasses import dataclass, field

from common.ids import Epoch, ProcessId
from common.messages import Prepare, View
from common.view import newcomers


@dataclass(slots=True)
class PreparedView:
    view: View
    base: View | None  # None: formation, all are newcomers
    started_at: float
    sent_at: float
    entered: set[ProcessId] = field(default_factory=set)

    @property
    def message(self) -> Prepare:
        return Prepare(self.view, self.base.epoch if self.base else Epoch(0))

    @property
    def newcomers(self) -> tuple[ProcessId, ...]:
        return tuple(member.process for member in newcomers(self.view, self.base))

    @property
    def waiting(self) -> tuple[ProcessId, ...]:
        """Members that have not reported its epoch yet."""
        return tuple(member.process for member in self.view.members if member.process not in self.entered)

    @property
    def is_in_force(self) -> bool:
        return not self.waiting
