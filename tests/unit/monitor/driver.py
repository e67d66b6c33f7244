"""Drives a monitor by hand: processes that follow it unless told otherwise, a clock that only the test moves."""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from common.config import ClusterConfig, DecodeConfig
from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank
from common.messages import (
    Exited,
    Heartbeat,
    Hello,
    Message,
    Prepare,
    RollAnswer,
    RollCall,
    SlotLeft,
    StagePlacement,
    View,
    VoidReport,
    Welcome,
    Worker,
)
from common.view import member_of
from services.monitor.actions import Action, Emit, Exit, Publish, Send
from services.monitor.monitor import Monitor

CONFIG = ClusterConfig(decode=DecodeConfig(num_ranks=3, max_ranks=5))
NUM_LAYERS, NUM_EXPERTS = 2, 6
TICK_S, BEAT_S = 0.05, 0.1
NO_INCARNATION, NO_EPOCH = Incarnation(0), Epoch(0)
Kind = TypeVar("Kind", bound=Message)


@dataclass
class Puppet:
    """A process as the test plays it. ``follows``: does what membership asks for at once."""

    process: ProcessId
    kind: str
    name: str
    agent: str = "agent-0"
    is_beating: bool = True
    follows: bool = True
    answers_roll_calls: bool = True
    rank: Rank = NO_RANK
    incarnation: Incarnation = NO_INCARNATION
    view: View | None = None
    term: int = 0
    state: str = "up"
    life: int = 0
    out_of: Epoch = NO_EPOCH
    progress: int = 0
    waits_for: tuple[int, ...] = ()
    copies_experts: bool = True  # at once
    staged: int = 0
    counters: dict[str, int] = field(default_factory=dict)
    misses: tuple[int, ...] = ()
    received: list[Message] = field(default_factory=list)

    @property
    def epoch(self) -> Epoch:
        return self.view.epoch if self.view else Epoch(0)

    def got(self, kind: type[Kind]) -> list[Kind]:
        return [message for message in self.received if isinstance(message, kind)]


