"""The processes of a `World`: what they send, what they do with what comes, how they stop and die."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from common.config import ClusterConfig, DecodeConfig
from common.ids import Epoch, ProcessId
from common.messages import (
    AskView,
    Exited,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Prepare,
    RollCall,
    Signal,
    SignalDone,
    View,
    Welcome,
    Worker,
)
from common.obedience import Obedience
from services.decode import actions as rank_actions
from services.decode.membership import Membership
from services.decode.rank_state import RankState
from services.decode.rank_status import RankStatus
from services.monitor.monitor import Monitor

if TYPE_CHECKING:
    from tests.unit.monitor.group_world import World

NUM_LAYERS, NUM_EXPERTS = 2, 8
CONFIG = ClusterConfig(decode=DecodeConfig(num_ranks=4, max_ranks=8))
DEADLINE_S, POLL_S, BEAT_S, TICK_S = 2.0, 0.02, 0.1, 0.05


class Bad(AssertionError):
    """A promise was broken; the text says which."""


class Node:
    """A process: it may be dead, or stopped until some time, and then what happens to it waits."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name = world, name
        self.process = ProcessId(f"{name}-{world.next_number():x}")
        self.is_alive, self.stopped_until = True, 0.0
        self.is_faulty = False  # killed or stopped at some time: may be removed

    def run(self, action: Callable[[], None]) -> None:
        if not self.is_alive:
            return
        if self.stopped_until > self.world.now:
            self.world.at_time(self.stopped_until, lambda: self.run(action))
        else:
            action()

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.world.at(delay_s, lambda: self.run(action))

    @property
    def is_running(self) -> bool:
        return self.is_alive and self.stopped_until <= self.world.now

    def stop_for(self, seconds: float) -> None:
        self.stopped_until, self.is_faulty = max(self.stopped_until, self.world.now + seconds), True


class Client(Node):
    """What every process does towards the monitor, as in `common.monitor_client`."""

    kind = "router"

    def __init__(self, world: "World", name: str) -> None:
        super().__init__(world, name)
        self.obedience = Obedience()
        self.view: View | None = None
        self.connection = 0
        self.connect()
        self.later(0.0, self.greet)
        self.later(world.random.random() * BEAT_S, self.beat)

    def hello(self) -> Hello:
        return Hello(self.process, self.kind, self.name, "h", 1, "", "agent-0")

    def heartbeat(self) -> Heartbeat:
        epoch = self.view.epoch if self.view else Epoch(0)
        return Heartbeat(self.process, term=self.obedience.term, epoch=epoch)

    def connect(self) -> None:
        """Opens a lifeline; tried again while there is no monitor."""
        self.connection = self.world.next_number()
        number = self.connection
        self.world.tell_monitor(self, lambda m, now: m.on_lifeline_opened(self.process, number, now), lossy=False)

    def cut(self) -> None:
        number = self.connection
        self.world.tell_monitor(None, lambda m, now: m.on_lifeline_closed(self.process, number, now), lossy=False)

    def flap(self) -> None:
        self.cut()
        self.later(0.02, self.connect)

    def die(self) -> None:
        if self.is_alive:
            self.is_alive, self.is_faulty = False, True
            self.cut()

    def send(self, message: Message, peer: str = "") -> None:
        identity = ProcessId(peer or self.process)
        self.world.tell_monitor(self, lambda m, now: m.on_message(identity, message, now))

    def greet(self) -> None:
        if not self.obedience.is_welcomed:
            self.send(self.hello())
        self.later(0.5, self.greet)

    def say_hello(self) -> None:
        self.obedience.is_welcomed = False
        self.send(self.hello())

    def beat(self) -> None:
        self.send(self.heartbeat(), f"{self.process}#beat")
        self.later(BEAT_S, self.beat)

    def receive(self, message: Message) -> None:
        if isinstance(message, HeartbeatReply):
            if self.obedience.on_reply(message, self.heartbeat().epoch):
                self.send(AskView(self.process))
        elif self.obedience.on_message(message):
            self.on_message(message)

    def on_message(self, message: Message) -> None:
        view = message.view if isinstance(message, Welcome) else message
        if isinstance(view, View) and (self.view is None or view.epoch > self.view.epoch):
            self.view = view


