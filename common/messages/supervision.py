"""What the monitor has done to processes: by their agents (signals, numbers, ends), or by themselves (faults)."""

from common.ids import ProcessId
from common.messages.tagged import TaggedStruct


class Signal(TaggedStruct, frozen=True):
    """monitor -> agent: send ``signal`` (a name: KILL, STOP, CONT, TERM) to a process and prove it.

    ``duration_s``: of a STOP, after which the agent continues the process; 0 = somebody else will.
    """

    id: str
    process: ProcessId
    pid: int
    signal: str
    duration_s: float = 0.0


class SignalDone(TaggedStruct, frozen=True):
    """agent -> monitor. ``proof`` says what the agent saw: ``reaped``, ``state T``, ``no such process``."""

    id: str
    process: ProcessId
    ok: bool
    proof: str


class SetChildren(TaggedStruct, frozen=True):
    """monitor -> agent, repeated until its heartbeats show it: run ``count`` children of ``kind``.

    More are started under the lowest free numbers. Of those that run, only the ones in ``retire`` may be ended, and
    only as long as there are too many: they hold no slot any more, or (prefill) their requests are placed again.
    """

    monitor: ProcessId
    term: int
    kind: str
    count: int
    retire: tuple[ProcessId, ...] = ()


class Exited(TaggedStruct, frozen=True):
    """agent -> monitor, repeated by the agent until the monitor's term answers with its epoch: a child was reaped."""

    agent: str
    process: ProcessId
    name: str
    pid: int
    reason: str  # "signal KILL", "exit 1"


class Inject(TaggedStruct, frozen=True):
    """monitor -> process, repeated until Injected: do this fault to yourself. The same id again changes nothing.

    slow: take ``factor`` times the time of your own work. drop_network: lose what passes between you and ``which``
    (monitor | peers | all) in ``direction`` (in | out | both) for ``duration_s``. corrupt_heap: overwrite your memory.
    """

    monitor: ProcessId
    term: int
    id: str
    action: str
    factor: float = 1.0
    which: str = ""
    direction: str = ""
    duration_s: float = 0.0


class Injected(TaggedStruct, frozen=True):
    """process -> monitor: the fault is in force, and what shows it. Passes a cut network, and is no sign of life."""

    process: ProcessId
    id: str
    ok: bool
    proof: str
