"""The monitor's shell: `services.monitor.service` without sockets."""

from typing import TYPE_CHECKING

import msgspec

from common.config import ClusterConfig
from common.ids import ProcessId
from common.messages import Directory, Message, View, Worker
from services.monitor.actions import Action, Emit, Exit, Publish, Send
from services.monitor.monitor import Monitor
from tests.simulation.symbolic_model import NUM_EXPERTS
from tests.simulation.world import MONITOR, Frames, Node, World

if TYPE_CHECKING:
    from tests.simulation.client import ClientNode

_HEARS_BUS = ("router", "prefill", "decode", "planner")


class MonitorNode(Node):
    kind = MONITOR

    def __init__(self, world: World, name: str, process: ProcessId, config: ClusterConfig, num_layers: int) -> None:
        super().__init__(world, name, process)
        myself = Worker(self.process, MONITOR, name, "h", 1, self.endpoint)
        self.config = config
        self.core = Monitor(myself, config, num_layers, NUM_EXPERTS, world.now)
        self._num_connections = 0
        self.steps_to_live: int | None = None
        self._clients: dict[ProcessId, ClientNode] = {}
        world.monitor = self
        self.later(config.monitor.tick_s, self._tick)

    def next_connection(self) -> int:
        self._num_connections += 1
        return self._num_connections

    def watch_lifeline(self, client: "ClientNode") -> None:
        self._clients[client.process] = client

    def on_lifeline(self, process: ProcessId, number: int, opened: bool) -> None:
        if opened:
            self.run(lambda: self._perform(self.core.on_lifeline_opened(process, number, self.world.now)))
            return
        self.run(lambda: self._perform(self.core.on_lifeline_closed(process, number, self.world.now)))
        self.later(self.config.monitor.lifeline_suspicion_s + 0.001, self._tick_now)

    def on_fault(self, payload: bytes) -> None:
        self.run(lambda: self._perform(self.core.on_fault(payload, self.world.now)))

    def receive(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        self._perform(self.core.on_message(peer, message, self.world.now))

    def on_death(self) -> None:
        for client in self._clients.values():
            client.on_monitor_gone()

    def _tick(self) -> None:
        self._tick_now()
        self.later(self.config.monitor.tick_s, self._tick)

    def _tick_now(self) -> None:
        self._perform(self.core.on_tick(self.world.now))

    def _perform(self, wanted: list[Action]) -> None:
        for action in wanted:
            if self.steps_to_live is not None:
                self.steps_to_live -= 1
                if self.steps_to_live < 0:
                    self.die("signal KILL, between two words")
                    return
            match action:
                case Send(process=process, message=message):
                    # A heartbeat socket is one of its own.
                    name, _, lane = process.partition("#")
                    self.send(name, message, lane=lane)
                case Publish(message=message):
                    if isinstance(message, View):
                        self.world.checker.on_published(message)
                    self._publish(message)
                case Emit(event=event):
                    msgspec.msgpack.encode(event)  # what is no plain map fails here
                    self.world.checker.on_event(self, event)
                case Exit(reason=reason):
                    self.world.tell(f"{self.process} exits: {reason}")
                    self.die("exit 2")
        if self.is_alive:
            self.world.checker.on_monitor(self)

    def _publish(self, message: View | Directory) -> None:
        for kind in _HEARS_BUS:
            for node in self.world.of_kind(kind):
                self.send(node.process, message, lane="bus")
