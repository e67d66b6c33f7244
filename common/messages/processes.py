"""What every process and the monitor say to each other: who is there, how it is, what GET /cluster shows."""

import msgspec

from common.config import ClusterConfig
from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank
from common.messages.group import View
from common.messages.tagged import TaggedStruct


class Worker(msgspec.Struct, frozen=True, array_like=True):
    """A process of the cluster as the directory lists it."""

    process: ProcessId
    kind: str  # router | prefill | decode | monitor | planner | agent
    name: str  # what its agent calls it: "decode-2"
    host: str
    pid: int
    endpoint: str
    state: str = "up"


class Directory(TaggedStruct, frozen=True):
    """monitor -> everyone: all processes that are no group members by nature, and standbys. Newer version wins."""

    monitor: ProcessId
    term: int
    version: int
    workers: tuple[Worker, ...]

    def of_kind(self, kind: str) -> tuple[Worker, ...]:
        return tuple(worker for worker in self.workers if worker.kind == kind)


class Hello(TaggedStruct, frozen=True):
    """process -> monitor, first message of a life, repeated until welcomed, and again to a monitor of a new term.

    A decode rank that is in the group says which slot it holds and sends its view, so that a restarted monitor learns
    the state from those who live it.
    """

    process: ProcessId
    kind: str
    name: str
    host: str
    pid: int
    endpoint: str
    agent: str = ""  # name of the agent that can signal and reap this process
    heap: str = ""
    rank: Rank = NO_RANK
    incarnation: Incarnation = Incarnation(0)
    view: View | None = None
    masked: bool = False  # a masked rank is a standby bound to its mask
    children: tuple[tuple[ProcessId, str, int], ...] = ()  # agents: (process id, name, pid) of those alive


class Welcome(TaggedStruct, frozen=True):
    """monitor -> process, answer to Hello. ``rank`` is NO_RANK for anything but a decode process that got a slot."""

    monitor: ProcessId
    term: int
    config: ClusterConfig
    directory: Directory
    view: View | None = None
    rank: Rank = NO_RANK
    incarnation: Incarnation = Incarnation(0)
    masked: bool = False  # no slot before a fault event unmasks it; the process says so in its next Hello


class Refusal(TaggedStruct, frozen=True):
    """monitor -> process: why the last message changed nothing. ``final`` means: do not try again, exit."""

    reason: str
    final: bool = False


class Heartbeat(TaggedStruct, frozen=True):
    """process -> monitor, every heartbeat_s, from a thread of its own.

    ``progress`` grows with every finished operation and header round; ``waits_for`` are the ranks whose words this rank
    lacks right now. ``counters`` are what GET /cluster shows: running, waiting, kv_blocks_used, kv_blocks, rounds, ...
    An agent that can change the number of its children counts ``wanted_KIND`` and ``children_KIND``.
    """

    process: ProcessId
    rank: Rank = NO_RANK
    incarnation: Incarnation = Incarnation(0)
    term: int = 0  # highest term heard of
    epoch: Epoch = Epoch(0)
    state: str = "up"  # decode: standby | joining | serving | void | draining | masked
    progress: int = 0
    waits_for: tuple[int, ...] = ()
    placement_version: int = 0
    out_of: Epoch = Epoch(0)  # highest prepared epoch that this newcomer has given up
    counters: dict[str, int] = msgspec.field(default_factory=dict)
    staged_placement: int = 0  # version of the `StagePlacement` of which this rank has all its experts; 0 = none
    misses: tuple[int, ...] = ()  # ranks of the prepared view whose first header has not come here


class HeartbeatReply(TaggedStruct, frozen=True):
    """monitor -> process. Who holds an older epoch, directory or term asks."""

    monitor: ProcessId
    term: int
    epoch: Epoch
    directory_version: int
    known: bool = True  # False: this monitor never heard your Hello; say it again


class AskView(TaggedStruct, frozen=True):
    """process -> monitor: send me the current View, the prepared one, and the Directory."""

    process: ProcessId


class AskStatus(TaggedStruct, frozen=True):
    """router or cli -> monitor: what GET /cluster shows."""

    process: ProcessId
    id: int


class Status(TaggedStruct, frozen=True):
    """monitor -> asker. ``body`` is JSON text."""

    id: int
    body: str
