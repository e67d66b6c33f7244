"""What every process does towards the monitor: `common.monitor_client` without its sockets. `Obedience` decides."""

from common.ids import ProcessId
from common.messages import (
    AskView,
    Directory,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Inject,
    Injected,
    Message,
    Refusal,
    View,
)
from common.network_cut import NetworkCut
from common.obedience import Obedience
from tests.simulation.world import MONITOR, Bad, Frames, Node, World

HELLO_AGAIN_S, RECONNECT_S, BEAT_S = 0.5, 0.02, 0.1
_LIFELINE_S = 0.001


class ClientNode(Node):
    """A process that is not the monitor. Heartbeats have a lane of their own, as they have a socket."""

    def __init__(self, world: World, name: str, process: ProcessId | None = None) -> None:
        super().__init__(world, name, process)
        self.obedience = Obedience()
        self.network = NetworkCut()
        self._injected: dict[str, Injected] = {}
        self._lifeline: tuple[Node, int] | None = None  # the monitor that holds the other end

    def start(self) -> None:
        """The process is up."""
        self._greet()
        self._beat()
        self.connect()

    # To be filled in.

    def hello(self) -> Hello:
        raise NotImplementedError

    def heartbeat(self) -> Heartbeat:
        raise NotImplementedError

    def on_message(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        """Of the monitor that this process obeys, or of a peer."""

    # The control socket.

    def tell_monitor(self, message: Message) -> None:
        self.send(MONITOR, message)

    def send(self, target: str, message: Message, frames: Frames = (), lane: str = "") -> None:
        """The word that a cut is in force passes it."""
        side = MONITOR if target == MONITOR else "peers"
        if isinstance(message, Injected) or not self.network.drops(side, "out", self.world.now):
            super().send(target, message, frames, lane)

    def _cut_network(self, inject: Inject) -> None:
        if inject.id not in self._injected:
            self.network.cut(inject.which, inject.direction, self.world.now + inject.duration_s)
            if inject.which != MONITOR:  # a first header that is lost holds up whoever was to read it
                for node in self.world.of_kind("decode"):
                    node.excuse = node.excuse or f"a neighbour of {self.process}"
            self.world.tell(f"{self.process} loses {inject.direction} of {inject.which} for {inject.duration_s:.2f} s")
            self._injected[inject.id] = Injected(self.process, inject.id, True, "messages are dropped")
        self.tell_monitor(self._injected[inject.id])

    def say_hello(self) -> None:
        self.obedience.is_welcomed = False
        self.tell_monitor(self.hello())

    def _greet(self) -> None:
        if not self.obedience.is_welcomed:
            self.tell_monitor(self.hello())
        self.later(HELLO_AGAIN_S, self._greet)

    def _beat(self) -> None:
        self.send(MONITOR, self.heartbeat(), lane="beat")
        self.later(BEAT_S, self._beat)

    def receive(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        process, _, lane = peer.partition("#")
        is_monitor = self.world.nodes[process].kind == MONITOR
        from_monitor = is_monitor and lane != "bus"
        if self.network.drops(MONITOR if is_monitor else "peers", "in", self.world.now):
            return
        match message:
            case HeartbeatReply():
                if self.obedience.on_reply(message, self.heartbeat().epoch):
                    self.tell_monitor(AskView(self.process))
                return
            case Refusal(reason=reason) if from_monitor:
                if message.final:
                    raise Bad(f"the monitor refuses {self.process}: {reason}")
                return
            case _ if from_monitor and not self.obedience.on_message(message):
                return
            case Inject():
                self.excuse = self.excuse or message.action
            case _:
                pass
        match message:
            case Inject(action="drop_network"):
                self._cut_network(message)
                return
            case View() | Directory() if not from_monitor and not self.obedience.accepts(message):
                return
            case _:
                pass
        self.on_message(peer, message, frames)

    # The lifeline. The kernel keeps it, so it opens and closes whatever the process does.

    def connect(self) -> None:
        world = self.world
        if not self.is_alive:
            return
        if world.monitor is None or not world.monitor.is_alive:
            world.at(RECONNECT_S, lambda: self.run(self.connect))
            return
        monitor = world.monitor
        number = monitor.next_connection()
        self._lifeline = (monitor, number)
        monitor.watch_lifeline(self)
        world.at(_LIFELINE_S, lambda: monitor.on_lifeline(self.process, number, opened=True))

    def cut_lifeline(self) -> None:
        if self._lifeline is not None:
            monitor, number = self._lifeline
            self._lifeline = None
            self.world.at(_LIFELINE_S, lambda: monitor.on_lifeline(self.process, number, opened=False))  # type: ignore[attr-defined]

    def flap(self) -> None:
        """The stream breaks, and is made again."""
        self.world.tell(f"the lifeline of {self.process} breaks")
        self.cut_lifeline()
        self.later(RECONNECT_S, self.connect)

    def on_monitor_gone(self) -> None:
        self._lifeline = None
        self.later(RECONNECT_S, self.connect)

    def on_death(self) -> None:
        self.cut_lifeline()
