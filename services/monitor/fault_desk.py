"""Carries fault events out (docs/wire-protocol.md) and proves it: idle injectors would make every test pass.

    received --malformed, unknown target, cannot be done--> refused
    received --monitor not ready--> deferred (repeat it)
    received --> accepted --at_round reached--> fired --proof seen--> done
                    --round not reached in time--> failed --no proof in time, or scaled to another size--> failed

Each step is an event of kind ``fault`` on topic ``event``; the first says after how many seconds the last one has come.
The same id again does nothing but repeat the last one. That holds across a monitor that is killed by a fault event
too: its successor carries the repeated event out anew, under the same id, and agents and processes remember ids.
"""

from collections import OrderedDict
from typing import Any

from common.config import ClusterConfig
from common.fault import SELF_INFLICTED, SIGNALS, Fault, FaultRefused, parse_fault
from common.ids import ProcessId, Rank
from common.messages import Inject, Injected, Signal, SignalDone
from services.monitor.actions import Outbox
from services.monitor.fault_proofs import FaultProofs
from services.monitor.fault_targets import FaultTargets
from services.monitor.group import Group
from services.monitor.membership import Membership
from services.monitor.pending_fault import PendingFault
from services.monitor.processes import ProcessTable
from services.monitor.sizing import Sizing
from services.monitor.slots import SlotTable
from services.monitor.ticks import TickClock

ROUND_S = 600.0  # that an event waits for its round
_SEND_AGAIN_S = 1.0
_NUM_REMEMBERED = 1000
ID_PREFIX = "fault:"


class FaultDesk:
    def __init__(
        self,
        monitor: ProcessId,
        config: ClusterConfig,
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        membership: Membership,
        sizing: Sizing,
        outbox: Outbox,
        clock: TickClock,
    ) -> None:
        self._monitor, self._group, self._membership, self._sizing = monitor, group, membership, sizing
        self._outbox, self._clock = outbox, clock
        self._targets = FaultTargets(config, table, slots, group, sizing)
        self._proofs = FaultProofs(table, slots, group, sizing)
        self._pending: dict[str, PendingFault] = {}
        self._last_event: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.term = 0

    def on_fault(self, payload: bytes, now: float) -> None:
        try:
            fault = parse_fault(payload)
            if fault.id in self._last_event:
                self._outbox.repeat(self._last_event[fault.id])
                return
            pending = PendingFault(fault, now)
            process, pid, deadline_s = self._targets.find(fault, now)
            pending.process, pending.pid, pending.deadline_s = process, pid, deadline_s
        except FaultRefused as refusal:
            self._refuse(refusal, now)
            return
        self._pending[fault.id] = pending
        waits = fault.at_round > self._group.num_rounds
        self._acknowledge(pending, "accepted", "", now, deadline_s=pending.deadline_s + (ROUND_S if waits else 0.0))
        if not waits:
            self._start(pending, now)
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
            # Of another process: the one that the same event met under the monitor before this one.
            who = f"pid {pending.pid}" if done.process == pending.process else str(done.process)
            pending.word = f"{who}: {done.proof}"

    def on_injected(self, said: Injected, now: float) -> None:
        pending = self._pending.get(said.id)
        if pending is None or said.process != pending.process:
            return
        pending.said = said
        if said.ok and pending.fault.action == "corrupt_heap":
            self._membership.distrust(said.process, now)

    def advance(self, now: float) -> None:
        """After every event and at every tick: starts what is due, looks for proofs, repeats, ends what is late."""
        for pending in list(self._pending.values()):
            fault = pending.fault
            if pending.started_at is None:
                self._await_round(pending, now)
            elif proof := self._proofs.proof(pending, now):
                self._finish(pending, "done", proof, now)
            elif pending.said is not None and not pending.said.ok:
                self._finish(pending, "failed", self._proofs.missing(pending), now)
            elif self._clock.elapsed(pending.started_at, now) > pending.deadline_s:
                text = f"no proof within {pending.deadline_s:g} s: {self._proofs.missing(pending)}"
                self._finish(pending, "failed", text, now)
            elif any(self._sizing.wanted[kind] != count for kind, count in fault.counts.items()):
                self._finish(pending, "failed", "another size was asked for since", now)
            else:
                self._send(pending, now)

    def _await_round(self, pending: PendingFault, now: float) -> None:
        wanted, reached = pending.fault.at_round, self._group.num_rounds
        if reached >= wanted:
            try:
                process, pid, deadline_s = self._targets.find(pending.fault, now)
            except FaultRefused as refusal:
                del self._pending[pending.fault.id]
                self._refuse(refusal, now)
                return
            pending.process, pending.pid, pending.deadline_s = process, pid, deadline_s
            self._start(pending, now)
            self._acknowledge(pending, "fired", "", now, deadline_s=deadline_s)
        elif self._clock.elapsed(pending.asked_at, now) > ROUND_S:
            text = f"the group has not reached round {wanted} within {ROUND_S:g} s, it is at {reached}"
            self._finish(pending, "failed", text, now)

    def _start(self, pending: PendingFault, now: float) -> None:
        fault = pending.fault
        pending.started_at, pending.round = now, self._group.num_rounds
        pending.routers = self._targets.routers()
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
                self._send(pending, now)

    def _send(self, pending: PendingFault, now: float) -> None:
        """To the agent that signals, or to the process that does it to itself; again until it has answered."""
        fault = pending.fault
        if pending.sent_at is not None and now - pending.sent_at < _SEND_AGAIN_S:
            return
        if fault.action in SIGNALS:
            agent = self._targets.signaller(pending.process, now)
            if agent is not None:
                pending.sent_at, pending.pid = now, agent[1]
                name, id = fault.action.upper(), ID_PREFIX + fault.id
                self._outbox.send(agent[0], Signal(id, pending.process, agent[1], name, fault.duration_s))
        elif fault.action in SELF_INFLICTED and pending.said is None:
            pending.sent_at = now
            self._outbox.send(pending.process, self._inject(fault))

    def _inject(self, fault: Fault) -> Inject:
        return Inject(
            self._monitor, self.term, fault.id, fault.action,
            fault.factor, fault.which, fault.direction, fault.duration_s,
        )  # fmt: skip

    # Acknowledgements.

    def _finish(self, pending: PendingFault, status: str, proof: str, now: float) -> None:
        del self._pending[pending.fault.id]
        self._acknowledge(pending, status, proof, now)

    def _acknowledge(self, pending: PendingFault, status: str, proof: str, now: float, **more: object) -> None:
        fault = pending.fault
        fields = {"id": fault.id, "action": fault.action, "target": fault.target, "status": status, "proof": proof}
        numbers = {"pid": pending.pid, "round": pending.round, "epoch": self._group.epoch}
        self._remember(fault.id, self._outbox.emit("fault", now, **fields, **numbers, **more))

    def _refuse(self, refusal: FaultRefused, now: float) -> None:
        fields = {"id": refusal.id, "action": refusal.action, "status": "refused", "proof": "", "error": str(refusal)}
        event = self._outbox.emit("fault", now, **fields, epoch=self._group.epoch)
        if refusal.id:
            self._remember(refusal.id, event)

    def _remember(self, identifier: str, event: dict[str, Any]) -> None:
        self._last_event[identifier] = event
        if len(self._last_event) > _NUM_REMEMBERED:
            self._last_event.popitem(last=False)
