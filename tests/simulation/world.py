"""A virtual clock, the processes that live under it, and the network between them. One seed is one story.

Nothing here runs by itself: `World.run_until` takes the next event from a queue. A process may be dead, or stopped
until some time; what happens to a stopped one waits for it. Messages are lost, doubled, late and out of order as the
`Weather` of their plane says; links may be cut in one direction. Lifelines are the kernel's: quick, and not lost.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from common.ids import ProcessId, make_process_id
from common.messages import Message, decode, encode

if TYPE_CHECKING:
    from tests.simulation.checker import Checker
    from tests.simulation.memory import Memory
    from tests.simulation.monitor_node import MonitorNode

Frames = Sequence[memoryview]
MONITOR = "monitor"  # the address of whoever is the monitor at that time
_RETRY_S = 0.1
_IN_PROCESS_S = 0.003  # what a process sent so shortly before its death may never have left it


class Bad(AssertionError):
    """A promise was broken; the text says which."""


ON_A_BROKEN_CABLE = "on a broken cable"


@dataclass(frozen=True, slots=True)
class Weather:
    """Of one plane of the network. ``tail_s`` bounds the rare long delays."""

    loss: float = 0.0
    doubling: float = 0.0
    slow: float = 0.05  # share of messages that take up to tail_s
    tail_s: float = 0.3
    in_order: bool = True


class Node:
    """A process."""

    kind = ""

    def __init__(self, world: "World", name: str, process: ProcessId | None = None) -> None:
        self.world, self.name = world, name
        self.process = process or make_process_id(name, world.random.getrandbits(64))
        self.is_alive, self.died_at, self.stopped_until = True, 0.0, 0.0
        self.life = 0  # changes with the memory that others map
        # Why this process may be put out of the group.
        self.excuse = ON_A_BROKEN_CABLE if any(name in pair for pair in world.broken_cables) else ""
        world.nodes[self.process] = self

    @property
    def is_running(self) -> bool:
        return self.is_alive and self.stopped_until <= self.world.now

    @property
    def endpoint(self) -> str:
        return f"tcp://{self.process}"

    def run(self, action: Callable[[], None]) -> None:
        """Now, or when it is continued, or never."""
        if not self.is_alive:
            return
        if self.stopped_until > self.world.now:
            self.world.at_time(self.stopped_until, lambda: self.run(action))
        else:
            action()

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.world.at(delay_s, lambda: self.run(action))

    def stop_for(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after that time."""
        if self.is_alive:
            self.excuse = self.excuse or "stopped"
            self.stopped_until = max(self.stopped_until, self.world.now + seconds)
            self.world.tell(f"{self.process} stops for {seconds:.2f} s")

    def die(self, reason: str = "signal KILL") -> None:
        """Whatever it was doing."""
        if self.is_alive:
            self.is_alive, self.died_at = False, self.world.now
            self.excuse = self.excuse or "killed"
            self.world.tell(f"{self.process} dies: {reason}")
            self.on_death()
            self.world.on_death(self, reason)

    def terminate(self) -> None:
        """SIGTERM."""
        self.die("exit 0")

    def on_death(self) -> None:
        """Let go of what only the simulation holds."""

    def send(self, target: str, message: Message, frames: Frames = (), lane: str = "") -> None:
        self.world.send(self, target, message, frames, lane)

    def receive(self, peer: ProcessId, message: Message, frames: Frames) -> None:
        """A message has arrived."""


