"""A monitor with a key, and those who have none, another one, or only what they heard on the wire."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from common.bus import BusPublisher, BusSubscriber
from common.cluster_key import CHALLENGE_BYTES, ClusterKey, write_key
from common.config import ClusterConfig
from common.ids import ProcessId
from common.messages import AskStatus, Directory, Heartbeat, Hello, Message, SlotLeft, Status, encode
from common.monitor_address import MonitorAddress
from common.monitor_client import MonitorClient
from common.process_args import parse_process_args
from common.service_runner import OperatorError
from common.transport import open_context
from services.monitor.service import serve

PLANNER = ProcessId("planner-0123")
CONFIG = f'[model]\npath = "{Path(__file__).resolve().parents[1] / "fixtures" / "tiny-random"}"\n'
SECRET, OTHER_SECRET = b"\1" * 32, b"\2" * 32


class Member:
    """A process of the cluster: a planner, which is the simplest one."""

    def __init__(self, address: MonitorAddress) -> None:
        self.context = open_context(address.key)
        self.directory: Directory | None = None
        self._answers: asyncio.Queue[Status] = asyncio.Queue()
        hello = Hello(PLANNER, "planner", "planner", "127.0.0.1", 4711, "")
        self.client = MonitorClient(
            self.context, PLANNER, address, lambda: hello, lambda: Heartbeat(PLANNER), self._on_message, 0.05
        )
        self.run = asyncio.create_task(self.client.run())

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Directory):
            self.directory = message
        elif isinstance(message, Status):
            self._answers.put_nowait(message)

    async def status(self) -> dict[str, Any]:
        self.client.send(AskStatus(PLANNER, 1))
        body: dict[str, Any] = json.loads((await self._answers.get()).body)
        return body

    async def until(self, what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while not what(status := await self.status()):
                await asyncio.wait([self.run], timeout=0.01)
                assert not self.run.done(), self.run.result()
        return status

    async def close(self) -> None:
        self.run.cancel()
        with contextlib.suppress(asyncio.CancelledError, OperatorError):
            await self.run
        self.context.destroy(linger=0)


class Stage:
    def __init__(self, directory: Path, secret: bytes | None) -> None:
        (directory / "c.toml").write_text(CONFIG)
        arguments = ["--monitor-address", f"127.0.0.1:{_free_port()}", "--host", "127.0.0.1"]
        if secret is not None:
            arguments += ["--key-file", str(write_key(directory / "key", secret).path)]
        self.args = parse_process_args("monitor", [*arguments, "--config", str(directory / "c.toml")])
        self.address, self.stop = self.args.monitor_address, asyncio.Event()
        self.monitor = asyncio.create_task(serve(self.args, self.stop))
        self.member = Member(self.address)

    def with_key(self, key: ClusterKey | None) -> MonitorAddress:
        return MonitorAddress(self.address.host, self.address.port, key)

    async def close(self) -> None:
        await self.member.close()
        self.stop.set()
        await self.monitor


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path, SECRET)
    await stage.member.until(lambda status: status["phase"] == "active")
    yield stage
    await stage.close()


def _free_port() -> int:
    for base in range(21_000, 31_000, 7):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + 4):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return base
    raise AssertionError("no free ports")


def doors(status: dict[str, Any]) -> set[str]:
    return {event["door"] for event in status["events"] if event["kind"] == "unauthorised"}


def _are_refused(number: int, status: dict[str, Any]) -> bool:
    return int(status["strangers_refused"]) >= number


STRANGERS = {"no key": None, "another key": ClusterKey(Path("other"), OTHER_SECRET)}
FAULT = msgpack.packb({"type": "fault", "id": "x1", "action": "scale", "decode": 2})


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_stranger_on_the_bus_changes_nothing_hears_nothing_and_is_counted(stage: Stage, who: str) -> None:
    before = await stage.member.status()
    address = stage.with_key(STRANGERS[who])
    context = open_context(address.key)
    publisher, subscriber = BusPublisher(context, address), BusSubscriber(context, address, ("event", "view"))
    friend = BusSubscriber(stage.member.context, stage.address, ("event",))

    async def publish() -> None:
        while True:
            publisher.publish_raw("fault", FAULT)
            await asyncio.sleep(0.01)

    publishing = asyncio.create_task(publish())
    status = await stage.member.until(lambda status: doors(status) >= {"bus publish", "bus subscribe"})
    assert status["strangers_refused"] > before["strangers_refused"]
    assert status["desired_ranks"] == before["desired_ranks"] == 4
    assert not [event for event in status["events"] if event["kind"] == "fault"]

    # The same event by somebody who may; what it causes is the event that the stranger does not hear.
    allowed = BusPublisher(stage.member.context, stage.address)
    async with asyncio.timeout(20):
        while True:
            allowed.publish_raw("fault", FAULT)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    while msgpack.unpackb((await friend.receive_raw())[1])["kind"] != "fault":
                        pass
                    break
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await subscriber.receive_raw()
    publishing.cancel()
    for client in (publisher, subscriber, friend, allowed):
        client.close()
    context.destroy(linger=0)


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_stranger_on_the_control_port_is_not_heard(stage: Stage, who: str) -> None:
    context = open_context(STRANGERS[who])
    with context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.setsockopt_string(zmq.IDENTITY, PLANNER)
        dealer.connect(stage.address.control)
        hello = Hello(ProcessId("decode-9-ff"), "decode", "decode-9", "127.0.0.1", 1, "tcp://127.0.0.1:1")
        for message in (hello, SlotLeft(PLANNER, hello.rank, hello.incarnation, Heartbeat(PLANNER).epoch)):
            with contextlib.suppress(zmq.Again):  # refused before it was sent
                await dealer.send(encode(message), flags=zmq.DONTWAIT)
        status = await stage.member.until(lambda status: "control" in doors(status))
    assert all(event.get("name") != "decode-9" for event in status["events"])
    assert await stage.member.status()
    context.destroy(linger=0)


async def test_a_lifeline_needs_the_answer_to_its_own_challenge(stage: Stage) -> None:
    key, port = stage.address.key, stage.address.lifeline_port
    assert key is not None
    victim = ProcessId("decode-0-ab")
    heard = key.proof(b"\0" * CHALLENGE_BYTES, victim)  # to another challenge, as a listener on the wire would have it
    for number, line in enumerate((str(victim), f"{victim} {heard}", f"{victim} ")):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.readexactly(CHALLENGE_BYTES)
        writer.write(line.encode() + b"\n")
        async with asyncio.timeout(10):
            assert await reader.read() == b"", "the monitor keeps a lifeline that proved nothing"
        writer.close()
        await stage.member.until(partial(_are_refused, number + 1))
    assert "lifeline" in doors(await stage.member.status())

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    challenge = await reader.readexactly(CHALLENGE_BYTES)
    writer.write(f"{victim} {key.proof(challenge, victim)}\n".encode())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await reader.read()
    writer.close()


@pytest.mark.parametrize(
    ("secret", "key", "text"),
    [
        (SECRET, None, "asks for a key: give all processes the same --key-file"),
        (None, ClusterKey(Path("key"), SECRET), "has no key, but this process was given one"),
    ],
)
async def test_a_process_with_a_key_too_few_or_too_many_ends_with_one_clear_line(
    tmp_path: Path, secret: bytes | None, key: ClusterKey | None, text: str
) -> None:
    stage = Stage(tmp_path, secret)
    member = Member(stage.with_key(key))
    async with asyncio.timeout(20):
        with pytest.raises(OperatorError, match=f"the monitor at {stage.address} {text}"):
            await member.run
    await member.close()
    await stage.close()


async def test_another_key_is_told_in_the_log_of_the_process(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    member = Member(stage.with_key(ClusterKey(Path("other"), OTHER_SECRET)))
    async with asyncio.timeout(20):
        while "hangs up in the handshake: is this its --key-file?" not in caplog.text:
            await asyncio.wait([member.run], timeout=0.01)
    assert not member.run.done() and member.directory is None
    await member.close()


async def test_without_a_key_any_messagepack_client_may_publish(tmp_path: Path) -> None:
    stage = Stage(tmp_path, None)
    await stage.member.until(lambda status: status["phase"] == "active")
    context = zmq.asyncio.Context()
    publisher = context.socket(zmq.PUB)
    publisher.connect(stage.address.publish)

    async def is_scaled() -> None:
        await publisher.send_multipart([b"fault", FAULT])
        await asyncio.sleep(0.01)

    async with asyncio.timeout(20):
        while not [event for event in (await stage.member.status())["events"] if event["kind"] == "fault"]:
            await is_scaled()
    context.destroy(linger=0)
    await stage.close()


def test_the_default_is_the_whole_configuration() -> None:
    """Keys and tokens are given to processes, never to the configuration, which travels in every welcome."""
    assert not [name for name in ClusterConfig.__struct_fields__ if "key" in name or "secret" in name]
