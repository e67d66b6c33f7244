"""A process's side of its relation to the monitor: hello until welcomed, lifeline, heartbeats, asking when behind.

Used by the shells of all services but the monitor. What it obeys is decided in `common.obedience`; that it hands, in
order, to ``on_message``. Messages of refused monitors never get there.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable

import msgspec
import zmq.asyncio

from common.cluster_key import CHALLENGE_BYTES
from common.handshakes import Refusal as FailedHandshake
from common.heartbeat import HeartbeatThread
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
    Welcome,
)
from common.monitor_address import MonitorAddress
from common.network_cut import NetworkCut, lanes
from common.obedience import Obedience
from common.service_runner import OperatorError
from common.transport import Link, secure

_HELLO_AGAIN_S = 0.5
_CHALLENGE_S = 5.0
_MANY_FAILURES = 20
_RECONNECT_S = 0.02  # shorter than the suspicion that a closed lifeline raises
_CONNECT_S = 2.0
_CUT_PROOF_TICK_S = 0.02
# A host that vanishes sends no end of its streams: probes find out.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 3))

log = logging.getLogger("regrow.monitor_client")


class MonitorClient:
    """``hello`` and ``beat`` are asked for the present state each time one is sent. ``heartbeat_s`` holds until the
    monitor's welcome says otherwise. ``network`` is what the process loses on purpose: shared by all its sockets."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        process: ProcessId,
        address: MonitorAddress,
        hello: Callable[[], Hello],
        beat: Callable[[], Heartbeat],
        on_message: Callable[[Message], None],
        heartbeat_s: float = 0.1,
        network: NetworkCut | None = None,
    ) -> None:
        self._network = network or NetworkCut()
        self._injected: dict[str, asyncio.Task[None]] = {}
        self._said: dict[str, Injected] = {}
        self._process, self._address, self._hello, self._beat, self._on_message = (
            process,
            address,
            hello,
            beat,
            on_message,
        )
        self._link = Link(context, process, address.control, self._network, "monitor", is_watched=True)
        self._obedience = Obedience()
        self._loop = asyncio.get_running_loop()
        sync_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
        secure(sync_context, address.key)
        self._heartbeats = HeartbeatThread(
            sync_context,
            process,
            address.control,
            heartbeat_s,
            self._beat_with_cuts,
            self._hand_reply_to_loop,
            self._network,
        )

    @property
    def term(self) -> int:
        return self._obedience.term

    @property
    def monitor(self) -> str:
        return self._obedience.monitor

    @property
    def num_words(self) -> int:
        """Of the monitor, so far: silence is when it stands still."""
        return self._obedience.num_words

    def accepts(self, view: View | Directory) -> bool:
        """For views that came another way (bus, peers): the same allegiance decides."""
        return self._obedience.accepts(view)

    def send(self, message: Message) -> None:
        if isinstance(message, Injected):
            self._link.send_through_cut(message)
        else:
            self._link.send(message)

    def say_hello(self) -> None:
        """Again, because something that Hello carries has changed (a slot left, a new heap). At once: a Welcome that
        answers an older Hello may be on its way, and would end the repetition before the first one."""
        self._obedience.is_welcomed = False
        self._link.send(self._hello())

    async def run(self) -> None:
        """Runs until cancelled; raises OperatorError when the monitor refuses this process for good."""
        self._heartbeats.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive())
                group.create_task(self._greet())
                group.create_task(self._hold_lifeline())
                group.create_task(self._watch_handshakes())
        except* OperatorError as group_error:
            raise group_error.exceptions[0] from None
        finally:
            for task in self._injected.values():
                task.cancel()
            await asyncio.to_thread(self._heartbeats.stop)
            self._link.close()

    async def _greet(self) -> None:
        while True:
            if not self._obedience.is_welcomed:
                self._link.send(self._hello())
            await asyncio.sleep(_HELLO_AGAIN_S)

    async def _receive(self) -> None:
        while True:
            message, _ = await self._link.receive()
            self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case Refusal(reason=reason, final=True):
                raise OperatorError(f"the monitor at {self._address} refuses this process: {reason}")
            case Refusal(reason=reason):
                log.warning("monitor refuses: %s", reason)
                return
            case _ if not self._obedience.on_message(message):
                return
            case Welcome(config=config):
                self._heartbeats.interval_s = config.monitor.heartbeat_s
            case Inject(action="drop_network"):
                self._cut_network(message)
                return
            case _:
                pass
        self._on_message(message)

    def _beat_with_cuts(self) -> Heartbeat:
        beat, counters = self._beat(), self._network.counters()
        return msgspec.structs.replace(beat, counters=beat.counters | counters) if counters else beat

    def _cut_network(self, inject: Inject) -> None:
        if said := self._said.get(inject.id):
            self.send(said)
        elif inject.id not in self._injected:
            until = time.monotonic() + inject.duration_s
            self._network.cut(inject.which, inject.direction, until)
            log.warning("fault %s: loses %s of %s", inject.id, inject.direction, inject.which)
            self._injected[inject.id] = self._loop.create_task(self._prove_cut(inject, until))

    async def _prove_cut(self, inject: Inject, until: float) -> None:
        """Says that messages are being lost once each lane has lost one, at the latest when the cut ends."""
        numbers, start = self._network.num_dropped, dict(self._network.num_dropped)
        wanted = lanes(inject.which, inject.direction)
        for _ in range(int((until - time.monotonic()) / _CUT_PROOF_TICK_S)):
            if all(numbers[lane] > start[lane] for lane in wanted):
                break
            await asyncio.sleep(_CUT_PROOF_TICK_S)
        lost = [f"{numbers[lane] - start[lane]} {lane[1]} of {lane[0]}" for lane in wanted]
        ok = any(numbers[lane] > start[lane] for lane in wanted)
        self._said[inject.id] = Injected(self._process, inject.id, ok, f"messages dropped: {', '.join(lost)}")
        self.send(self._said[inject.id])

    def _hand_reply_to_loop(self, reply: HeartbeatReply) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is already closed: the process is on its way out
            self._loop.call_soon_threadsafe(self._on_reply, reply)

    def _on_reply(self, reply: HeartbeatReply) -> None:
        if self._obedience.on_reply(reply, self._beat().epoch):
            self._link.send(AskView(self._process))

    async def _hold_lifeline(self) -> None:
        """A plain TCP stream that the kernel closes when this process dies, however it dies."""
        while True:
            with contextlib.suppress(OSError, EOFError):  # TimeoutError is an OSError
                async with asyncio.timeout(_CONNECT_S):
                    reader, writer = await asyncio.open_connection(self._address.host, self._address.lifeline_port)
                try:
                    keep_alive(writer)
                    writer.write(await self._lifeline_opening(reader))
                    await reader.read()  # returns when the monitor is gone
                finally:
                    writer.close()
            await asyncio.sleep(_RECONNECT_S)

    async def _lifeline_opening(self, reader: asyncio.StreamReader) -> bytes:
        """The name of this process; in a cluster with a key, with the answer to the monitor's challenge."""
        key = self._address.key
        if key is None:
            return self._process.encode() + b"\n"
        async with asyncio.timeout(_CHALLENGE_S):
            challenge = await reader.readexactly(CHALLENGE_BYTES)
        return f"{self._process} {key.proof(challenge, self._process)}\n".encode()

    async def _watch_handshakes(self) -> None:
        """Keys are a matter of configuration: waiting does not mend what is wrong with them."""
        num_failed = 0
        assert self._link.failed_handshakes is not None
        async for failed in self._link.failed_handshakes:
            if failed is FailedHandshake.NO_COMMON_MECHANISM:
                which = "has no key, but this process was given one" if self._address.key else "asks for a key"
                raise OperatorError(f"the monitor at {self._address} {which}: give all processes the same --key-file")
            num_failed += 1
            if num_failed % _MANY_FAILURES == 0:
                log.warning("the monitor at %s hangs up in the handshake: is this its --key-file?", self._address)


def keep_alive(writer: asyncio.StreamWriter) -> None:
    """Ends a stream within seconds when the other host has vanished without a word."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