class World:
    """``control``: to and from the monitor and the bus; ``data``: between router, prefill and decode."""

    def __init__(self, seed: int, control: Weather, data: Weather) -> None:
        self.seed, self.random, self.now = seed, random.Random(seed), 0.0
        self.control, self.data = control, data
        self.nodes: dict[str, Node] = {}
        self.monitor: MonitorNode | None = None
        self.running: Node | None = None  # whose stream is running right now
        self.cuts: dict[tuple[str, str], float] = {}  # (source, target): until when
        self.broken_paths: dict[tuple[str, str], tuple[int, int]] = {}  # (writer, owner of the memory): their lives
        self.broken_cables: dict[
            tuple[str, str], float
        ] = {}  # names of writer and owner, also of later lives: until when
        self.num_faults: Counter[str] = Counter()
        self.death_watchers: list[Callable[[Node, str], None]] = []
        self.lines: list[tuple[float, str]] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = self._num_pids = 0
        self._arrivals: dict[tuple[str, str, str], float] = {}
        self.memory: Memory
        self.checker: Checker

    # Time.

    def at(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at_time(self.now + delay_s, action)

    def at_time(self, time_s: float, action: Callable[[], None]) -> None:
        """Equal times keep the order in which they were asked for."""
        self._order += 1
        heapq.heappush(self._queue, (time_s, self._order, action))

    def run_until(self, end_s: float) -> None:
        queue = self._queue
        while queue and queue[0][0] <= end_s:
            self.now, _, action = heapq.heappop(queue)
            action()
        self.now = end_s

    # The story.

    def tell(self, line: str) -> None:
        self.lines.append((self.now, line))

    def story(self) -> list[str]:
        return [f"{now:9.4f} {line}" for now, line in self.lines]

    # Processes.

    def next_pid(self) -> int:
        self._num_pids += 1
        return 1000 + self._num_pids

    def of_kind(self, kind: str) -> list[Node]:
        """Those alive, in the order of their start."""
        return [node for node in self.nodes.values() if node.kind == kind and node.is_alive]

    def by_endpoint(self, endpoint: str) -> Node | None:
        return self.nodes.get(endpoint.removeprefix("tcp://"))

    def on_death(self, node: Node, reason: str) -> None:
        for watcher in self.death_watchers:
            watcher(node, reason)

    # The network.

    def cut(self, source: str, target: str, seconds: float) -> None:
        self.cuts[source, target] = self.now + seconds
        self.tell(f"nothing passes from {source} to {target} for {seconds:.2f} s")

    def is_cut(self, source: str, target: str) -> bool:
        return self.cuts.get((source, target), 0.0) > self.now

    def delay(self, weather: Weather) -> float:
        if self.random.random() < weather.slow:
            return 0.01 + (weather.tail_s - 0.01) * self.random.random() ** 3
        return self.random.uniform(0.0005, 0.01)

    def send(self, source: Node, target: str, message: Message, frames: Frames, lane: str) -> None:
        """The message travels as bytes. What is sent to a monitor that is away may still reach the next one."""
        if not source.is_alive:
            return
        is_control = MONITOR in (target, source.kind) or lane == "bus"
        weather = self.control if is_control else self.data
        here = MONITOR if source.kind == MONITOR else source.process
        if self.is_cut(here, target):
            return
        data = encode(message)
        for _ in range(2 if self.random.random() < weather.doubling else 1):
            if self.random.random() < weather.loss:
                continue
            arrival = self.now + self.delay(weather)
            if weather.in_order:
                link = (source.process, target, lane)
                arrival = max(arrival, self._arrivals.get(link, 0.0))
                self._arrivals[link] = arrival
            self.at_time(arrival, partial(self._arrive, source, self.now, target, data, frames, lane))

    def _arrive(self, source: Node, sent_at: float, target: str, data: bytes, frames: Frames, lane: str) -> None:
        if not source.is_alive and source.died_at - sent_at < _IN_PROCESS_S and self.random.random() < 0.7:
            return
        node = self.monitor if target == MONITOR else self.nodes.get(target)
        if node is None or not node.is_alive:
            if target == MONITOR and self.random.random() < 0.9:  # it waits in the socket for the next one
                self.at(_RETRY_S, lambda: self._arrive(source, sent_at, target, data, frames, lane))
            return
        peer = ProcessId(f"{source.process}#{lane}") if lane else source.process
        node.run(lambda: node.receive(peer, decode(data), frames))
