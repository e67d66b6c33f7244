"""ZeroMQ sockets that carry our messages: a bound `Endpoint` with many peers, and a `Link` to one endpoint.

Sends never block and never raise on a slow or dead peer: what cannot be queued is dropped and counted, because every
protocol above survives loss. Identities are process ids; a process that reconnects takes its identity over.

With a cluster key every socket speaks CURVE: encrypted, and nobody without the key gets past the handshake, in either
direction (docs/decisions/0006-one-key-per-cluster.md).
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import zmq
import zmq.asyncio
from zmq.utils import z85

from common.cluster_key import ClusterKey
from common.handshakes import FailedHandshakes
from common.ids import ProcessId
from common.loop_socket import LoopSocket
from common.messages import MalformedMessage, Message, decode, encode
from common.network_cut import NetworkCut

_HIGH_WATER_MARK = 100_000
log = logging.getLogger("regrow.transport")

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Incoming:
    """One message as it arrived; ``frames`` are the raw buffers behind it."""

    peer: ProcessId
    message: Message
    frames: Sequence[memoryview]


def open_context(key: ClusterKey | None) -> zmq.asyncio.Context:
    context = zmq.asyncio.Context()
    secure(context, key)
    return context


def secure(context: "zmq.Context[Any]", key: ClusterKey | None) -> None:
    """Sockets that ``context`` makes from now on are CURVE clients with the key pair of the cluster, servers once they
    have gone through `listen`. Shadows of the context need the same call."""
    if key is None:
        return
    if not zmq.has("curve"):
        raise ValueError("a key file was given, but this build of ZeroMQ knows no CURVE; install pyzmq from its wheels")
    secret = z85.encode(key.secret)
    public = zmq.curve_public(secret)
    options = ((zmq.CURVE_SECRETKEY, secret), (zmq.CURVE_PUBLICKEY, public), (zmq.CURVE_SERVERKEY, public))
    context.sockopts.update(options)


def listen(socket: "zmq.Socket[Any]", port: int, interface: str) -> int:
    """Binds to ``port`` (0 = any free one) of ``interface`` ("*" = all); returns the port. Raises ValueError when it
    is in use."""
    if socket.context.sockopts.get(zmq.CURVE_SERVERKEY):
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        assert socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
    try:
        socket.bind(f"tcp://{interface}:{port or '*'}")
    except zmq.ZMQError as error:
        raise ValueError(f"cannot listen on port {port}: {error.strerror}") from None
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


class _Socket:
    """What both kinds of socket share: counters, non-blocking sends, closing without linger.

    ``network``: what this process loses on purpose; ``side``: whom the socket leads to (`common.network_cut`).
    """

    def __init__(self, context: zmq.asyncio.Context, kind: int, network: NetworkCut | None, side: str) -> None:
        self._network, self._side = network or NetworkCut(), side
        self._num_envelope = int(kind == zmq.ROUTER)  # frames in front of the message
        # So that it has the options of the context and is closed with it.
        self._socket: LoopSocket = cast(Any, context).socket(kind, socket_class=LoopSocket)
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = _HIGH_WATER_MARK
        self.failed_handshakes: FailedHandshakes | None = None
        self.num_dropped = 0
        self.num_malformed = 0

    def _send(self, parts: list[Buffer], frames: Sequence[Buffer]) -> None:
        """``frames`` are not copied, so they must not change any more; for small messages a copy costs less."""
        if self._network.drops(self._side, "out", time.monotonic()):
            return
        self._send_now(parts, frames)

    def _send_now(self, parts: list[Buffer], frames: Sequence[Buffer]) -> None:
        self.num_dropped += not self._socket.send_now([*parts, *frames], copy=not frames)

    async def _receive(self) -> tuple[list[memoryview], Message]:
        """The next well-formed message with all its frames; malformed ones are counted and skipped."""
        while True:
            frames = await self._socket.receive()
            if self._network.drops(self._side, "in", time.monotonic()):
                continue
            buffers = [memoryview(frame) for frame in frames]  # type: ignore[arg-type]  # its buffer protocol is C's
            index = self._num_envelope
            try:
                if len(buffers) <= index:
                    raise MalformedMessage("no message frame")
                return buffers, decode(buffers[index])
            except MalformedMessage:
                self.num_malformed += 1

    def close(self) -> None:
        if self.failed_handshakes is not None:
            self.failed_handshakes.close()
        self._socket.close(0)


class Endpoint(_Socket):
    """A bound ROUTER socket."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        port: int = 0,
        interface: str = "127.0.0.1",
        network: NetworkCut | None = None,
    ) -> None:
        """Listens on ``port`` (0 = any free one). Raises ValueError when the port is in use."""
        super().__init__(context, zmq.ROUTER, network, "peers")
        self._socket.router_handover = True
        self.num_refused = 0
        self.failed_handshakes: FailedHandshakes = FailedHandshakes(self._socket)
        try:
            self.port = listen(self._socket, port, interface)
        except ValueError:
            self.close()
            raise

    async def watch_strangers(self) -> None:
        """Counts those who were not let in, and says so. Runs until cancelled."""
        async for refusal in self.failed_handshakes.strangers():
            self.num_refused += 1
            if self.num_refused & (self.num_refused - 1) == 0:  # a stranger must not fill the disk
                log.warning("port %d did not let %d strangers in: %s", self.port, self.num_refused, refusal.value)

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

    """``is_watched``: somebody reads ``failed_handshakes``."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        identity: ProcessId,
        address: str,
        network: NetworkCut | None = None,
        side: str = "peers",
        is_watched: bool = False,
    ) -> None:
        super().__init__(context, zmq.DEALER, network, side)
        self.address = address
        self.failed_handshakes = FailedHandshakes(self._socket) if is_watched else None
        self._socket.setsockopt_string(zmq.IDENTITY, identity)
        self._socket.reconnect_ivl, self._socket.reconnect_ivl_max = 20, 500
        self._socket.connect(address)

    async def receive(self) -> tuple[Message, Sequence[memoryview]]:
        buffers, message = await self._receive()
        return message, buffers[1:]

    def send(self, message: Message, frames: Sequence[Buffer] = ()) -> None:
        self._send([encode(message)], frames)

    def send_through_cut(self, message: Message) -> None:
        """For the word that a cut is in force, which nobody would hear otherwise."""
        self._send_now([encode(message)], ())
