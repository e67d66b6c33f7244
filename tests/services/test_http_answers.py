"""What becomes of a connection whose client reads no more."""

import asyncio
import socket
from typing import Any, cast

from aiohttp import web

from services.router.answer import Answer
from services.router.http_answers import send_stream
from services.router.http_generation import Generations
from services.router.text_stream import TextDelta
from tests.services.fake_cluster import until

_TEXT = TextDelta("y" * 20_000, (1,), (0.0,))


class _Endless:
    """Plays both an answer that never ends and its generations."""

    id, is_complete = "x", False

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, delta: TextDelta) -> list[dict[str, Any]]:
        return [{"text": delta.text}]

    def go_direct(self, way: object) -> None:
        pass

    async def next_ones(self) -> list[tuple[int, TextDelta]]:
        await asyncio.sleep(0.001)
        return [(0, _TEXT)]


async def test_a_client_that_has_stopped_reading_keeps_no_connection() -> None:
    endless = _Endless()

    async def handle(request: web.Request) -> web.StreamResponse:
        return await send_stream(request, cast(Answer, endless), cast(Generations, endless), [(0, _TEXT)], 0.3)

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert runner.server is not None
    server = runner.server
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(runner.addresses[0])
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: bool(server.connections))
        await until(lambda: not server.connections, within_s=5.0)
    await runner.cleanup()