class Driver:
    def __init__(self, config: ClusterConfig = CONFIG, now: float = 100.0, name: str = "monitor-1") -> None:
        self.now, self.config = now, config
        self.puppets: dict[ProcessId, Puppet] = {}
        self.views: list[View] = []
        self.events: list[dict[str, Any]] = []
        self.exits: list[str] = []
        self._num_connections = 0
        self.replace_monitor(name)

    def replace_monitor(self, name: str, num_experts: int = NUM_EXPERTS) -> None:
        myself = Worker(ProcessId(name), "monitor", "monitor", "h", 1, "")
        self.monitor = Monitor(myself, self.config, NUM_LAYERS, num_experts, self.now)

    @property
    def view(self) -> View | None:
        return self.monitor.group.current

    @property
    def epoch(self) -> Epoch:
        return self.monitor.group.epoch

    @property
    def ranks(self) -> list[int]:
        return [member.rank for member in self.monitor.group.members]

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]

    def last_event(self, kind: str) -> dict[str, Any]:
        return next(event for event in reversed(self.events) if event["kind"] == kind)

    # What happens.

    def enter(self, kind: str, name: str, process: str = "", follows: bool = True) -> Puppet:
        puppet = Puppet(ProcessId(process or f"{name}-a"), kind, name, follows=follows)
        if kind == "agent":
            puppet.agent = ""
        self.puppets[puppet.process] = puppet
        self.open_lifeline(puppet)
        self.hello(puppet)
        return puppet

    def enter_ranks(self, number: int, first: int = 0) -> list[Puppet]:
        return [self.enter("decode", f"decode-{index}") for index in range(first, first + number)]

    def form(self, number: int = 3) -> list[Puppet]:
        """Ranks in force, in a group of the desired size, with an agent."""
        self.enter("agent", "agent-0")
        puppets = self.enter_ranks(number)
        self.advance(2.0)
        assert self.ranks == list(range(min(number, self.config.decode.num_ranks)))
        return puppets

    def hello(self, puppet: Puppet, children: tuple[Puppet, ...] = ()) -> None:
        hello = Hello(
            puppet.process, puppet.kind, puppet.name, "h", 7, f"tcp://{puppet.name}", puppet.agent,
            f"{puppet.process}.{puppet.life}", children=tuple((c.process, c.name, 7) for c in children),
        )  # fmt: skip
        if puppet.kind == "decode" and puppet.view is not None:
            hello = msgspec.structs.replace(hello, rank=puppet.rank, incarnation=puppet.incarnation, view=puppet.view)
        self.say(puppet, hello)

    def beat(self, puppet: Puppet) -> None:
        self.say(
            puppet,
            Heartbeat(
                puppet.process, puppet.rank, puppet.incarnation, puppet.term, puppet.epoch, puppet.state,
                puppet.progress, puppet.waits_for, 0, puppet.out_of, puppet.counters, puppet.staged, puppet.misses,
            ),
            suffix="#beat",
        )  # fmt: skip

    def say(self, puppet: Puppet, message: Message, suffix: str = "") -> None:
        self.perform(self.monitor.on_message(ProcessId(puppet.process + suffix), message, self.now))

    def void(self, puppet: Puppet, accused: tuple[int, ...] = ()) -> None:
        puppet.state = "void"
        self.say(puppet, VoidReport(puppet.process, puppet.rank, puppet.incarnation, puppet.epoch, 1, accused))

    def answer(self, puppet: Puppet, accused: tuple[int, ...] = ()) -> None:
        puppet.state = "void"
        self.say(puppet, RollAnswer(puppet.process, puppet.rank, puppet.incarnation, puppet.epoch, 0, accused))

    def leave(self, puppet: Puppet, epoch: Epoch) -> None:
        left = SlotLeft(puppet.process, puppet.rank, puppet.incarnation, epoch)
        puppet.rank, puppet.incarnation, puppet.view, puppet.life = NO_RANK, Incarnation(0), None, puppet.life + 1
        puppet.state = "standby"
        self.say(puppet, left)
        self.hello(puppet)

    def exited(self, puppet: Puppet, reason: str = "signal KILL") -> None:
        puppet.is_beating = False
        agent = self.puppets[ProcessId("agent-0-a")]
        self.say(agent, Exited("agent-0", puppet.process, puppet.name, 7, reason))

    def open_lifeline(self, puppet: Puppet) -> int:
        self._num_connections += 1
        self.perform(self.monitor.on_lifeline_opened(puppet.process, self._num_connections, self.now))
        return self._num_connections

    def close_lifeline(self, puppet: Puppet, connection: int = 0) -> None:
        number = connection or [*self.puppets].index(puppet.process) + 1
        self.perform(self.monitor.on_lifeline_closed(puppet.process, number, self.now))

    def fault(self, identifier: str, action: str, **target: int | str) -> str:
        """Publishes it once; returns the status of its last event."""
        event = {"type": "fault", "id": identifier, "action": action, **target}
        self.perform(self.monitor.on_fault(msgspec.msgpack.encode(event), self.now))
        return self.fault_status(identifier)

    def fault_status(self, identifier: str) -> str:
        found = [event["status"] for event in self.events if event["kind"] == "fault" and event["id"] == identifier]
        return str(found[-1]) if found else ""

    def take_slot(self, puppet: Puppet) -> None:
        """What a Welcome gave to a puppet that does not follow."""
        welcome = puppet.got(Welcome)[-1]
        puppet.rank, puppet.incarnation, puppet.state = welcome.rank, welcome.incarnation, "joining"

    # Time.

    def advance(self, seconds: float) -> None:
        """Ticks and heartbeats in time."""
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            if round(self.now / TICK_S) % round(BEAT_S / TICK_S) == 0:
                for puppet in list(self.puppets.values()):
                    if puppet.is_beating:
                        self.beat(puppet)
            self.perform(self.monitor.on_tick(self.now))

    def sleep(self, seconds: float) -> None:
        """The monitor is stopped for so long; nothing reaches it meanwhile."""
        self.now += seconds

    def perform(self, wanted: list[Action]) -> None:
        for action in wanted:
            match action:
                case Send(process=process, message=message):
                    puppet = self.puppets.get(ProcessId(process.removesuffix("#beat")))
                    if puppet is not None:
                        self.receive(puppet, message)
                case Publish(message=View() as view):
                    self.views.append(view)
                case Publish():
                    pass
                case Emit(event=event):
                    self.events.append(event)
                case Exit(reason=reason):
                    self.exits.append(reason)

    def receive(self, puppet: Puppet, message: Message) -> None:
        puppet.received.append(message)
        if not puppet.follows:
            return
        match message:
            case Welcome(term=term, rank=rank, incarnation=incarnation):
                puppet.term = term
                if rank == NO_RANK and puppet.view is None:
                    puppet.rank, puppet.incarnation, puppet.state = NO_RANK, NO_INCARNATION, "standby"
                elif rank != NO_RANK and incarnation != puppet.incarnation:
                    puppet.rank, puppet.incarnation, puppet.state = rank, incarnation, "joining"
            case Prepare(view=view):
                self._follow(puppet, view)
            case StagePlacement() if puppet.copies_experts:
                puppet.staged = message.placement.version
            case View():
                if member_of(message, puppet.process) or puppet.kind != "decode":
                    self._follow(puppet, message)
                elif puppet.view is not None and message.epoch > puppet.epoch:
                    self.leave(puppet, message.epoch)
                elif puppet.rank != NO_RANK:
                    puppet.out_of = message.epoch
            case RollCall() if puppet.answers_roll_calls and puppet.view is not None:
                self.answer(puppet)
            case _:
                pass

    def _follow(self, puppet: Puppet, view: View) -> None:
        if view.epoch > puppet.epoch:
            puppet.view, puppet.state, puppet.term = view, "serving", view.term
