"""Processes greet: who is new, what is known of a rank's slot, and the welcome that tells it.

    Hello --a monitor that still gathers--> noted --active--> Welcome (config, directory, view; to a rank its slot)

A decode process is welcomed only by a monitor that is sure of the slots; it repeats its Hello until then.
"""

from common.config import ClusterConfig
from common.ids import NO_RANK, Incarnation, ProcessId
from common.messages import Hello, Welcome
from services.monitor.actions import Outbox
from services.monitor.directory import DirectoryKeeper
from services.monitor.fences import Fences
from services.monitor.group import Group
from services.monitor.joining import Joining
from services.monitor.membership import Membership
from services.monitor.processes import Process, ProcessTable
from services.monitor.slots import SlotState, SlotTable
from services.monitor.takeover import Phase, Takeover
from services.monitor.terms import EpochCounter


class Reception:
    def __init__(
        self,
        monitor: ProcessId,
        config: ClusterConfig,
        counter: EpochCounter,
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        joining: Joining,
        fences: Fences,
        membership: Membership,
        takeover: Takeover,
        directory: DirectoryKeeper,
        outbox: Outbox,
    ) -> None:
        self._monitor, self._config, self._counter = monitor, config, counter
        self._table, self._slots, self._group, self._joining = table, slots, group, joining
        self._fences, self._membership, self._takeover = fences, membership, takeover
        self._directory, self._outbox = directory, outbox

    def on_hello(self, hello: Hello, now: float) -> None:
        process, kind = self._table.on_hello(hello, now)
        if kind != "again":
            fields = {"process": hello.process, "name": hello.name, "service": hello.kind, "pid": hello.pid}
            self._outbox.emit("restarted" if kind == "restarted" else "started", now, epoch=self._group.epoch, **fields)
        if self._takeover.phase is not Phase.ACTIVE:
            self._takeover.on_hello(hello)
        elif hello.kind == "decode":
            self._reconcile_slot(process, now)
        # A decode process learns its slot only when it is sure; it repeats its Hello until then.
        if self._takeover.phase is Phase.ACTIVE or (self._takeover.phase is Phase.GATHERING and hello.kind != "decode"):
            self._joining.to_welcome.append(process.id)

    def _reconcile_slot(self, process: Process, now: float) -> None:
        """A decode process greets again, or comes late: does what it says of its slot fit what is known?"""
        hello, slot = process.hello, self._slots.of_process(process.id)
        if slot is not None:
            if hello.rank == NO_RANK and hello.heap != slot.heap:
                self._membership.on_left(slot, now)  # its SlotLeft was lost: what it offers now is another heap
                process.must_greet = False
        elif 0 <= hello.rank < len(self._slots.slots):
            self._outbox.emit("zombie", now, epoch=self._group.epoch, rank=hello.rank, process=process.id)
            if self._slots.slots[hello.rank].state is SlotState.FREE:
                fenced = SlotState.FENCING
                self._slots.give(hello.rank, process.id, hello.incarnation, hello.heap, now, fenced)
            self._fences.put_up(process.id, now)

    def welcome(self, process: Process, now: float) -> None:
        if self._joining.may_have_been_let_in(process.id):
            return  # it repeats its Hello
        slot = self._slots.of_process(process.id)
        rank, incarnation = NO_RANK, Incarnation(0)
        if slot is not None and slot.state is SlotState.HELD:
            rank, incarnation = slot.rank, slot.incarnation
        # Told so, it says so itself in its next Hello: a restarted monitor must not give a masked rank a slot unasked.
        masked = slot is not None and slot.state is SlotState.MASKED
        term, view, directory = self._counter.term, self._group.current, self._directory.message
        process.welcomed_at = now
        self._outbox.send(
            process.id, Welcome(self._monitor, term, self._config, directory, view, rank, incarnation, masked=masked)
        )
        if self._group.prepared is not None and process.id in self._group.prepared.waiting:
            self._outbox.send(process.id, self._group.prepared.message)
