"""ZeroMQ sockets that carry our messages: a bound `Endpoint` with many peers, and a `Link` to one endpoint.

Sends never block and never raise on a slow or dead peer: what cannot be queued is dropped and counted, because every
protocol above survives loss. Identities are process ids; a process that reconnects takes its identity over.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import zmq
import zmq.asyncio

from common.ids import ProcessId
from common.messages import MalformedMessage, Message, decode, encode

_HIGH_WATER_MARK = 100_000
Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message as it arrived; ``frames`` are the raw buffers behind it."""

    peer: ProcessId
    message: Message
    frames: Sequence[memoryview]


class _Socket:
    """What both kinds of socket share: counters, non-blocking sends, closing without linger."""

    def __init__(self, context: zmq.asyncio.Context, kind: int) -> None:
        self._socket = context.socket(kind)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = _HIGH_WATER_MARK
        self.num_dropped = 0
        self.num_malformed = 0

    def _send(self, parts: list[Buffer], frames: Sequence[Buffer]) -> None:
        """``frames`` are not copied, so they must not change any more; for small messages a copy costs less."""
        future = self._socket.send_multipart([*parts, *frames], flags=zmq.DONTWAIT, copy=not frames)
        assert isinstance(future, asyncio.Future)
        if future.done() and future.exception() is not None:
            self.num_dropped += 1

    async def _receive(self) -> tuple[list[memoryview], Message]:
        """The next well-formed message with all its frames; malformed ones are counted and skipped."""
        while True:
            frames = await self._socket.recv_multipart(copy=False)
            buffers = [frame.buffer for frame in frames]
            index = 1 if self._socket.type == zmq.ROUTER else 0
            try:
                if len(buffers) <= index:
                    raise MalformedMessage("no message frame")
                return buffers, decode(buffers[index])
            except MalformedMessage:
                self.num_malformed += 1

    def close(self) -> None:
        self._socket.close(0)


class Endpoint(_Socket):
    """A bound ROUTER socket."""

    def __init__(self, context: zmq.asyncio.Context, port: int = 0) -> None:
        """Binds all interfaces on ``port`` (0 = any free one). Raises ValueError when the port is in use."""
        super().__init__(context, zmq.ROUTER)
        self._socket.router_handover = True
        try:
            self._socket.bind(f"tcp://*:{port}" if port else "tcp://*:*")
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"cannot listen on port {port}: {error.strerror}") from None
        bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.port = int(bound.rpartition(":")[2])

    def address(self, host: str) -> str:
        """The address under which others reach this endpoint on ``host``."""
        return f"tcp://{host}:{self.port}"

    async def receive(self) -> Incoming:
        buffers, message = await self._receive()
        return Incoming(ProcessId(bytes(buffers[0]).decode(errors="replace")), message, buffers[2:])

    def send(self, peer: ProcessId, message: Message, frames: Sequence[Buffer] = ()) -> None:
        self._send([peer.encode(), encode(message)], frames)


class Link(_Socket):
    """A DEALER socket connected to one endpoint."""

    def __init__(self, context: zmq.asyncio.Context, identity: ProcessId, address: str) -> None:
        super().__init__(context, zmq.DEALER)
        self.address = address
        self._socket.setsockopt_string(zmq.IDENTITY, identity)
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 20, 500
        self._socket.connect(address)

    async def receive(self) -> tuple[Message, Sequence[memoryview]]:
        buffers, message = await self._receive()
        return message, buffers[1:]

    def send(self, message: Message, frames: Sequence[Buffer] = ()) -> None:
        self._send([encode(message)], frames)
