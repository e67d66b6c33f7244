"""Endpoint and Link over real sockets."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq
import zmq.asyncio

from common.ids import Epoch, ProcessId, RequestId
from common.messages import Have, Wake, encode
from common.transport import Endpoint, Link


@pytest.fixture
async def context() -> AsyncIterator[zmq.asyncio.Context]:
    context = zmq.asyncio.Context()
    yield context
    context.destroy(linger=0)


async def test_messages_and_frames_go_both_ways(context: zmq.asyncio.Context) -> None:
    endpoint = Endpoint(context)
    link = Link(context, ProcessId("router-1"), endpoint.address("127.0.0.1"))
    async with asyncio.timeout(10):
        link.send(Have(RequestId("r.1"), 1, 5), [b"key", b"value" * 100_000])
        incoming = await endpoint.receive()
        assert (incoming.peer, incoming.message) == ("router-1", Have(RequestId("r.1"), 1, 5))
        assert [bytes(frame) for frame in incoming.frames] == [b"key", b"value" * 100_000]
        endpoint.send(incoming.peer, Wake(Epoch(3)))
        assert await link.receive() == (Wake(Epoch(3)), [])
    endpoint.close()
    link.close()


async def test_what_is_no_message_is_counted_and_the_next_one_arrives(context: zmq.asyncio.Context) -> None:
    endpoint = Endpoint(context)
    stranger = context.socket(zmq.DEALER)
    stranger.connect(endpoint.address("127.0.0.1"))
    async with asyncio.timeout(10):
        for data in (b"", b"\xc1", b"GET / HTTP/1.1", encode(Wake(Epoch(1)))):
            await stranger.send(data)
        assert (await endpoint.receive()).message == Wake(Epoch(1))
    assert endpoint.num_malformed == 3
    endpoint.close()
    stranger.close(0)


async def test_a_process_that_reconnects_takes_its_identity_over(context: zmq.asyncio.Context) -> None:
    endpoint = Endpoint(context)
    address = endpoint.address("127.0.0.1")
    async with asyncio.timeout(10):
        first = Link(context, ProcessId("router-1"), address)
        first.send(Wake(Epoch(1)))
        await endpoint.receive()
        second = Link(context, ProcessId("router-1"), address)
        second.send(Wake(Epoch(2)))
        peer = (await endpoint.receive()).peer
        endpoint.send(peer, Wake(Epoch(3)))
        assert (await second.receive())[0] == Wake(Epoch(3))
    for socket in (endpoint, first, second):
        socket.close()


async def test_a_message_to_nobody_blocks_nobody(context: zmq.asyncio.Context) -> None:
    endpoint = Endpoint(context)
    endpoint.send(ProcessId("gone"), Wake(Epoch(1)))
    link = Link(context, ProcessId("router-1"), "tcp://127.0.0.1:9")
    link.send(Wake(Epoch(1)))
    endpoint.close()
    link.close()


async def test_a_port_in_use_is_one_clear_line(context: zmq.asyncio.Context) -> None:
    endpoint = Endpoint(context)
    with pytest.raises(ValueError, match=f"cannot listen on port {endpoint.port}"):
        Endpoint(context, endpoint.port)
    endpoint.close()


async def test_tensors_are_not_copied_on_their_way(
    context: zmq.asyncio.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = Endpoint(context)
    link = Link(context, ProcessId("prefill-1"), endpoint.address("127.0.0.1"))
    copies, send = [], link._socket.send_multipart

    def spy(parts: Any, flags: int, copy: bool) -> Any:
        copies.append(copy)
        return send(parts, flags, copy)

    monkeypatch.setattr(link._socket, "send_multipart", spy)
    link.send(Wake(Epoch(1)))
    link.send(Wake(Epoch(2)), [b"kv" * 100_000])
    async with asyncio.timeout(10):
        assert [len((await endpoint.receive()).frames) for _ in range(2)] == [0, 1]
    assert copies == [True, False]
    endpoint.close()
    link.close()
