"""From the event loop to the stream: what has come for the next turn, and an end to the wait for it."""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from common.ids import ProcessId
from common.messages import Message


@dataclass(frozen=True, slots=True)
class Incoming:
    peer: ProcessId
    message: Message
    frames: Sequence[memoryview] = ()


class Inbox:
    def __init__(self) -> None:
        self._items: deque[Incoming] = deque()
        self._filled = threading.Condition()

    def put(self, item: Incoming | None) -> None:
        """None only ends a wait."""
        with self._filled:
            if item is not None:
                self._items.append(item)
            self._filled.notify()

    def take(self) -> list[Incoming]:
        with self._filled:
            items = list(self._items)
            self._items.clear()
        return items

    def wait(self, timeout_s: float) -> None:
        with self._filled:
            if not self._items:
                self._filled.wait(timeout_s)
