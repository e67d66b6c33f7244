"""A ZeroMQ socket whose messages the event loop takes off it as soon as they are there.

pyzmq's asyncio sockets make a future for each message, sent or received, and look at the socket's events around it: at
some hundred messages a second that is what a router spends most on. Here one look takes all that has come, and sending
is a plain call.
"""

import asyncio
import contextlib
from collections import deque
from typing import Any

import zmq

_MOST_TAKEN = 100  # and not read yet: what more has come waits in the socket, which has a bound


class LoopSocket(zmq.Socket[Any]):
    """Made by ``context.socket(kind, socket_class=LoopSocket)``; of one event loop, from the first `receive` on."""

    _taken: deque[list[zmq.Frame]]
    _waiter: "asyncio.Future[None] | None"
    _loop: asyncio.AbstractEventLoop | None
    _descriptor: int
    _will_look: bool
    _may_hold_more: bool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._taken, self._waiter, self._loop = deque(), None, None
        self._will_look, self._may_hold_more = False, True
        super().__init__(*arguments, **options)

    async def receive(self) -> list[zmq.Frame]:
        """All frames of the next message. For one task."""
        if self._loop is None:
            self._loop, self._descriptor = asyncio.get_running_loop(), int(self.getsockopt(zmq.FD))
            self._loop.add_reader(self._descriptor, self._look)
        if not self._taken and self._may_hold_more:
            self._look()
        while not self._taken:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._taken.popleft()

    def send_now(self, parts: list[bytes | memoryview], copy: bool) -> bool:
        """False when there is no room, or nobody to send it to yet, or no more: a thread that is about to end may have
        handed over its words after the socket was closed."""
        if self.closed:
            return False
        try:
            self.send_multipart(parts, zmq.DONTWAIT, copy)
        except zmq.Again:
            return False
        finally:
            self._look_soon()
        return True

    def close(self, linger: int | None = None) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed before
                self._loop.remove_reader(self._descriptor)
            self._loop = None
        super().close(linger)

    def _look_soon(self) -> None:
        """The descriptor tells of a change once, and a send may be what hears of it."""
        if self._loop is not None and not self._will_look and not self._loop.is_closed():
            self._will_look = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._will_look = False
        if self.closed:
            return
        with contextlib.suppress(zmq.Again):
            while len(self._taken) < _MOST_TAKEN:
                self._taken.append(self.recv_multipart(zmq.DONTWAIT, copy=False))
        self._may_hold_more = len(self._taken) >= _MOST_TAKEN
        if self._taken and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