class RankNode(Client):
    """A decode process. Its data path is `World.rounds`."""

    kind = "decode"

    def __init__(self, world: "World", name: str) -> None:
        self.membership = Membership(ProcessId(""), 30.0, world.now)
        super().__init__(world, name)
        self.membership = Membership(self.process, 30.0, world.now)
        self.life, self.progress, self.waits_for = 0, 0, ()
        self.waiting_since: float | None = None
        self.later(POLL_S, self.poll)

    waits_for: tuple[int, ...]

    def hello(self) -> Hello:
        status = RankStatus.of(self.membership, self.life)
        return status.hello(self.process, self.name, "h", 1, self.process, "agent-0", f"{self.process}.{self.life}")

    def heartbeat(self) -> Heartbeat:
        status = RankStatus.of(self.membership, self.life)
        return status.heartbeat(self.process, self.obedience.term, self.progress, self.waits_for, {})

    def on_message(self, message: Message) -> None:
        membership, now = self.membership, self.world.now
        if not isinstance(message, Signal):
            membership.on_sign_of_monitor(now)
        match message:
            case Welcome():
                self.perform(membership.on_welcome(message.rank, message.incarnation, message.view, now))
            case Prepare():
                self.perform(membership.on_prepare(message.view, message.base_epoch, now))
            case View():
                self.perform(membership.on_view(message, now))
            case RollCall():
                membership.on_term(message.term)
                self.perform(membership.on_roll_call(message.epoch, self.waits_for, now))
            case _:
                pass

    def poll(self) -> None:
        membership = self.membership
        self.perform(membership.on_tick(self.world.now))
        if awaited := membership.awaited_headers:
            epoch, senders = awaited
            if all((epoch, rank) in self.world.first_headers for rank in senders):
                self.perform(membership.on_first_headers(epoch, self.world.now))
        self.later(POLL_S, self.poll)

    def perform(self, wanted: list[rank_actions.Action]) -> None:
        for action in wanted:
            match action:
                case rank_actions.CloseSlot(was_member=True):
                    self.life += 1
                case rank_actions.MapHeaps(view=view):
                    self.later(self.world.random.uniform(0.001, 0.15), lambda view=view: self.mapped(view))  # type: ignore[misc]
                case rank_actions.Announce(view=view):
                    self.world.first_headers.add((view.epoch, self.membership.rank))
                case rank_actions.Adopt(view=view):
                    self.world.on_adopted(view)
                    self.world.first_headers.add((view.epoch, self.membership.rank))
                    self.waits_for, self.waiting_since = (), None
                case rank_actions.PoisonMembers():
                    self.world.poisoned.add(self.membership.epoch)
                case rank_actions.Tell(message=message):
                    self.send(message)
                case rank_actions.SayHello():
                    self.say_hello()
                case rank_actions.ForwardView(view=view, endpoints=endpoints):
                    self.world.forward(self, view, endpoints)
                case _:
                    pass

    def mapped(self, view: View) -> None:
        if self.membership.state is not RankState.STOPPED:
            self.perform(self.membership.on_heaps_mapped(view.epoch, self.world.now))

    def end_round(self, next_epoch: Epoch) -> None:
        self.progress += 1
        self.waits_for, self.waiting_since = (), None
        self.perform(self.membership.on_clean_round(next_epoch, self.world.now))

    def end_round_void(self, accused: tuple[int, ...]) -> None:
        self.world.poisoned.add(self.membership.epoch)
        self.perform(self.membership.on_void_round(1, accused, self.world.now))


class Agent(Client):
    """Starts decode processes again, reports exits, sends signals and proves them."""

    kind = "agent"

    def hello(self) -> Hello:
        children = tuple((rank.process, rank.name, 1) for rank in self.world.ranks if rank.is_alive)
        return Hello(self.process, "agent", self.name, "h", 1, "", children=children)

    def on_message(self, message: Message) -> None:
        if isinstance(message, Signal):
            self.world.on_signal(message)
            self.later(0.01, lambda: self.send(SignalDone(message.id, message.process, True, "reaped: signal KILL")))

    def on_death(self, rank: RankNode) -> None:
        exited = Exited("agent-0", rank.process, rank.name, 1, "signal KILL")
        for number in range(20):
            self.later(0.005 + 0.5 * number, lambda: self.send(exited))
        self.later(self.world.random.uniform(0.3, 1.5), lambda: self.world.start_rank(rank.name))


class MonitorNode(Node):
    def __init__(self, world: "World") -> None:
        super().__init__(world, "monitor")
        myself = Worker(self.process, "monitor", "monitor", "h", 1, "")
        self.core = Monitor(myself, CONFIG, NUM_LAYERS, NUM_EXPERTS, world.now)
        self.later(TICK_S, self.tick)

    def tick(self) -> None:
        self.world.perform(self, self.core.on_tick(self.world.now))
        self.later(TICK_S, self.tick)
