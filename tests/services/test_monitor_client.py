"""A process's relation to its monitor, over real sockets, with the monitor played by the test."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest
import zmq.asyncio

from common.config import ClusterConfig, MonitorConfig
from common.ids import Epoch, ProcessId
from common.messages import AskView, Directory, Heartbeat, HeartbeatReply, Hello, Message, Refusal, Welcome
from common.monitor_address import MonitorAddress
from common.monitor_client import MonitorClient
from common.service_runner import OperatorError
from common.transport import Endpoint, Incoming

PROCESS = ProcessId("router-0-ab")
MONITOR = ProcessId("monitor-cd")
HELLO = Hello(PROCESS, "router", "router-0", "127.0.0.1", 1, "")


def _welcome(term: int, monitor: ProcessId = MONITOR, version: int = 1) -> Welcome:
    return Welcome(monitor, term, ClusterConfig(), Directory(monitor, term, version, ()))


class _Stage:
    """A fake monitor endpoint and one client; ``heard`` is what the client passed on to its service."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.endpoint = Endpoint(context)
        self.heard: asyncio.Queue[Message] = asyncio.Queue()
        self.epoch = Epoch(0)
        address = MonitorAddress("127.0.0.1", self.endpoint.port)
        self.client = MonitorClient(
            context, PROCESS, address, lambda: HELLO, self._beat, self.heard.put_nowait, heartbeat_s=0.02
        )
        self.run = asyncio.create_task(self.client.run())

    def _beat(self) -> Heartbeat:
        return Heartbeat(PROCESS, epoch=self.epoch)

    async def expect(self, kind: type[Message]) -> Incoming:
        while True:
            incoming = await self.endpoint.receive()
            if isinstance(incoming.message, kind):
                return incoming

    async def say(self, message: Message) -> None:
        self.endpoint.send(PROCESS, message)


@pytest.fixture
async def stage() -> AsyncIterator[_Stage]:
    context = zmq.asyncio.Context()
    stage = _Stage(context)
    async with asyncio.timeout(20):
        yield stage
    stage.run.cancel()
    with contextlib.suppress(asyncio.CancelledError, OperatorError):
        await stage.run
    stage.endpoint.close()
    context.destroy(linger=0)


async def test_hello_is_repeated_until_welcomed(stage: _Stage) -> None:
    await stage.expect(Hello)
    await stage.expect(Hello)
    await stage.say(_welcome(1024))
    assert await stage.heard.get() == _welcome(1024)


async def test_heartbeats_come_on_a_socket_of_their_own_and_who_is_behind_asks(stage: _Stage) -> None:
    await stage.expect(Hello)
    await stage.say(_welcome(1024))
    await stage.heard.get()
    beat = await stage.expect(Heartbeat)
    assert beat.peer == f"{PROCESS}#beat"
    stage.endpoint.send(beat.peer, HeartbeatReply(MONITOR, 1024, Epoch(1030), 1))
    assert (await stage.expect(AskView)).message == AskView(PROCESS)


async def test_heartbeats_come_as_often_as_the_configuration_says(stage: _Stage) -> None:
    await stage.expect(Hello)
    seldom = ClusterConfig(monitor=MonitorConfig(heartbeat_s=0.5))
    await stage.say(msgspec.structs.replace(_welcome(1024), config=seldom))
    await stage.heard.get()
    assert stage.client._heartbeats.interval_s == 0.5


async def test_a_monitor_of_a_new_term_is_greeted_and_the_old_one_no_longer_heard(stage: _Stage) -> None:
    await stage.expect(Hello)
    await stage.say(_welcome(1024))
    await stage.heard.get()
    beat = await stage.expect(Heartbeat)
    successor = ProcessId("monitor-ef")
    stage.endpoint.send(beat.peer, HeartbeatReply(successor, 2048, Epoch(0), 0))
    await stage.expect(Hello)
    await stage.say(_welcome(1024, version=9))
    await stage.say(_welcome(2048, successor))
    assert await stage.heard.get() == _welcome(2048, successor)


async def test_an_unknown_process_says_hello_again(stage: _Stage) -> None:
    await stage.expect(Hello)
    await stage.say(_welcome(1024))
    await stage.heard.get()
    beat = await stage.expect(Heartbeat)
    stage.endpoint.send(beat.peer, HeartbeatReply(MONITOR, 1024, Epoch(0), 0, known=False))
    await stage.expect(Hello)


async def test_a_final_refusal_ends_the_process_with_the_reason(stage: _Stage) -> None:
    await stage.expect(Hello)
    await stage.say(Refusal("two processes claim slot 1", final=True))
    with pytest.raises(OperatorError, match="two processes claim slot 1"):
        await stage.run


def _neighbouring_ports(context: zmq.asyncio.Context) -> tuple[Endpoint, socket.socket]:
    """As the monitor has them: the lifeline listens on the port after the control port."""
    while True:
        endpoint = Endpoint(context)
        try:
            return endpoint, socket.create_server(("127.0.0.1", endpoint.port + 1))
        except OSError:
            endpoint.close()


async def test_the_lifeline_names_the_process_and_closes_with_it() -> None:
    context = zmq.asyncio.Context()
    endpoint, server = _neighbouring_ports(context)
    events: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def on_lifeline(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = await reader.readline()
        events.put_nowait(("open", name))
        await reader.read()
        writer.close()
        events.put_nowait(("closed", name))

    listening = await asyncio.start_server(on_lifeline, sock=server)
    client = MonitorClient(
        context,
        PROCESS,
        MonitorAddress("127.0.0.1", endpoint.port),
        lambda: HELLO,
        lambda: Heartbeat(PROCESS),
        lambda _: None,
    )
    run = asyncio.create_task(client.run())
    async with asyncio.timeout(10):
        assert await events.get() == ("open", PROCESS.encode() + b"\n")
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run
        assert await events.get() == ("closed", PROCESS.encode() + b"\n")
    listening.close()
    await listening.wait_closed()
    endpoint.close()
    context.destroy(linger=0)


async def test_a_client_that_is_cancelled_while_it_ends_leaves_no_error_of_its_thread() -> None:
    """The heartbeat thread is not waited for then, and the context ends under it."""
    context = zmq.asyncio.Context()
    client = MonitorClient(
        context,
        PROCESS,
        MonitorAddress("127.0.0.1", 1),
        lambda: HELLO,
        lambda: Heartbeat(PROCESS),
        lambda message: None,
        heartbeat_s=0.4,
    )
    run = asyncio.create_task(client.run())
    await asyncio.sleep(0.1)
    run.cancel()
    await asyncio.sleep(0.02)
    assert not run.done(), "it waits for the thread"
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    context.destroy(linger=0)
    await asyncio.to_thread(client._heartbeats._thread.join, 10)
