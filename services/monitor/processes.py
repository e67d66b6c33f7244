"""Every process that has said Hello to this monitor, and what is known of those that have not."""

from collections import OrderedDict
from dataclasses import dataclass

from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import Heartbeat, Hello, Member
from services.monitor.lifelines import Lifelines
from services.monitor.ticks import TickClock

_NUM_GONE = 4096
_FORGET_S = 60.0


@dataclass(slots=True)
class Process:
    """``beat`` is its last heartbeat; ``heard_at`` the time of its last word of any kind. ``must_greet``: it left its
    slot, and what it will use next (another heap) comes with its next Hello."""

    hello: Hello
    order: int  # of arrival
    heard_at: float
    beat: Heartbeat
    welcomed_at: float = 0.0
    doomed_at: float | None = None  # a KILL is on its way: it gets no slot
    must_greet: bool = False

    @property
    def id(self) -> ProcessId:
        return self.hello.process


@dataclass(frozen=True, slots=True)
class Child:
    """A process as its agent listed it."""

    agent: ProcessId
    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Stranger:
    """A process that has sent heartbeats, the first at ``since``, and no Hello.

    ``followed_s``: how long it has been heard to follow its present term. Gaps, in which one side may have been stopped
    or cut off, hardly count, and heartbeats that have piled up meanwhile do not.
    """

    beat: Heartbeat
    since: float
    heard_at: float
    followed_s: float = 0.0

    def on_heartbeat(self, beat: Heartbeat, most_s: float, now: float) -> "Stranger":
        followed_s = self.followed_s + min(now - self.heard_at, most_s) if beat.term == self.beat.term else 0.0
        return Stranger(beat, self.since, now, followed_s)


