"""The monitor's shell over real sockets; ranks are played by the test, without any data path."""

import ast
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
import zmq
import zmq.asyncio

from common.bus import BusPublisher, BusSubscriber
from common.config import MonitorConfig
from common.ids import NO_RANK, Epoch, Incarnation, ProcessId
from common.messages import (
    AskStatus,
    Directory,
    Exited,
    Heartbeat,
    Hello,
    Message,
    Prepare,
    Signal,
    SignalDone,
    SlotLeft,
    Status,
    View,
    Welcome,
)
from common.monitor_address import MonitorAddress
from common.monitor_client import MonitorClient
from common.process_args import parse_process_args
from common.service_runner import OperatorError
from common.view import member_of, ranks
from services.monitor.service import serve

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
[model]
path = "{model}"
[decode]
num_ranks = 2
max_ranks = 4
"""


def _free_port() -> int:
    """The first of four neighbouring free ports."""
    for base in range(20000 + os.getpid() % 20000, 60000, 4):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(base, base + 4):
                stack.enter_context(socket.create_server(("0.0.0.0", port)))
            return base
    raise AssertionError("no free ports")


class Player:
    """A process that does what membership asks for, at once. Decode ranks enter views as soon as they hear of them."""

    def __init__(self, context: zmq.asyncio.Context, address: MonitorAddress, kind: str, name: str) -> None:
        self.process, self.kind, self.name = ProcessId(f"{name}-{os.urandom(4).hex()}"), kind, name
        self.rank, self.incarnation, self.epoch, self.life = NO_RANK, Incarnation(0), Epoch(0), 0
        self.view: View | None = None
        self.directory: Directory | None = None
        self.statuses: list[Status] = []
        self.on_signal: Callable[[Signal], None] = lambda signal: None
        self.client = MonitorClient(context, self.process, address, self._hello, self._beat, self._on_message, 0.05)
        self.run = asyncio.create_task(self.client.run())

    def _hello(self) -> Hello:
        heap = f"{self.process}.{self.life}.heap"
        agent = "agent-0" if self.kind == "decode" else ""
        hello = Hello(self.process, self.kind, self.name, "127.0.0.1", 4711, "", agent, heap)
        if self.view is None or member_of(self.view, self.process) is None:
            return hello
        return msgspec.structs.replace(hello, rank=self.rank, incarnation=self.incarnation, view=self.view)

    def _beat(self) -> Heartbeat:
        state = "serving" if self.epoch else "joining"
        return Heartbeat(self.process, self.rank, self.incarnation, self.client.term, self.epoch, state)

    def _on_message(self, message: Message) -> None:
        match message:
            case Welcome(rank=rank, incarnation=incarnation, directory=directory):
                self.directory = directory
                if rank != NO_RANK:
                    self.rank, self.incarnation = rank, incarnation
            case Prepare(view=view) if member_of(view, self.process):
                self.epoch = view.epoch
            case View():
                self._on_view(message)
            case Directory():
                self.directory = message
            case Status():
                self.statuses.append(message)
            case Signal():
                self.on_signal(message)
            case _:
                pass

    def _on_view(self, view: View) -> None:
        self.view = view
        if self.kind != "decode" or member_of(view, self.process):
            self.epoch = view.epoch
        elif self.epoch:
            self.client.send(SlotLeft(self.process, self.rank, self.incarnation, view.epoch))
            self.rank, self.incarnation, self.epoch, self.life = NO_RANK, Incarnation(0), Epoch(0), self.life + 1
            self.client.say_hello()

    async def die(self) -> None:
        """As far as the monitor can see: the kernel closes all its sockets."""
        self.run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.run

    async def status(self) -> dict[str, Any]:
        number = len(self.statuses)
        self.client.send(AskStatus(self.process, number))
        await until(lambda: len(self.statuses) > number)
        body: dict[str, Any] = json.loads(self.statuses[-1].body)
        return body


class Stage:
    def __init__(self, tmp_path: Path) -> None:
        self.config = tmp_path / "cluster.toml"
        self.config.write_text(CONFIG.format(model=ROOT / "tests" / "fixtures" / "tiny-random"))
        self.port = _free_port()
        self.address = MonitorAddress("127.0.0.1", self.port)
        self.context = zmq.asyncio.Context()
        self.players: list[Player] = []
        self.stop = asyncio.Event()
        self.monitor = asyncio.create_task(self.start_monitor())

    async def start_monitor(self) -> None:
        args = ["--monitor-address", str(self.address), "--host", "127.0.0.1", "--config", str(self.config)]
        await serve(parse_process_args("monitor", args), self.stop)

    def enter(self, kind: str, name: str) -> Player:
        self.players.append(Player(self.context, self.address, kind, name))
        return self.players[-1]

    async def form(self) -> tuple[Player, Player, Player]:
        """A router and two ranks in force."""
        router, first = self.enter("router", "router-0"), self.enter("decode", "decode-0")
        await until(lambda: first.rank == 0)
        second = self.enter("decode", "decode-1")
        await until(lambda: router.view is not None and len(router.view.members) == 2)
        return router, first, second

    async def close(self) -> None:
        for player in self.players:
            await player.die()
        self.stop.set()
        await self.monitor
        self.context.destroy(linger=0)


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not reached within {within_s} s"
        await asyncio.sleep(0.002)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    await stage.close()


async def test_ranks_form_a_group_and_a_closed_lifeline_ends_membership(stage: Stage) -> None:
    router, first, second = await stage.form()
    assert (first.rank, second.rank) == (0, 1) and router.view is not None
    assert router.directory is not None and len(router.directory.of_kind("decode")) == 2
    bus = BusSubscriber(stage.context, stage.address, ("view", "event"))
    epoch = router.view.epoch
    await asyncio.sleep(0)
    closed_at = time.monotonic()
    await second.die()
    async with asyncio.timeout(20):
        await until(lambda: router.view is not None and ranks(router.view) == (0,))
    took_s = time.monotonic() - closed_at
    assert router.view.epoch > epoch and "lifeline closed" in router.view.reason
    assert took_s < MonitorConfig().heartbeat_timeout_s, "silence was waited for"
    await until(lambda: first.epoch == router.epoch)
    status = await router.status()
    assert [(entry["rank"], entry["state"]) for entry in status["ranks"]] == [(0, "serving"), (1, "dead")]
    bus.close()


async def test_the_view_reaches_the_bus_soon_after_a_lifeline_closes(stage: Stage) -> None:
    _, _, second = await stage.form()
    bus = BusSubscriber(stage.context, stage.address, ("view",))
    publisher = BusPublisher(stage.context, stage.address)

    async def wait_for_view(size: int) -> None:
        while True:
            _, message = await bus.receive()
            if isinstance(message, View) and message.monitor != "probe" and len(message.members) == size:
                return

    async with asyncio.timeout(20):
        probe = Directory(ProcessId("probe"), 0, 0, ())
        while True:  # until subscription and publisher are connected
            publisher.publish("view", probe)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await bus.receive()
                    break
        closed_at = time.monotonic()
        await second.die()
        await wait_for_view(1)
    took_s = time.monotonic() - closed_at
    print(f"lifeline closed -> view on the bus: {took_s * 1000:.1f} ms")
    assert took_s < MonitorConfig().heartbeat_timeout_s, "silence was waited for"
    bus.close()
    publisher.close()


async def test_mask_by_the_example_and_unmask(stage: Stage) -> None:
    router, first, second = await stage.form()
    bus = (await router.status())["bus"]

    async def publish_fault(action: str) -> list[dict[str, Any]]:
        command = [sys.executable, "examples/fault_event.py", bus["publish"], bus["subscribe"], action, "1"]
        run = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, stdout=subprocess.PIPE, timeout=30, check=True)
        return [ast.literal_eval(line) for line in run.stdout.decode().splitlines()]

    events = await publish_fault("mask")
    assert events[-1]["status"] == "done" and "without it" in events[-1]["proof"], events
    assert second.epoch == 0 and second.rank == NO_RANK
    await until(lambda: first.view is not None and ranks(first.view) == (0,))
    status = await router.status()
    assert [entry["state"] for entry in status["ranks"]] == ["serving", "masked"]
    events = await publish_fault("unmask")
    assert events[-1]["status"] == "done" and "rank 1 serves" in events[-1]["proof"], events
    assert second.rank == 1 and second.epoch == first.epoch


async def test_kill_is_proven_by_the_agent(stage: Stage) -> None:
    router, _, second = await stage.form()
    agent = stage.enter("agent", "agent-0")

    signals: list[tuple[str, str]] = []

    def on_signal(signal: Signal) -> None:
        signals.append((signal.process, signal.signal))
        if signal.process != second.process:
            return  # the other rank's end comes when the stage is closed, and may be answered by a fence
        second.run.cancel()
        agent.client.send(Exited("agent-0", signal.process, "decode-1", signal.pid, "signal KILL"))
        agent.client.send(SignalDone(signal.id, signal.process, True, "reaped: signal KILL"))

    agent.on_signal = on_signal
    await until(lambda: agent.directory is not None)
    publisher = BusPublisher(stage.context, stage.address)
    bus = BusSubscriber(stage.context, stage.address, ("event",))
    fault = msgpack.packb({"type": "fault", "id": "k1", "action": "kill", "rank": 1})
    status = ""
    async with asyncio.timeout(20):
        while status != "done":
            publisher.publish_raw("fault", fault)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    while status != "done":
                        event = msgpack.unpackb((await bus.receive_raw())[1])
                        if event.get("id") == "k1":
                            status = event["status"]
                            assert status in ("accepted", "done"), event
                            assert status == "accepted" or event["proof"] == "pid 4711 gone: signal KILL"
    assert signals[0] == (second.process, "KILL")
    await until(lambda: router.view is not None and ranks(router.view) == (0,))
    publisher.close()
    bus.close()


async def test_a_restarted_monitor_goes_on_with_the_group(stage: Stage) -> None:
    router, _, _ = await stage.form()
    assert router.view is not None
    before = router.view

    stage.stop.set()
    await stage.monitor
    stage.stop = asyncio.Event()
    stage.monitor = asyncio.create_task(stage.start_monitor())
    await until(lambda: router.view is not None and router.view.term > before.term)
    assert [(m.rank, m.incarnation) for m in router.view.members] == [(m.rank, m.incarnation) for m in before.members]
    assert router.view.epoch > before.epoch and router.view.monitor != before.monitor


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
async def test_a_port_in_use_is_one_clear_line(tmp_path: Path, offset: int) -> None:
    port = _free_port()
    with socket.create_server(("0.0.0.0", port + offset)):
        args = ["--monitor-address", f"127.0.0.1:{port}", "--host", "127.0.0.1"]
        with pytest.raises(OperatorError, match=f"cannot listen on port {port + offset}: "):
            await serve(parse_process_args("monitor", args), asyncio.Event())


async def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    config = tmp_path / "cluster.toml"
    config.write_text(f'[model]\npath = "{tmp_path}"\n')
    args = ["--monitor-address", "127.0.0.1:7000", "--host", "127.0.0.1", "--config", str(config)]
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        await serve(parse_process_args("monitor", args), asyncio.Event())
