"""How many decode ranks and prefill workers are wanted, and the way there (``regrow scale``).

    settled --scale command, or an agent that was told another number--> scaling --all there, none too many--> settled

Growing: the agent starts children; decode ones greet as standbys and get slots like any other. Shrinking: surplus
holders of slots leave the group in one view (`Membership.shrink`), become standbys, and then their agent ends them.

Beside the ranks that are wanted an agent runs ``decode.num_standbys`` processes that take over at once where a rank is
lost, while its own process starts again.

The number is kept by the agent, which writes it down before it acts and says it with every heartbeat: a restarted
monitor goes by that, so an interrupted scaling ends in the old size or in the new one. Where no agent can start
children (one child per container), standbys make the group grow, those who leave stay as standbys, and a restarted
monitor keeps the ranks that it finds, but wants no fewer than are configured.
"""

from collections.abc import Mapping

from common.config import ClusterConfig
from common.ids import NO_RANK, ProcessId
from common.messages import SetChildren
from common.view import ranks
from services.monitor.actions import Outbox
from services.monitor.fences import Fences
from services.monitor.group import Group
from services.monitor.processes import Process, ProcessTable
from services.monitor.slots import Slot, SlotState, SlotTable

KINDS = ("decode", "prefill")
_TELL_AGAIN_S = 0.5


