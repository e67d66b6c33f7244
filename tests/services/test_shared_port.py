"""Two sockets on one port: connections that have begun are served by the one that leaves, new ones by the other."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from common.service_runner import OperatorError
from services.router.http_port import SharedPort

PATIENCE_S = 20.0


@contextlib.asynccontextmanager
async def server(name: str, port: int = 0) -> AsyncIterator[tuple[SharedPort, web.AppRunner]]:
    """Answers with its name."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(text=name)

    app = web.Application()
    app.router.add_get("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        yield SharedPort("127.0.0.1", port), runner
    finally:
        await runner.cleanup()


async def ask(port: int) -> str:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"http://127.0.0.1:{port}/") as response,
    ):
        return await response.text()


async def test_no_connection_is_lost_when_one_of_two_leaves() -> None:
    async with server("old") as (old, old_runner), server("new", old.number) as (new, new_runner):
        await old.open(old_runner)
        assert not old.has_others()
        stopped = asyncio.Event()
        stopped.set()
        async with asyncio.timeout(1.0):
            assert await old.wait_for_others(PATIENCE_S, stopped), "who is stopped waits for nobody"
        await new.open(new_runner)
        assert await old.wait_for_others(PATIENCE_S, asyncio.Event()) and new.has_others()
        leaving, answers = asyncio.create_task(old.leave(0.2)), set()
        while not leaving.done():
            # Some of these knock at the old socket while it takes no more: their second try reaches the new one.
            answers.update(await asyncio.gather(*(ask(old.number) for _ in range(8))))
        answers.update(await asyncio.gather(*(ask(new.number) for _ in range(8))))
        assert "new" in answers and not new.has_others()
        await new.leave(0.0)


async def test_who_has_begun_to_connect_is_accepted_before_the_socket_closes() -> None:
    async with server("old") as (old, runner):
        await old.open(runner)
        # In the queue of the socket, or on its way there, when it begins to leave.
        asked = [asyncio.create_task(ask(old.number)) for _ in range(8)]
        reader, writer = await asyncio.open_connection("127.0.0.1", old.number)
        await old.leave(0.2)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), PATIENCE_S)).endswith(b"old")
        writer.close()
        assert set(await asyncio.gather(*asked)) == {"old"}
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(old.number)


async def test_a_port_that_another_program_has_is_refused_at_once() -> None:
    other = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    with pytest.raises(OperatorError, match=f"cannot listen on port {port}: it is in use"):
        SharedPort("127.0.0.1", port)
    other.close()
    await other.wait_closed()
