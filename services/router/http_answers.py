"""Answers on their way to a client: whole, or as server-sent events while the tokens come."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence

import msgspec
from aiohttp import HttpVersion11, web

from services.router.answer import Answer
from services.router.api_error import ApiError
from services.router.http_bodies import REQUEST_ID, error_body, json_response, request_id
from services.router.http_generation import Generations
from services.router.openai_format import Body
from services.router.text_stream import TextDelta

MISSING_EXPERTS = "X-Regrow-Missing-Experts"
First = tuple[int, TextDelta]
_MOST_UNSENT_BYTES = 1 << 15


async def send_whole(
    request: web.Request, answer: Answer, generations: Generations, first: Sequence[First]
) -> web.Response:
    """Raises ApiError when a choice fails: then there is no answer at all."""
    for delta in first:
        answer.take(*delta)
    while not answer.is_complete:
        for delta in await generations.next_ones():
            answer.take(*delta)
    headers = {REQUEST_ID: request_id(request, answer.id), **_marks(answer.missed_experts)}
    return json_response(answer.whole(), headers=headers)


async def send_stream(
    request: web.Request, answer: Answer, generations: Generations, first: Sequence[First], send_timeout_s: float
) -> web.StreamResponse:
    """Each write may take ``send_timeout_s``; a client that reads no more is treated as one that is gone."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            REQUEST_ID: request_id(request, answer.id),
            **_marks(any(delta.missed_experts for _, delta in first)),
        }
    )
    if request.version >= HttpVersion11:
        response.enable_chunked_encoding()

    async def write(data: bytes) -> None:
        if data:
            async with asyncio.timeout(send_timeout_s):
                await response.write(data)

    # A write fails when the client is gone, that of the headers too, and times out when it has stopped reading.
    with contextlib.suppress(ConnectionError), _hanging_up(request):
        await response.prepare(request)
        try:
            deltas, last_words = first, b""
            await write(_events(answer.opening()))
            while True:
                events = _events([body for delta in deltas for body in answer.chunks(*delta)])
                if answer.is_complete:
                    last_words = events + _events(answer.closing())
                    break
                await write(events)
                if response.chunked and request.transport is not None:
                    generations.go_direct(_direct_way(request.transport, answer))
                deltas = await generations.next_ones()
        except ApiError as error:
            last_words = _events([error_body(error)])
        async with asyncio.timeout(send_timeout_s):
            await response.write_eof(last_words + b"data: [DONE]\n\n")
    return response


@contextlib.contextmanager
def _hanging_up(request: web.Request) -> Iterator[None]:
    """On a timeout: aiohttp would wait for the client to read the end, for ever."""
    try:
        yield
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()


def _direct_way(transport: asyncio.Transport, answer: Answer) -> Callable[[int, TextDelta], bool]:
    """Writes what is usual without waking anybody, as an HTTP chunk of its own. A client that falls behind is left to
    the handler, which waits for it."""

    def write(index: int, delta: TextDelta) -> bool:
        if transport.is_closing() or transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            return False
        event = answer.usual_event(index, delta)
        if event is not None:
            transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        return event is not None

    return write


def _marks(missed_experts: bool) -> dict[str, str]:
    """Of a stream only what is known when it begins; each chunk says for itself."""
    return {MISSING_EXPERTS: "true"} if missed_experts else {}


def _events(bodies: list[Body]) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(body) + b"\n\n" for body in bodies)