class Sizing:
    def __init__(
        self,
        monitor: ProcessId,
        config: ClusterConfig,
        table: ProcessTable,
        slots: SlotTable,
        group: Group,
        fences: Fences,
        outbox: Outbox,
    ) -> None:
        self._monitor, self._max_ranks = monitor, config.decode.max_ranks
        self._table, self._slots, self._group, self._fences, self._outbox = table, slots, group, fences, outbox
        self._wanted = {"decode": config.decode.num_ranks, "prefill": config.prefill.num_workers}
        self._num_standbys = {"decode": config.decode.num_standbys, "prefill": 0}  # children that an agent runs beyond
        self._scaling: dict[str, int] = {}  # kinds that are not settled, and how many were wanted before
        self._known: set[str] = set()  # kinds of which a command or an agent has told the number
        self._told: dict[str, tuple[SetChildren, float]] = {}
        self.term = 0

    @property
    def num_ranks(self) -> int:
        return self._wanted["decode"]

    @property
    def wanted(self) -> Mapping[str, int]:
        return self._wanted

    def on_take_over(self) -> None:
        """The ranks that are there stay, unless an agent knows that fewer are wanted."""
        self._wanted["decode"] = max(self._wanted["decode"], self._slots.num_taken)

    # Commands.

    def refusal(self, counts: Mapping[str, int], now: float) -> str:
        """Why this size cannot be had, in one line; empty if it can."""
        count, least = counts.get("decode", self.num_ranks), self._group.experts.min_ranks
        if count > self._max_ranks:
            return f"decode.max_ranks is {self._max_ranks}: buffers were sized for that many at the start"
        if "decode" in counts and count < least:
            return f"{count} ranks have no room for all experts; {least} have"
        if all(self._has_agent_for(kind) for kind in counts):
            return ""
        if "prefill" in counts:
            return "no agent here can start or end prefill workers; start or stop them yourself"
        num_live = sum(self._table.is_live(process, now) for process in self._table.of_kind("decode"))
        if count > num_live:
            return f"there are {num_live} decode processes, and no agent here can start more; start them first"
        return ""

    def scale(self, counts: Mapping[str, int], cause: str, now: float) -> None:
        for kind, count in counts.items():
            self._known.add(kind)
            self._want(kind, count, cause, now)

    def _want(self, kind: str, count: int, cause: str, now: float) -> None:
        if (was := self._wanted[kind]) != count:
            self._wanted[kind], self._scaling[kind] = count, was
            fields = {"what": kind, "was": was, "wanted": count, "cause": cause}
            self._outbox.emit("scaling", now, epoch=self._group.epoch, **fields)

    # The way there.

    def advance(self, now: float) -> None:
        """After every event, before slots are given: learns, tells the agent, ends what has settled."""
        agent = self._agent(now)
        for kind in KINDS:
            if agent is not None:
                self._learn(agent, kind, now)
                self._tell(agent, kind, now)
            if kind in self._scaling and self._is_reached(agent, kind, now):
                fields = {"what": kind, "was": self._scaling.pop(kind), "wanted": self._wanted[kind]}
                self._outbox.emit("scaled", now, epoch=self._group.epoch, **fields)

    def proof(self, counts: Mapping[str, int], now: float) -> str:
        """Of a scaling that is over; empty before."""
        agent, seen = self._agent(now), []
        if any(self._wanted[kind] != count or not self._is_reached(agent, kind, now) for kind, count in counts.items()):
            return ""
        if "decode" in counts and (view := self._group.current):
            seen.append(f"view {view.epoch} of ranks {list(ranks(view))}, adopted by all")
            seen += [f"rank {slot.rank} masked" for slot in self._slots.in_state(SlotState.MASKED)]
        if "prefill" in counts and agent is not None:
            seen.append(f"up: {', '.join(sorted(p.hello.name for p in self._children(agent, 'prefill', now)))}")
        return "; ".join(seen)

    def surplus(self) -> list[Slot]:
        """Holders of slots that have to go: first those that do not serve, then the highest ranks."""
        if "decode" not in self._scaling:
            return []
        taken = [*self._slots.in_state(SlotState.HELD), *self._slots.in_state(SlotState.MASKED)]
        taken.sort(key=lambda slot: (self._group.member(slot.process) is not None, -slot.rank))
        return taken[: max(0, len(taken) - self.num_ranks)]

    def _is_reached(self, agent: Process | None, kind: str, now: float) -> bool:
        if agent is not None:
            children, count = self._children(agent, kind, now), self._num_children(kind)
            if len(children) != count or _counts(agent, kind) != (count, count):
                return False
            if kind == "prefill":
                return all(process.beat.state == "up" for process in children)
        elif self._has_agent_for(kind):
            return False  # it is being started again
        members = [self._group.member(slot.process) for slot in self._slots.in_state(SlotState.HELD)]
        is_whole = self._slots.num_taken == self.num_ranks and None not in members
        return is_whole and self._group.is_adopted and self._group.prepared is None

    # The agent, and what it runs.

    def _agent(self, now: float) -> Process | None:
        """The one that can change the number of its children."""
        for agent in reversed(self._table.of_kind("agent")):
            if f"wanted_{KINDS[0]}" in agent.beat.counters and self._table.is_live(agent, now):
                return agent
        return None

    def _has_agent_for(self, kind: str) -> bool:
        return any(f"wanted_{kind}" in agent.beat.counters for agent in self._table.of_kind("agent"))

    def _children(self, agent: Process, kind: str, now: float) -> list[Process]:
        """Live ones that have greeted, in the order of their arrival."""
        found = [process for process in self._table.of_kind(kind) if process.hello.agent == agent.hello.name]
        return [process for process in found if self._table.is_live(process, now)]

    def _learn(self, agent: Process, kind: str, now: float) -> None:
        if kind not in self._known:
            self._known.add(kind)
            count = max(1, _counts(agent, kind)[0] - self._num_standbys[kind])
            self._want(kind, count, f"{agent.hello.name} was told so before", now)

    def _num_children(self, kind: str) -> int:
        return self._wanted[kind] + self._num_standbys[kind]

    def _tell(self, agent: Process, kind: str, now: float) -> None:
        (wanted, num_children), count = _counts(agent, kind), self._num_children(kind)
        if (wanted, num_children) == (count, count):
            return
        retire = tuple(self._retirable(agent, kind, now)[: max(0, num_children - count)])
        message = SetChildren(self._monitor, self.term, kind, count, retire)
        last, told_at = self._told.get(agent.id + kind, (None, 0.0))
        if message == last and now - told_at < _TELL_AGAIN_S:
            return
        self._told[agent.id + kind] = message, now
        for process in retire:
            if record := self._table.get(process):
                record.doomed_at = now  # it gets no slot while it may be about to end
        self._outbox.send(agent.id, message)

    def _retirable(self, agent: Process, kind: str, now: float) -> list[ProcessId]:
        """Children that may be ended, the youngest first."""
        return [process.id for process in reversed(self._children(agent, kind, now)) if self._is_idle(process)]

    def _is_idle(self, process: Process) -> bool:
        """A decode process without a slot, by everybody's word. Requests of a prefill worker are placed again."""
        if process.hello.kind != "decode":
            return True
        has_slot = self._slots.of_process(process.id) is not None or process.beat.rank != NO_RANK
        return not has_slot and process.id not in self._fences


def _counts(agent: Process, kind: str) -> tuple[int, int]:
    """What it was told last, and how many it runs, or is about to start."""
    counters = agent.beat.counters
    return counters.get(f"wanted_{kind}", 0), counters.get(f"children_{kind}", 0)
