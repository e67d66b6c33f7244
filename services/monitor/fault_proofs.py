"""What shows that a fault event took effect, and what is missing as long as nothing does."""

from common.ids import ProcessId
from common.view import ranks
from services.monitor.group import Group
from services.monitor.pending_fault import PendingFault
from services.monitor.processes import ProcessTable, reports
from services.monitor.sizing import Sizing
from services.monitor.slots import SlotState, SlotTable


class FaultProofs:
    def __init__(self, table: ProcessTable, slots: SlotTable, group: Group, sizing: Sizing) -> None:
        self._table, self._slots, self._group, self._sizing = table, slots, group, sizing

    def proof(self, pending: PendingFault, now: float) -> str:
        """Empty: none yet."""
        fault = pending.fault
        match fault.action:
            case "kill" | "term":
                end = self._table.gone.get(pending.process) or self._succession(pending.process, now)
                return f"pid {pending.pid} gone: {end}" if end else pending.word
            case "restart":
                return self._proof_of_restart(pending, now)
            case "scale":
                return self._sizing.proof(fault.counts, now)
            case "mask" | "drain":
                return self._proof_of_mask(pending)
            case "unmask" | "undrain":
                member = self._group.member(pending.process)
                if member is None or not self._group.is_adopted:
                    return ""
                return f"rank {member.rank} serves in view {self._group.epoch}, incarnation {member.incarnation}"
            case "corrupt_heap":
                gone = self._table.gone.get(pending.process)
                said = pending.said.proof if pending.said and pending.said.ok else ""
                return f"{said}; pid {pending.pid} gone: {gone}" if said and gone else ""
            case "slow" | "drop_network":
                return pending.said.proof if pending.said and pending.said.ok else ""
            case _:
                return pending.word

    def _succession(self, process: ProcessId, now: float) -> str:
        """Nobody reaps an agent for us: but its lifeline is closed, and another has its name."""
        record = self._table.get(process)
        if record is None or record.hello.kind != "agent" or self._table.is_live(record, now):
            return ""
        successor = self._table.by_name(record.hello.name, now)
        return f"lifeline closed, and {record.hello.name} is pid {successor.hello.pid} now" if successor else ""

    def missing(self, pending: PendingFault) -> str:
        """For people, when the time for the proof is over."""
        fault, who = pending.fault, pending.fault.target
        match fault.action:
            case "kill" | "term":
                return f"no agent has reaped pid {pending.pid}"
            case "stop" | "cont":
                return f"no agent has seen pid {pending.pid} {'stand still' if fault.action == 'stop' else 'run'}"
            case "restart":
                return f"no new router serves in the place of {who}, or that one goes on"
            case "scale":
                return f"not all ranks and workers of {who} are up and in one adopted view, or some are left over"
            case "mask" | "drain" if self._group.member(pending.process) is None and self._group.is_adopted:
                return f"{who} has not said that it holds nothing any more"
            case "mask" | "drain" | "unmask" | "undrain":
                return self._who_lacks_the_view(pending.process)
            case "corrupt_heap" if pending.said is not None:
                return f"no agent has reaped pid {pending.pid}"
            case _:
                return f"no word of {who}" if pending.said is None else f"{who} says: {pending.said.proof}"

    def _proof_of_restart(self, pending: PendingFault, now: float) -> str:
        """The successor serves, and the old one takes nothing new."""
        old = self._table.get(pending.process)
        if pending.process not in self._table.gone and old is not None and old.beat.state != "draining":
            return ""
        for router in self._table.of_kind("router"):
            if router.id not in pending.routers and router.beat.state == "up" and self._table.is_live(router, now):
                return f"{router.hello.name}, pid {router.hello.pid}, serves in its place"
        return ""

    def _proof_of_mask(self, pending: PendingFault) -> str:
        """A drain is over only when the rank itself says that it holds nothing any more."""
        view, slot = self._group.current, self._slots.slots[pending.fault.rank]
        if view is None or not self._group.is_adopted or self._group.member(pending.process):
            return ""
        if slot.state is not SlotState.MASKED or (pending.fault.action == "drain" and not slot.left):
            return ""
        drained = "drained, " if pending.fault.action == "drain" else ""
        return f"{drained}view {view.epoch} without it, adopted by ranks {list(ranks(view))}"

    def _who_lacks_the_view(self, process: ProcessId) -> str:
        prepared, view = self._group.prepared, self._group.current
        if prepared is not None:
            waiting = [member.rank for member in prepared.view.members if member.process in prepared.waiting]
            return f"ranks {waiting} have not entered view {prepared.view.epoch}"
        if view is not None and not self._group.is_adopted:
            behind = [m.rank for m in view.members if not self._has_adopted(m.process, view.epoch)]
            return f"ranks {behind} have not adopted view {view.epoch}"
        return f"no view was made {'without' if self._group.member(process) else 'with'} it"

    def _has_adopted(self, process: ProcessId, epoch: int) -> bool:
        record, member = self._table.get(process), self._group.member(process)
        return record is not None and member is not None and reports(record, member.incarnation) >= epoch
