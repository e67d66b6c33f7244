"""Carries fault events out and proves it (DESIGN 10): an injector that does nothing would make every test pass.

    received --malformed, unknown target, cannot be done--> refused
    received --monitor not ready--> deferred (repeat it)
    received --> accepted --proof seen--> done
                          --no proof in time, or scaled to another size--> failed

Each step is an event of kind ``fault`` on topic ``event``. The same id again does nothing but repeat the last one.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from common.config import ClusterConfig
from common.fault import SIGNALS, Fault, FaultRefused, parse_fault
from common.ids import ProcessId, Rank
from common.messages import Signal, SignalDone
from common.view import ranks
from services.monitor.actions import Outbox
from services.monitor.group import Group
from services.monitor.membership import Membership
from services.monitor.processes import ProcessTable
from services.monitor.sizing import Sizing
from services.monitor.slots import SlotState, SlotTable
from services.monitor.ticks import TickClock

_SIGNAL_S = 5.0
_SIGNAL_AGAIN_S = 1.0
_NUM_REMEMBERED = 1000
_NOBODY = ProcessId("")
ID_PREFIX = "fault:"


@dataclass(slots=True)
class _Pending:
    fault: Fault
    process: ProcessId
    pid: int
    started_at: float
    deadline_s: float
    sent_at: float | None = None
    proof: str = ""  # the agent's word, for signals that leave the process alive


class FaultDesk:
    def __init__(
        self,
        config: ClusterConfig,
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        membership: Membership,
        sizing: Sizing,
        outbox: Outbox,
        clock: TickClock,
    ) -> None:
        self._config, self._table, self._slots = config, table, slots
        self._group, self._membership, self._sizing = group, membership, sizing
        self._outbox, self._clock = outbox, clock
        self._pending: dict[str, _Pending] = {}
        self._last_event: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def on_fault(self, payload: bytes, now: float) -> None:
        try:
            fault = parse_fault(payload)
            if fault.id in self._last_event:
                self._outbox.repeat(self._last_event[fault.id])
                return
            pending = self._accept(fault, now)
        except FaultRefused as refusal:
            self._refuse(refusal, now)
            return
        self._pending[fault.id] = pending
        self._acknowledge(pending, "accepted", "", now)
        match fault.action:
            case "mask":
                self._membership.mask(Rank(fault.rank), f"mask, event {fault.id}", now)
            case "drain":
                self._membership.drain(Rank(fault.rank), f"drain, event {fault.id}", now)
            case "unmask" | "undrain":
                self._membership.unmask(Rank(fault.rank), now)
            case "scale":
                self._sizing.scale(fault.counts, f"event {fault.id}", now)
            case _:
                pass  # a signal: `advance` sends it
        self.advance(now)

    def defer(self, payload: bytes, now: float) -> None:
        """While this monitor has just started and still listens. Not remembered, and no final status: publishers repeat
        until there is one, and then it is carried out."""
        try:
            fault = parse_fault(payload)
        except FaultRefused as refusal:
            self._refuse(refusal, now)
            return
        fields = {"id": fault.id, "action": fault.action, "target": fault.target}
        text = "the monitor has just started and still listens"
        self._outbox.emit("fault", now, **fields, status="deferred", proof="", text=text, epoch=self._group.epoch)

    def on_signal_done(self, done: SignalDone) -> None:
        pending = self._pending.get(done.id.removeprefix(ID_PREFIX))
        if pending is not None and done.id.startswith(ID_PREFIX) and done.ok:
            pending.proof = f"pid {pending.pid}: {done.proof}"

    def advance(self, now: float) -> None:
        """After every event and at every tick: looks for proofs, repeats signals, ends what took too long."""
        for pending in list(self._pending.values()):
            proof = self._proof(pending, now)
            if proof:
                self._finish(pending, "done", proof, now)
            elif self._clock.elapsed(pending.started_at, now) > pending.deadline_s:
                self._finish(pending, "failed", f"no proof within {pending.deadline_s:g} s", now)
            elif any(self._sizing.wanted[kind] != count for kind, count in pending.fault.counts.items()):
                self._finish(pending, "failed", "another size was asked for since", now)
            elif pending.fault.action in SIGNALS:
                self._signal(pending, now)

    # Which process is meant, and whether it can be done.

    def _accept(self, fault: Fault, now: float) -> _Pending:
        if fault.action == "scale":
            return self._accept_scale(fault, now)
        if fault.action in ("mask", "drain"):
            return self._accept_mask(fault, now)
        if fault.action in ("unmask", "undrain"):
            return self._accept_unmask(fault, now)
        process, pid = self._target(fault, now)
        if self._table.agent_of(process, now) is None:
            raise self._refusal(fault, f"no agent that could signal {fault.target} is connected")
        return _Pending(fault, process, pid, now, _SIGNAL_S)

    def _target(self, fault: Fault, now: float) -> tuple[ProcessId, int]:
        if fault.rank >= 0:
            slot = self._slot(fault)
            record = self._table.get(slot.process)
            if record is None or slot.state is SlotState.FREE:
                raise self._refusal(fault, f"rank {fault.rank} has no process")
            return record.id, record.hello.pid
        record = self._table.by_name(fault.process, now)
        if record is None:
            raise self._refusal(fault, f"no live process is called {fault.process!r}")
        return record.id, record.hello.pid

    def _slot(self, fault: Fault) -> Any:
        if fault.rank >= len(self._slots.slots):
            raise self._refusal(fault, f"there are ranks 0..{len(self._slots.slots) - 1}")
        return self._slots.slots[fault.rank]

    def _accept_mask(self, fault: Fault, now: float) -> _Pending:
        slot = self._slot(fault)
        if slot.state not in (SlotState.HELD, SlotState.MASKED):
            raise self._refusal(fault, f"rank {fault.rank} has no process")
        others = tuple(member.rank for member in self._group.members if member.rank != fault.rank)
        if len(others) < len(self._group.members):
            if not others:
                raise self._refusal(fault, f"rank {fault.rank} is the only one that serves")
            if fault.action == "drain" and len(others) < self._group.experts.min_ranks:
                raise self._refusal(fault, f"the other {len(others)} ranks have no room for all experts")
        monitor = self._config.monitor
        deadline_s = 2 * monitor.adopt_timeout_s + (monitor.empty_s if fault.action == "drain" else 0.0)
        return _Pending(fault, slot.process, slot.last_pid, now, deadline_s)

    def _accept_unmask(self, fault: Fault, now: float) -> _Pending:
        slot = self._slot(fault)
        if slot.state not in (SlotState.HELD, SlotState.MASKED):
            raise self._refusal(fault, f"rank {fault.rank} has no process")
        return _Pending(fault, slot.process, slot.last_pid, now, self._config.monitor.prepare_timeout_s)

    def _accept_scale(self, fault: Fault, now: float) -> _Pending:
        if reason := self._sizing.refusal(fault.counts, now):
            raise self._refusal(fault, reason)
        return _Pending(fault, _NOBODY, 0, now, 2 * self._config.monitor.prepare_timeout_s)

    @staticmethod
    def _refusal(fault: Fault, reason: str) -> FaultRefused:
        return FaultRefused(reason, {"id": fault.id, "action": fault.action})

    # Proofs.

    def _proof(self, pending: _Pending, now: float) -> str:
        match pending.fault.action:
            case "kill" | "term":
                gone = self._table.gone.get(pending.process)
                return f"pid {pending.pid} gone: {gone}" if gone else ""
            case "scale":
                return self._sizing.proof(pending.fault.counts, now)
            case "mask" | "drain":
                return self._proof_of_mask(pending)
            case "unmask" | "undrain":
                member = self._group.member(pending.process)
                if member is None or not self._group.is_adopted:
                    return ""
                return f"rank {member.rank} serves in view {self._group.epoch}, incarnation {member.incarnation}"
            case _:
                return pending.proof

    def _proof_of_mask(self, pending: _Pending) -> str:
        """A drain is over only when the rank itself says that it holds nothing any more."""
        view, slot = self._group.current, self._slots.slots[pending.fault.rank]
        if view is None or not self._group.is_adopted or self._group.member(pending.process):
            return ""
        if slot.state is not SlotState.MASKED or (pending.fault.action == "drain" and not slot.left):
            return ""
        drained = "drained, " if pending.fault.action == "drain" else ""
        return f"{drained}view {view.epoch} without it, adopted by ranks {list(ranks(view))}"

    def _signal(self, pending: _Pending, now: float) -> None:
        if pending.sent_at is not None and now - pending.sent_at < _SIGNAL_AGAIN_S:
            return
        agent = self._table.agent_of(pending.process, now)
        if agent is not None:
            pending.sent_at, pending.pid = now, agent[1]
            name = pending.fault.action.upper()
            self._outbox.send(agent[0], Signal(ID_PREFIX + pending.fault.id, pending.process, agent[1], name))

    # Acknowledgements.

    def _finish(self, pending: _Pending, status: str, proof: str, now: float) -> None:
        del self._pending[pending.fault.id]
        self._acknowledge(pending, status, proof, now)

    def _acknowledge(self, pending: _Pending, status: str, proof: str, now: float) -> None:
        fault = pending.fault
        fields = {"id": fault.id, "action": fault.action, "target": fault.target, "status": status, "proof": proof}
        self._remember(fault.id, self._outbox.emit("fault", now, **fields, pid=pending.pid, epoch=self._group.epoch))

    def _refuse(self, refusal: FaultRefused, now: float) -> None:
        fields = {"id": refusal.id, "action": refusal.action, "status": "refused", "proof": "", "error": str(refusal)}
        event = self._outbox.emit("fault", now, **fields, epoch=self._group.epoch)
        if refusal.id:
            self._remember(refusal.id, event)

    def _remember(self, identifier: str, event: dict[str, Any]) -> None:
        self._last_event[identifier] = event
        if len(self._last_event) > _NUM_REMEMBERED:
            self._last_event.popitem(last=False)
