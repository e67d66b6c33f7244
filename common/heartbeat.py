"""Heartbeats from a thread of their own: a busy event loop or a long matrix product must not look like death.

The thread owns its socket. ``beat`` is called on it and must only read plain attributes; replies are handed to
``on_reply`` on the same thread (the caller passes them on with ``loop.call_soon_threadsafe``).
"""

import contextlib
import threading
import time
from collections.abc import Callable

import zmq

from common.ids import ProcessId
from common.messages import Heartbeat, HeartbeatReply, MalformedMessage, decode, encode
from common.network_cut import NetworkCut

IDENTITY_SUFFIX = "#beat"


class HeartbeatThread:
    """``interval_s`` may be set at any time."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        process: ProcessId,
        address: str,
        interval_s: float,
        beat: Callable[[], Heartbeat],
        on_reply: Callable[[HeartbeatReply], None],
        network: NetworkCut,
    ) -> None:
        self._network = network
        self._context, self._process, self._address = context, process, address
        self.interval_s, self._beat, self._on_reply = interval_s, beat, on_reply
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        # Terminated: the process is on its way out, and could not wait for this thread.
        with contextlib.suppress(zmq.ContextTerminated):
            self._beat_until_stopped()

    def _beat_until_stopped(self) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = 4  # a monitor that is away must not find minutes of old heartbeats
        socket.setsockopt_string(zmq.IDENTITY, self._process + IDENTITY_SUFFIX)
        socket.reconnect_ivl, socket.reconnect_ivl_max = 20, 500
        socket.connect(self._address)
        try:
            while not self._stop.is_set():
                # Again = not connected: the monitor counts the silence, there is nothing else to do here.
                with contextlib.suppress(zmq.Again):
                    if not self._network.drops("monitor", "out", time.monotonic()):
                        socket.send(encode(self._beat()), flags=zmq.DONTWAIT)
                next_beat_at = time.monotonic() + self.interval_s
                # Poll in place of sleeping: replies that tell of a new epoch are read at once.
                while not self._stop.is_set() and (left_s := next_beat_at - time.monotonic()) > 0:
                    socket.poll(max(1, int(left_s * 1000)))
                    while self._read(socket):
                        pass
        finally:
            socket.close(0)

    def _read(self, socket: zmq.Socket[bytes]) -> bool:
        try:
            message = decode(socket.recv(flags=zmq.DONTWAIT))
        except zmq.Again:
            return False
        except MalformedMessage:
            return True
        if isinstance(message, HeartbeatReply) and not self._network.drops("monitor", "in", time.monotonic()):
            self._on_reply(message)
        return True
