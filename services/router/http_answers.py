"""Answers on their way to a client: whole, or as server-sent events while the tokens come."""

import asyncio
import contextlib

import msgspec
from aiohttp import web

from services.router.answer import Answer
from services.router.api_error import ApiError
from services.router.http_bodies import REQUEST_ID, error_body, json_response, request_id
from services.router.http_generation import Generations
from services.router.openai_format import Body
from services.router.text_stream import TextDelta

MISSING_EXPERTS = "X-Regrow-Missing-Experts"
First = tuple[int, TextDelta]


async def send_whole(request: web.Request, answer: Answer, generations: Generations, first: First) -> web.Response:
    """Raises ApiError when a choice fails: then there is no answer at all."""
    answer.take(*first)
    while not answer.is_complete:
        answer.take(*await generations.next())
    headers = {REQUEST_ID: request_id(request, answer.id), **_marks(answer.missed_experts)}
    return json_response(answer.whole(), headers=headers)


async def send_stream(
    request: web.Request, answer: Answer, generations: Generations, first: First, send_timeout_s: float
) -> web.StreamResponse:
    """Each write may take ``send_timeout_s``; a client that reads no more is treated as one that is gone."""
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
            REQUEST_ID: request_id(request, answer.id),
            **_marks(first[1].missed_experts),
        }
    )
    await response.prepare(request)

    async def write(data: bytes) -> None:
        async with asyncio.timeout(send_timeout_s):
            await response.write(data)

    # A write fails when the client is gone, and times out when it has stopped reading.
    with contextlib.suppress(ConnectionError, TimeoutError):
        try:
            await write(_events(answer.opening()))
            await write(_events(answer.chunks(*first)))
            while not answer.is_complete:
                deltas = await generations.next_ones()
                await write(_events([body for delta in deltas for body in answer.chunks(*delta)]))
            await write(_events(answer.closing()))
        except ApiError as error:
            await write(_events([error_body(error)]))
        await write(b"data: [DONE]\n\n")
        await response.write_eof()
    return response


def _marks(missed_experts: bool) -> dict[str, str]:
    """Of a stream only what is known when it begins; each chunk says for itself."""
    return {MISSING_EXPERTS: "true"} if missed_experts else {}


def _events(bodies: list[Body]) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(body) + b"\n\n" for body in bodies)
