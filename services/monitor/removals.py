"""Out of the group, or out of the join: what becomes of the slot, and the view without whom it concerns.

Invariants:
* who is removed and not known gone is fenced, unless masked, and its slot number waits for that; who is released by a
  scaling has time to leave by itself first;
* one view for all who are removed together, computed from the current view, under a new number;
* a view that is published ends the roll call in progress.
"""

from dataclasses import dataclass
from enum import Enum

from common.config import MonitorConfig
from common.ids import ProcessId
from common.messages import Member
from services.monitor.actions import Outbox
from services.monitor.fences import Fences
from services.monitor.group import Group
from services.monitor.joining import Joining
from services.monitor.processes import ProcessTable
from services.monitor.roll_call import RollCallState
from services.monitor.slots import Slot, SlotState, SlotTable


class Fate(Enum):
    """What becomes of the slot of a removed process."""

    FENCE = "fence"  # still there, as far as is known; may come back when it has left by itself
    END = "end"  # still there, and what is wrong with it would be wrong again: it must end
    FREE = "free"  # reaped, or has left by itself
    MASK = "mask"  # stays alive, keeps its number
    RELEASE = "release"  # stays alive, gives its number back


@dataclass(frozen=True, slots=True)
class Removal:
    process: ProcessId
    evidence: str
    since: float
    fate: Fate = Fate.FENCE


class Removals:
    def __init__(
        self,
        config: MonitorConfig,
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        joining: Joining,
        fences: Fences,
        outbox: Outbox,
    ) -> None:
        self._config, self._table, self._slots, self._group = config, table, slots, group
        self._joining, self._fences, self._outbox = joining, fences, outbox
        self.roll_call: RollCallState | None = None  # the one in progress, of `services.monitor.void_rounds`

    def remove(self, removals: list[Removal], now: float) -> None:
        """Puts processes out of the group, or out of the join. One view for all of them."""
        first: dict[ProcessId, Removal] = {}
        for removal in removals:
            first.setdefault(removal.process, removal)
        told = []
        for removal in first.values():
            slot = self._slots.of_process(removal.process)
            if slot is None or slot.state is not SlotState.HELD:
                continue
            told.append(self._record_removal(slot, removal, now))
            if removal.fate is Fate.END:
                self._slots.fence(slot, now, removal.evidence)
                self._fences.put_up(removal.process, now, to_the_end=True)
            elif removal.fate is Fate.FENCE:
                self._slots.fence(slot, now, removal.evidence)
                self._fences.put_up(removal.process, now)
            elif removal.fate is Fate.RELEASE:
                self._slots.fence(slot, now, removal.evidence, released=True)
                self._fences.put_up(removal.process, now, self._config.adopt_timeout_s)
            elif removal.fate is Fate.MASK:
                self._slots.mask(slot, now, removal.evidence)
            else:
                self._slots.free(slot, now, removal.evidence)
            if self._group.member(removal.process) is None:
                self._joining.to_welcome.append(removal.process)  # no view will tell it that it is out
        if told:
            self._publish_without(set(first), told, now)

    def _record_removal(self, slot: Slot, removal: Removal, now: float) -> dict[str, object]:
        fields = {
            "rank": slot.rank,
            "incarnation": slot.incarnation,
            "process": slot.process,
            "evidence": removal.evidence,
            "since": self._outbox.events.wall(removal.since),
        }
        if record := self._table.get(slot.process):
            slot.last_pid, slot.last_host = record.hello.pid, record.hello.host
        kind = {Fate.MASK: "masked", Fate.RELEASE: "released"}.get(removal.fate, "removed")
        self._outbox.emit(kind, now, epoch=self._group.epoch, **fields)
        return fields

    def _publish_without(self, processes: set[ProcessId], told: list[dict[str, object]], now: float) -> None:
        members = [member for member in self._group.members if member.process not in processes]
        prepared = self._group.prepared
        touched = len(members) < len(self._group.members)
        joins = prepared and prepared.base and any(m.process in processes for m in prepared.view.members)
        # A roll call ends in a new view anyway; one made earlier only because of a newcomer would keep the silent.
        if touched or (joins and self.roll_call is None):
            reason = "; ".join(f"without rank {fields['rank']}: {fields['evidence']}" for fields in told)
            self._publish(members, reason, now, evidence=told)
        elif not joins and prepared and any(process in processes for process in prepared.newcomers):
            self._joining.form_again(now)

    def _publish(self, members: list[Member], reason: str, now: float, **evidence: object) -> None:
        prepared = self._group.prepared
        self.roll_call = None
        view = self._group.publish(members, reason, now, **evidence)
        if prepared is not None:
            self._joining.on_dropped(prepared, view, now)

    def publish_same_members(self, reason: str, now: float) -> None:
        self._publish(list(self._group.members), reason, now)
