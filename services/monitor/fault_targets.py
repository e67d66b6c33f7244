"""Which process a fault event means, whether it can be done to it, and how long its proof may take."""

from common.config import ClusterConfig
from common.fault import SIGNALS, Fault, FaultRefused
from common.ids import ProcessId, Rank
from services.monitor.group import Group
from services.monitor.processes import ProcessTable
from services.monitor.sizing import Sizing
from services.monitor.slots import Slot, SlotState, SlotTable

Target = tuple[ProcessId, int, float]  # process, pid, seconds for the proof

_SIGNAL_S = 8.0  # longer than a lifeline must be closed to prove the end of a process that no agent reaps
_SELF_INFLICTED_S = 15.0
_NOBODY = ProcessId("")
_WITH_PEERS = ("decode", "prefill", "router")
_SLOWED = ("decode", "prefill")


class FaultTargets:
    def __init__(
        self, config: ClusterConfig, table: ProcessTable, slots: SlotTable, group: Group, sizing: Sizing
    ) -> None:
        self._config, self._table, self._slots, self._group, self._sizing = config, table, slots, group, sizing

    def find(self, fault: Fault, now: float) -> Target:
        """Raises FaultRefused."""
        match fault.action:
            case "scale":
                if reason := self._sizing.refusal(fault.counts, now):
                    raise refusal(fault, reason)
                return _NOBODY, 0, 2 * self._config.monitor.prepare_timeout_s
            case "mask" | "drain":
                return self._to_mask(fault)
            case "unmask" | "undrain":
                slot = self._held_or_masked(fault)
                return slot.process, slot.last_pid, self._config.monitor.prepare_timeout_s
            case action if action in SIGNALS:
                return self._to_signal(fault, now)
            case _:
                return self._to_hurt(fault, now)

    def signaller(self, process: ProcessId, now: float) -> tuple[ProcessId, int] | None:
        """The agent that signals ``process``, and the pid: an agent itself, for itself."""
        record = self._table.get(process)
        if record is not None and record.hello.kind == "agent":
            return record.id, record.hello.pid
        return self._table.agent_of(process, now)

    def _to_signal(self, fault: Fault, now: float) -> Target:
        process, pid, kind = self._process(fault, now)
        if fault.action == "restart" and kind != "router":
            raise refusal(fault, f"{fault.target} is no router; others come back after term")
        if self.signaller(process, now) is None:
            raise refusal(fault, f"no agent that could signal {fault.target} is connected")
        if fault.action == "stop" and kind in ("monitor", "agent") and not fault.duration_s:
            raise refusal(fault, f"nobody could continue {fault.target} again: give duration_s")
        if fault.action == "restart":
            return process, pid, self._config.monitor.prepare_timeout_s
        return process, pid, _SIGNAL_S + fault.duration_s

    def routers(self) -> frozenset[ProcessId]:
        return frozenset(router.id for router in self._table.of_kind("router"))

    def _to_hurt(self, fault: Fault, now: float) -> Target:
        process, pid, kind = self._process(fault, now)
        if fault.action == "corrupt_heap" and self._group.member(process) is None:
            raise refusal(fault, f"rank {fault.rank} is no member of the group: nobody relies on its memory")
        if fault.action == "slow" and kind not in _SLOWED:
            raise refusal(fault, f"{fault.target} computes nothing that others wait for")
        if fault.action == "drop_network":
            if kind == "monitor":
                raise refusal(fault, "the monitor cannot be cut off from itself: cut the others off from it")
            if fault.which != "monitor" and kind not in _WITH_PEERS:
                raise refusal(fault, f"{fault.target} talks to the monitor only")
        return process, pid, _SELF_INFLICTED_S + fault.duration_s

    def _process(self, fault: Fault, now: float) -> tuple[ProcessId, int, str]:
        """Id, pid and kind."""
        if fault.rank >= 0:
            slot = self._slot(fault)
            record = self._table.get(slot.process)
            if record is None or slot.state is SlotState.FREE:
                raise refusal(fault, f"rank {fault.rank} has no process")
            return record.id, record.hello.pid, record.hello.kind
        record = self._table.by_name(fault.process, now)
        if record is not None:
            return record.id, record.hello.pid, record.hello.kind
        # The monitor does not greet itself: its agent lists it.
        for process, child in self._table.children.items():
            if child.name == fault.process == "monitor":
                return process, child.pid, "monitor"
        raise refusal(fault, f"no live process is called {fault.process!r}")

    def _slot(self, fault: Fault) -> Slot:
        if fault.rank >= len(self._slots.slots):
            raise refusal(fault, f"there are ranks 0..{len(self._slots.slots) - 1}")
        return self._slots.slots[Rank(fault.rank)]

    def _held_or_masked(self, fault: Fault) -> Slot:
        slot = self._slot(fault)
        if slot.state not in (SlotState.HELD, SlotState.MASKED):
            raise refusal(fault, f"rank {fault.rank} has no process")
        return slot

    def _to_mask(self, fault: Fault) -> Target:
        slot = self._held_or_masked(fault)
        others = tuple(member.rank for member in self._group.members if member.rank != fault.rank)
        if len(others) < len(self._group.members):
            if not others:
                raise refusal(fault, f"rank {fault.rank} is the only one that serves")
            if fault.action == "drain" and len(others) < self._group.experts.min_ranks:
                raise refusal(fault, f"the other {len(others)} ranks have no room for all experts")
        monitor = self._config.monitor
        deadline_s = 2 * monitor.adopt_timeout_s + (monitor.empty_s if fault.action == "drain" else 0.0)
        return slot.process, slot.last_pid, deadline_s


def refusal(fault: Fault, reason: str) -> FaultRefused:
    return FaultRefused(reason, {"id": fault.id, "action": fault.action})
