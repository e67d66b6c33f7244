"""The list of live processes that everybody gets; a new version whenever it changes."""

from common.ids import ProcessId
from common.messages import Directory, Worker
from services.monitor.group import Group
from services.monitor.processes import Process, ProcessTable
from services.monitor.slots import SlotState, SlotTable

# Versions rise over monitors too: the term is the upper part.
_VERSIONS_OF_TERM = 1 << 20
_STATE_OF_SLOT = {SlotState.HELD: "joining", SlotState.FENCING: "leaving", SlotState.MASKED: "masked"}


class DirectoryKeeper:
    """``myself``: the monitor's own entry."""

    def __init__(self, myself: Worker, table: ProcessTable, slots: SlotTable, group: Group) -> None:
        self._myself, self._table, self._slots, self._group = myself, table, slots, group
        self._workers: tuple[Worker, ...] = (myself,)
        self._term = self._num_changes = 0

    def open_term(self, term: int) -> None:
        """Versions start anew with a new term only: whoever has seen one of this term refuses all that are lower."""
        if term != self._term:
            self._term, self._num_changes = term, 0

    @property
    def message(self) -> Directory:
        version = self._term * _VERSIONS_OF_TERM + self._num_changes
        return Directory(self._myself.process, self._term, version, self._workers)

    def refresh(self, now: float) -> Directory | None:
        """The new version if anything has changed."""
        workers = tuple(self._worker(p) for p in self._table.all() if self._table.is_live(p, now))
        workers = (self._myself, *workers)
        if workers == self._workers:
            return None
        self._workers = workers
        self._num_changes += 1
        return self.message

    def _worker(self, process: Process) -> Worker:
        hello = process.hello
        # A process without heartbeats yet has nothing to say; a prefill worker may still be loading.
        state = self.state_of(process.id) if hello.kind == "decode" else process.beat.state
        return Worker(hello.process, hello.kind, hello.name, hello.host, hello.pid, hello.endpoint, state)

    def state_of(self, process: ProcessId) -> str:
        """Of a decode process: standby | joining | serving | masked | leaving."""
        if self._group.member(process) is not None:
            return "serving"
        slot = self._slots.of_process(process)
        return _STATE_OF_SLOT[slot.state] if slot else "standby"
