"""A cluster played by the test around a real router: monitor, bus, prefill workers and decode ranks on real sockets.

Tokens are a function of (prompt, index), as a real model's are at a fixed seed, so what a client received can be
compared whatever happened meanwhile. The printable characters of the tiny random checkpoint are ids 4 to 97.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field

import openai
import zmq
import zmq.asyncio

from common.config import ClusterConfig, ModelConfig, RouterConfig
from common.ids import Epoch, ProcessId
from common.messages import (
    AskPrefill,
    AskStatus,
    AskView,
    Directory,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Message,
    Placement,
    Prefill,
    PrefillDone,
    PrefillQueued,
    Status,
    View,
    Welcome,
    Worker,
    encode,
)
from common.monitor_address import MonitorAddress
from common.process_args import parse_process_args
from common.transport import Endpoint
from services.router.service import serve
from tests.services.fake_decode import (
    TINY_RANDOM,
    FakeDecode,
)

MONITOR = ProcessId("monitor-0-fake")
TERM = 1024


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Returns once ``condition`` holds; fails when it does not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not condition():
        assert loop.time() < deadline, f"not reached within {within_s} s"
        await asyncio.sleep(0.005)


class FakePrefill:
    def __init__(self, context: zmq.asyncio.Context, number: int, cluster: "FakeCluster") -> None:
        self.process = ProcessId(f"prefill-{number}-fake")
        self.endpoint, self._cluster = Endpoint(context), cluster
        self.seen: list[Prefill] = []
        self.stuck = False

    def worker(self) -> Worker:
        address = self.endpoint.address("127.0.0.1")
        return Worker(self.process, "prefill", self.process, "127.0.0.1", 1, address)

    async def listen(self) -> None:
        while True:
            incoming = await self.endpoint.receive()
            match incoming.message:
                case Prefill() as prefill:
                    self.seen.append(prefill)
                    if self.stuck:
                        continue
                    # The announcement may still be on its way to the decode rank.
                    await asyncio.sleep(0.005)
                    for decode in self._cluster.decodes:
                        if decode.rank == prefill.rank and decode.incarnation == prefill.incarnation:
                            decode.take_kv(prefill.request, prefill.attempt)
                    self.endpoint.send(incoming.peer, PrefillDone(prefill.request, prefill.attempt))
                case AskPrefill(request=request, attempt=attempt):
                    self.endpoint.send(incoming.peer, PrefillQueued(request, attempt))
                case _:
                    pass


@dataclass
class FakeCluster:
    """Starts empty: `add_decode`, `add_prefill`, then `publish`."""

    context: zmq.asyncio.Context
    group: asyncio.TaskGroup
    config: ClusterConfig
    decodes: list[FakeDecode] = field(default_factory=list)
    prefills: list[FakePrefill] = field(default_factory=list)
    epoch: int = TERM
    version: int = 1
    url: str = ""
    status: dict[str, object] | None = None
    beat: Heartbeat | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _router: ProcessId | None = None
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.monitor, self.bus = _bind_monitor(self.context)
        self.address = MonitorAddress("127.0.0.1", self.monitor.port)
        self.start(self._play_monitor())

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def start(self, work: Coroutine[object, object, None]) -> None:
        self._tasks.append(self.group.create_task(work))

    def add_decode(self, rank: int) -> FakeDecode:
        self.epoch += 1
        decode = FakeDecode(self.context, rank, self.epoch)
        self.decodes.append(decode)
        self.start(decode.listen())
        self.start(decode.run_rounds())
        return decode

    def add_prefill(self) -> FakePrefill:
        prefill = FakePrefill(self.context, len(self.prefills), self)
        self.prefills.append(prefill)
        self.start(prefill.listen())
        return prefill

    def view(self) -> View:
        members = tuple(sorted((decode.member() for decode in self.decodes), key=lambda member: member.rank))
        return View(MONITOR, TERM, Epoch(self.epoch), members, Placement(self.epoch, ()), "test")

    def directory(self) -> Directory:
        return Directory(MONITOR, TERM, self.version, tuple(prefill.worker() for prefill in self.prefills))

    def publish(self, by_bus: bool = False) -> None:
        """The present state as a new view and directory."""
        self.epoch, self.version = self.epoch + 1, self.version + 1
        for message in (self.view(), self.directory()):
            if by_bus:
                self.bus.send_multipart([b"view", encode(message)])
            elif self._router is not None:
                self.monitor.send(self._router, message)

    def kill(self, decode: FakeDecode) -> None:
        """As SIGKILL does: nothing more comes from it."""
        decode.rows.clear()
        self.decodes.remove(decode)
        decode.endpoint.close()

    async def start_router(self) -> str:
        """Returns its URL once it has been welcomed."""
        options = ["--monitor-address", str(self.address), "--host", "127.0.0.1", "--name", "router-0"]
        self.router = self.group.create_task(serve(parse_process_args("router", options), self.stop))
        await self._ready.wait()
        return self.url

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _play_monitor(self) -> None:
        while True:
            incoming = await self.monitor.receive()
            self._answer(incoming.peer, incoming.message)

    def _answer(self, peer: ProcessId, message: Message) -> None:
        match message:
            case Hello():
                self._router, self.url = peer, message.endpoint
                view = self.view() if self.decodes else None
                self.monitor.send(peer, Welcome(MONITOR, TERM, self.config, self.directory(), view))
            case Heartbeat():
                self.beat = message
                self.monitor.send(peer, HeartbeatReply(MONITOR, TERM, Epoch(message.epoch), 0))
                if message.state == "up":
                    self._ready.set()
            case AskView() if self._router:
                self.monitor.send(self._router, self.view())
            case AskStatus(id=id) if self.status is not None:
                self.monitor.send(peer, Status(id, json.dumps(self.status)))
            case _:
                pass


def _bind_monitor(context: zmq.asyncio.Context) -> tuple[Endpoint, zmq.asyncio.Socket]:
    """A monitor's control endpoint, and the bus three ports above it."""
    while True:
        monitor, bus = Endpoint(context), context.socket(zmq.PUB)
        try:
            bus.bind(f"tcp://127.0.0.1:{monitor.port + 3}")
        except zmq.ZMQError:
            monitor.close()
            bus.close(0)
            continue
        return monitor, bus


@contextlib.asynccontextmanager
async def fake_cluster(num_decodes: int = 2, num_prefills: int = 1, **router: float) -> AsyncIterator[FakeCluster]:
    """A cluster with a running router; everything is stopped and closed at the end."""
    settings = {"no_news_s": 0.2, "request_deadline_s": 20.0, "drain_s": 5.0, **router}
    config = ClusterConfig(model=ModelConfig(path=str(TINY_RANDOM)), router=RouterConfig(**settings))  # type: ignore[arg-type]
    context = zmq.asyncio.Context()
    try:
        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            cluster = FakeCluster(context, group, config)
            for rank in range(num_decodes):
                cluster.add_decode(rank)
            for _ in range(num_prefills):
                cluster.add_prefill()
            await cluster.start_router()
            yield cluster
            cluster.stop.set()
            await cluster.router
            cluster.close()
    finally:
        context.destroy(linger=0)
