"""Messages that the event loop takes off a socket: none forgotten, whatever else happens on it."""

import asyncio
import select
import time
from collections.abc import AsyncIterator

import pytest
import zmq

from common.ids import Epoch, ProcessId
from common.messages import Wake
from common.transport import Endpoint, Link, open_context

NUM = 350  # several times what a socket takes at once


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Endpoint, Link]]:
    context = open_context(None)
    endpoint = Endpoint(context)
    link = Link(context, ProcessId("a"), endpoint.address("127.0.0.1"))
    yield endpoint, link
    endpoint.close()
    link.close()
    context.destroy(linger=0)


async def test_all_that_came_before_anybody_asked_is_there(pair: tuple[Endpoint, Link]) -> None:
    endpoint, link = pair
    for number in range(NUM):
        link.send(Wake(Epoch(number)))
    async with asyncio.timeout(20):
        numbers = [(await endpoint.receive()).message for _ in range(NUM)]
    assert numbers == [Wake(Epoch(number)) for number in range(NUM)]


async def test_a_message_that_a_send_has_heard_of_is_taken_all_the_same(pair: tuple[Endpoint, Link]) -> None:
    """The descriptor tells of it once."""
    endpoint, link = pair
    async with asyncio.timeout(20):
        link.send(Wake(Epoch(1)))
        peer = (await endpoint.receive()).peer
        endpoint.send(peer, Wake(Epoch(2)))
        assert (await link.receive())[0] == Wake(Epoch(2))
        descriptor = int(link._socket.getsockopt(zmq.FD))
        endpoint.send(peer, Wake(Epoch(3)))
        assert select.select([descriptor], [], [], 10)[0]
        until = time.monotonic() + 10
        while select.select([descriptor], [], [], 0)[0]:
            assert time.monotonic() < until
            link.send(Wake(Epoch(4)))
        assert (await link.receive())[0] == Wake(Epoch(3))


async def test_a_receiver_that_was_given_up_loses_nothing(pair: tuple[Endpoint, Link]) -> None:
    endpoint, link = pair
    waiting = asyncio.ensure_future(endpoint.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    link.send(Wake(Epoch(1)))
    async with asyncio.timeout(20):
        assert (await endpoint.receive()).message == Wake(Epoch(1))


@pytest.mark.parametrize("by_context", [False, True])
async def test_a_closed_socket_leaves_no_reader_on_the_loop(by_context: bool) -> None:
    context = open_context(None)
    endpoint = Endpoint(context)
    link = Link(context, ProcessId("a"), endpoint.address("127.0.0.1"))
    link.send(Wake(Epoch(1)))
    async with asyncio.timeout(20):
        await endpoint.receive()
    descriptor = int(endpoint._socket.getsockopt(zmq.FD))
    if not by_context:
        endpoint.close()
        link.close()
    context.destroy(linger=0)
    assert not asyncio.get_running_loop().remove_reader(descriptor)


async def test_what_nobody_can_take_is_dropped_and_counted(pair: tuple[Endpoint, Link]) -> None:
    _, link = pair
    link._socket.disconnect(link.address)
    link.send(Wake(Epoch(1)))
    assert link.num_dropped == 1


async def test_what_is_sent_after_the_end_is_dropped_and_counted() -> None:
    """Threads of a process that ends hand words to the loop until they have ended themselves."""
    context = open_context(None)
    endpoint = Endpoint(context)
    link = Link(context, ProcessId("a"), endpoint.address("127.0.0.1"))
    context.destroy(linger=0)
    link.send(Wake(Epoch(1)))
    endpoint.send(ProcessId("a"), Wake(Epoch(1)))
    assert (link.num_dropped, endpoint.num_dropped) == (1, 1)
