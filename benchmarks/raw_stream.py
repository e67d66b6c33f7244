"""One streamed answer with as little processor time as a client can do with: while it comes, bytes and times are noted;
only when it has ended they are read as HTTP and as events.

A client on the same cores as the servers takes from what it measures: aiohttp's parser and a task that wakes for each
line cost six times as much.
"""

import asyncio
import time
from bisect import bisect_left
from itertools import accumulate
from typing import cast
from urllib.parse import urlsplit

import msgspec

from services.cli.chat_client import Stream, take

_END = b"\r\n"


class _Arrivals(asyncio.Protocol):
    """Every piece of an answer and when it came, until the server closes."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[bytes] = []
        self.times: list[float] = []
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._request)  # of uvloop it is none by its class

    def data_received(self, data: bytes) -> None:
        self.times.append(time.monotonic())
        self.pieces.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


async def run_raw_stream(url: str, stream: Stream, deadline_s: float) -> None:
    """Fills ``stream`` as `services.cli.chat_client.run_stream` does."""
    parts = urlsplit(url)
    path = "/v1/chat/completions" if "messages" in stream.body else "/v1/completions"
    body = msgspec.json.encode({**stream.body, "stream": True})
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
    try:
        async with asyncio.timeout(deadline_s):
            transport, arrivals = await asyncio.get_running_loop().create_connection(
                lambda: _Arrivals(request), parts.hostname or "", parts.port or 80
            )
            try:
                error = await arrivals.ended
            finally:
                transport.abort()
        _read(stream, arrivals.pieces, arrivals.times)
        if error is not None:
            stream.error = stream.error or f"{type(error).__name__}: {error}"
    except (OSError, TimeoutError) as failure:
        stream.error = f"{type(failure).__name__}: {failure}"
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        stream.error = f"the server sent no OpenAI chunk: {failure!r}"
    if not stream.is_over:
        stream.error = "the stream ended without a reason"


def _read(stream: Stream, pieces: list[bytes], times: list[float]) -> None:
    answer = b"".join(pieces)
    head, _, _ = answer.partition(2 * _END)
    status = head.partition(_END)[0].decode(errors="replace").partition(" ")[2]
    if not status.startswith("200"):
        stream.error = f"HTTP {status}" if status else "the server closed without an answer"
        return
    arrived = list(accumulate(map(len, pieces)))  # where each piece ends
    at, event = len(head) + 4, b""
    # Chunks of HTTP, of which one may hold several events or a part of one; the last one is empty, or was cut off.
    while (line_end := answer.find(_END, at)) > at and (size := int(answer[at:line_end], 16)):
        begin = line_end + 2
        if begin + size > len(answer):
            break
        when = times[bisect_left(arrived, begin + size)]
        *events, event = (event + answer[begin : begin + size]).split(b"\n\n")
        for whole in events:
            data = whole.removeprefix(b"data: ")
            if data != b"[DONE]":
                take(stream, msgspec.json.decode(data), when)
        at = begin + size + 2
