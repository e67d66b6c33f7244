"""Handshakes that fail because of keys, as either side of a ZeroMQ socket sees them.

ZeroMQ refuses a peer without the right key before any message of it is read, so there is nothing to answer; what can be
done is to count it and to tell the operator.
"""

import struct
from collections.abc import AsyncIterator
from enum import Enum
from typing import Any, cast

import zmq
import zmq.asyncio


class Refusal(Enum):
    """Why there is no connection. `HUNG_UP`: the other side was the first to see that keys do not fit, or it died."""

    NO_COMMON_MECHANISM = "one side has a key, the other has none"
    OTHER_KEY = "the peer has another key"
    HUNG_UP = "the peer hung up in the handshake"


_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_REASONS = {
    zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: Refusal.NO_COMMON_MECHANISM,
    zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: Refusal.OTHER_KEY,
}


class FailedHandshakes:
    """Those of ``socket``, from now on: make this before it binds or connects. Iterate until cancelled."""

    def __init__(self, socket: "zmq.Socket[Any]") -> None:
        self._socket, self._failures = socket, cast(zmq.asyncio.Socket, socket.get_monitor_socket(_EVENTS))

    async def __aiter__(self) -> AsyncIterator[Refusal]:
        while True:
            event, *_ = await self._failures.recv_multipart()
            _, value = struct.unpack("=hi", event)
            yield _REASONS.get(value, Refusal.HUNG_UP)

    async def strangers(self) -> AsyncIterator[Refusal]:
        """Whom a bound socket did not let in. Without a key, who hangs up is no stranger: it may just have died."""
        has_key = self._socket.getsockopt(zmq.MECHANISM) == zmq.CURVE
        async for refusal in self:
            if has_key or refusal is not Refusal.HUNG_UP:
                yield refusal

    def close(self) -> None:
        """Before the socket itself is closed."""
        self._socket.disable_monitor()
        self._failures.close(0)
