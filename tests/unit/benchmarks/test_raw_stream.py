"""The lean client of the benchmarks reads what the client of the command line reads, however the bytes are cut."""

import asyncio
import json

import pytest
import uvloop

from benchmarks.raw_stream import run_raw_stream
from services.cli.chat_client import Stream, new_session, run_stream

EVENTS = [
    {
        "id": "cmpl-1",
        "choices": [{"text": text, "logprobs": {"token_logprobs": [-0.5 * number]}, "finish_reason": finish}],
    }
    for number, (text, finish) in enumerate((("a\u00e9", None), ("", None), ("\n\nb", None), ("c", "length")))
]
BODY = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in EVENTS) + b"data: [DONE]\n\n"


def chunked(size: int) -> bytes:
    parts = [BODY[at : at + size] for at in range(0, len(BODY), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


async def answers(answer: bytes, piece: int) -> tuple[Stream, Stream]:
    """What both clients make of the same answer, sent in pieces."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        for at in range(0, len(answer), piece):
            writer.write(answer[at : at + piece])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    raw, other = Stream({"prompt": "x"}), Stream({"prompt": "x"})
    async with server:
        await run_raw_stream(url, raw, 20.0)
        async with new_session(20.0) as session:
            await run_stream(session, url, other)
    return raw, other


@pytest.mark.parametrize(("chunk", "piece"), [(10_000, 10_000), (7, 5), (100, 64), (len(BODY), 3)])
def test_both_clients_read_the_same(chunk: int, piece: int) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the load generator's loop
        raw, other = runner.run(answers(head + chunked(chunk), piece))
    assert raw.is_same(other), (raw.error, other.error)
    assert (raw.id, len(raw.times), raw.text) == ("cmpl-1", len(EVENTS), "a\u00e9\n\nbc")
    assert raw.times == sorted(raw.times)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}", "HTTP 503"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(50)[:120], "ended without a reason"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 7\n\n\r\n0\r\n\r\n", "no OpenAI chunk"),
        (b"", "without an answer"),
    ],
)
async def test_an_error_is_told(answer: bytes, error: str) -> None:
    raw, _ = await answers(answer, 1000)
    assert error in raw.error