class ProcessTable:
    def __init__(self, clock: TickClock, lifelines: Lifelines, heartbeat_timeout_s: float) -> None:
        self._clock, self._lifelines, self._timeout_s = clock, lifelines, heartbeat_timeout_s
        self._processes: dict[ProcessId, Process] = {}
        self._num_arrived = 0
        self.children: dict[ProcessId, Child] = {}
        self.gone: OrderedDict[ProcessId, str] = OrderedDict()  # known to be gone, and how that is known
        self.strangers: dict[ProcessId, Stranger] = {}
        self._agents_of_unheard: dict[ProcessId, str] = {}  # names, of members that a predecessor left

    def on_hello(self, hello: Hello, now: float) -> tuple[Process, str]:
        """The record, and what the Hello is: "new", "again" or, under a name that had another process, "restarted"."""
        process = self._processes.get(hello.process)
        kind = "again"
        if process is None:
            known = {other.hello.name for other in self._processes.values()} | self._names_gone
            kind = "restarted" if hello.name in known else "new"
            stranger = self.strangers.pop(hello.process, None)
            beat = (
                stranger.beat if stranger else Heartbeat(hello.process, hello.rank, hello.incarnation, state="starting")
            )
            self._num_arrived += 1
            process = self._processes[hello.process] = Process(hello, self._num_arrived, now, beat)
        process.hello, process.heard_at, process.must_greet = hello, now, False
        if hello.view is not None and hello.view.epoch >= process.beat.epoch:
            process.beat = Heartbeat(hello.process, hello.rank, hello.incarnation, epoch=hello.view.epoch)
        if hello.kind == "agent":
            self._adopt_children(process)
        return process, kind

    def on_heartbeat(self, beat: Heartbeat, now: float) -> Process | None:
        """None: this process has not said Hello to this monitor."""
        process = self._processes.get(beat.process)
        if process is None:
            stranger = self.strangers.get(beat.process)
            most_s = self._timeout_s / 10
            self.strangers[beat.process] = (
                stranger.on_heartbeat(beat, most_s, now) if stranger else Stranger(beat, now, now)
            )
            return None
        process.beat, process.heard_at = beat, now
        return process

    def on_unheard(self, member: Member) -> None:
        """A member of the group that a former monitor left. It never greeted this one; its view tells whose it was."""
        self._agents_of_unheard[member.process] = member.agent

    def on_slot_left(self, process: ProcessId) -> None:
        """Its next heartbeat would say so, too."""
        if record := self._processes.get(process):
            record.beat = Heartbeat(process)

    def on_gone(self, process: ProcessId, proof: str) -> Process | None:
        """It was reaped. Its record, if there was one."""
        self.gone[process] = proof
        if len(self.gone) > _NUM_GONE:
            self.gone.popitem(last=False)
        self.children.pop(process, None)
        self.strangers.pop(process, None)
        self._agents_of_unheard.pop(process, None)
        self._lifelines.forget(process)
        return self._processes.pop(process, None)

    @property
    def _names_gone(self) -> set[str]:
        return {process.rpartition("-")[0] for process in self.gone}

    def _adopt_children(self, agent: Process) -> None:
        """The list is whole: whom this agent no longer lists, it has no more, and neither has a former life of it."""
        lives = [p for p in self.of_kind("agent") if p.hello.name == agent.hello.name]
        others = self._processes.keys() - {life.id for life in lives if life.order <= agent.order}
        self.children = {key: child for key, child in self.children.items() if child.agent in others}
        for process, name, pid in agent.hello.children:
            if process not in self.gone:
                self.children[process] = Child(agent.id, name, pid)

    def get(self, process: ProcessId) -> Process | None:
        return self._processes.get(process)

    def all(self) -> list[Process]:
        """In the order of their arrival."""
        return list(self._processes.values())

    def of_kind(self, kind: str) -> list[Process]:
        return [process for process in self._processes.values() if process.hello.kind == kind]

    def by_name(self, name: str, now: float) -> Process | None:
        """The live process of that name."""
        found = [process for process in self._processes.values() if process.hello.name == name]
        return next((process for process in reversed(found) if self.is_live(process, now)), None)

    def silence_s(self, process: Process, now: float) -> float:
        return self._clock.elapsed(process.heard_at, now)

    def is_live(self, process: Process, now: float) -> bool:
        cut = self._lifelines.is_cut(process.id, now)
        return not cut and self.silence_s(process, now) <= self._timeout_s

    def agent_of(self, process: ProcessId, now: float) -> tuple[ProcessId, int] | None:
        """The live agent that can signal ``process``, and the pid it knows it by; None where nobody can. Also a later
        life of its agent: that one has found what its predecessor left running, so it knows who is gone."""
        record, child = self._processes.get(process), self.children.get(process)
        name = record.hello.agent if record is not None else self._agents_of_unheard.get(process, "")
        for agent in reversed(self.of_kind("agent")):
            if not self.is_live(agent, now):
                continue
            if child is not None and child.agent == agent.id:
                return agent.id, child.pid
            if name and name == agent.hello.name:
                return agent.id, record.hello.pid if record is not None else 0
        return None

    def lost_for_good(self, now: float) -> list[ProcessId]:
        """Silent processes that nobody will report as reaped: their agent is a new one that did not find them, or there
        is none and the kernel has closed their lifeline long since."""
        lost = []
        for process in self._processes.values():
            if process.id in self.children or self.silence_s(process, now) <= self._timeout_s:
                continue
            agent = self.agent_of(process.id, now)
            if agent is None:
                is_lost = self._lifelines.is_cut_for(process.id, self._timeout_s, now)
            else:
                is_lost = not self._lifelines.is_open(process.id) and self._agent_disowns(agent[0], process)
            if is_lost:
                lost.append(process.id)
        return lost

    def _agent_disowns(self, agent: ProcessId, process: Process) -> bool:
        record = self._processes[agent]
        return record.order > process.order

    def forget_silent(self, keep: set[ProcessId], now: float) -> None:
        """Drops what has not been heard of for a minute and holds nothing."""
        for process in self.all():
            if process.id not in keep and self.silence_s(process, now) > _FORGET_S:
                del self._processes[process.id]
                self._lifelines.forget(process.id)
                # Nobody is left who could tell what became of them.
                self.children = {key: child for key, child in self.children.items() if child.agent != process.id}
        for id, stranger in list(self.strangers.items()):
            if self._clock.elapsed(stranger.since, now) > _FORGET_S:
                del self.strangers[id]


def claims(process: Process, rank: Rank, incarnation: Incarnation) -> bool:
    """Whether the process is in the group under this slot, by its own word."""
    beat = process.beat
    return beat.rank == rank and beat.incarnation == incarnation and beat.epoch > 0


def has_moved_on(process: Process) -> bool:
    """A decode process that has entered a view since it said Hello, so that nobody may have shown that view."""
    shown = process.hello.view.epoch if process.hello.view else Epoch(0)
    return process.hello.kind == "decode" and process.beat.epoch > shown


def reports(process: Process, incarnation: Incarnation) -> Epoch:
    """The epoch of its last heartbeat under ``incarnation``; 0 for heartbeats of another."""
    return process.beat.epoch if process.beat.incarnation == incarnation else Epoch(0)
