"""The stream of a decode rank as a coroutine: what is a thread in production stands still here while it waits.

The code that runs is `services.decode.stream.Stream` itself, on a greenlet. Wherever it would wait (its inbox, a step
word), and now and then between two stores into another rank's heap, it gives the control back to the world, which
continues it when something has arrived, when time is up, or never: a process may die or be stopped at any such step.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from greenlet import GreenletExit, getcurrent, greenlet

from services.decode.stream_inbox import Incoming
from tests.simulation.world import Node

if TYPE_CHECKING:
    from tests.simulation.pace import Pace

POLL_S = 0.05


class StreamTask:
    """``pace`` says how long things take."""

    def __init__(self, node: Node, run: Callable[[], None], pace: "Pace") -> None:
        self._node, self._pace, self._hub = node, pace, getcurrent()
        self._greenlet = greenlet(run)
        self._turn = 0  # numbers the waits, so that an old wake-up does not end a new wait
        self._awaits_memory = self._is_woken = False
        self.is_hung, self.slowness = False, 1.0
        self.paused_s = 0.0  # in all pauses between stores so far, and the one that it is in
        self.steps_to_live: int | None = None
        self.steps_to_stop: tuple[int, float] | None = None

    def start(self) -> None:
        self._continue(self._turn)

    def kill(self) -> None:
        """The node is dead already, so nothing that its code still does has any effect."""
        if not self._greenlet.dead and getcurrent() is not self._greenlet:
            self._greenlet.throw(GreenletExit)

    def wait(self, timeout_s: float, for_memory: bool = False) -> None:
        """Called on the stream."""
        if not self._node.is_alive:
            raise GreenletExit
        self._turn += 1
        turn = self._turn
        self._awaits_memory, self._is_woken = for_memory, False
        self._node.world.at(timeout_s, lambda: self._continue(turn))
        self._hub.switch()

    def notify(self, by_memory: bool) -> None:
        """Something has changed that a wait may be about."""
        if by_memory and not self._awaits_memory:
            return
        if not self._is_woken:
            self._is_woken = True
            turn = self._turn
            self._node.world.at(self._pace.wake_s() * self.slowness, lambda: self._continue(turn))

    def step(self) -> None:
        """Between two stores: here a process may die, be stopped, or lose the processor for a while."""
        if not self._node.is_alive:
            return
        if self.steps_to_live is not None:
            self.steps_to_live -= 1
            if self.steps_to_live <= 0:
                self._node.die("signal KILL, between two stores")
                raise GreenletExit
        if self.steps_to_stop is not None:
            left, seconds = self.steps_to_stop
            self.steps_to_stop = (left - 1, seconds)
            if left <= 1:
                self.steps_to_stop = None
                self._node.stop_for(seconds)
                self.wait(0.0)
                return
        if (pause_s := self._pace.pause_s()) > 0:
            self.paused_s += pause_s
            self.wait(pause_s)

    def _continue(self, turn: int) -> None:
        node, world = self._node, self._node.world
        if turn != self._turn or not node.is_alive or self._greenlet.dead:
            return
        if node.stopped_until > world.now:
            world.at_time(node.stopped_until, lambda: self._continue(turn))
            return
        if self.is_hung:
            world.at(POLL_S, lambda: self._continue(turn))
            return
        self._turn += 1
        world.running = node
        try:
            self._greenlet.switch()
        finally:
            world.running = None


class TaskInbox:
    """In place of `services.decode.stream_inbox.Inbox`."""

    def __init__(self, task: Callable[[], StreamTask]) -> None:
        self._items: list[Incoming] = []
        self._task = task

    def put(self, item: Incoming | None) -> None:
        if item is not None:
            self._items.append(item)
        self._task().notify(by_memory=False)

    def take(self) -> list[Incoming]:
        items, self._items = self._items, []
        return items

    def wait(self, timeout_s: float) -> None:
        if not self._items:
            self._task().wait(timeout_s)
