"""A cluster played by the test around a real router: monitor, bus, prefill workers and decode ranks on real sockets.

Tokens are a function of (prompt, index), as a real model's are at a fixed seed, so what a client received can be
compared whatever happened meanwhile. The printable characters of the tiny random checkpoint are ids 4 to 97.
"""

import asyncio
import contextlib
import json
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import openai
import zmq
import zmq.asyncio

from common.config import ClusterConfig, ModelConfig, RouterConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Announce,
    AskPrefill,
    AskStatus,
    AskView,
    Directory,
    Have,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Member,
    Message,
    Placement,
    Prefill,
    PrefillDone,
    PrefillQueued,
    Refused,
    Release,
    Status,
    TokenBatch,
    Tokens,
    TopLogprobs,
    Unknown,
    View,
    Welcome,
    Worker,
    encode,
)
from common.model.tokenizer import Tokenizer
from common.monitor_address import MonitorAddress
from common.process_args import parse_process_args
from common.transport import Endpoint
from services.router.service import serve

TINY_RANDOM = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-random"
TOKENIZER = Tokenizer.load(TINY_RANDOM)
EOS = 1
MONITOR = ProcessId("monitor-0-fake")
TERM = 1024


def token(prompt: tuple[int, ...], index: int) -> int:
    return 4 + zlib.crc32(repr((prompt, index)).encode()) % 94


def logprob(prompt: tuple[int, ...], index: int) -> float:
    return -(zlib.crc32(repr((prompt, index, "p")).encode()) + 1) / 2**31


def alternatives(prompt: tuple[int, ...], index: int, count: int) -> TopLogprobs:
    """What the fake model calls the likeliest tokens at ``index``; the chosen one is the second."""
    others = [4 + (token(prompt, index) - 4 + step) % 94 for step in (1, *range(count, 1, -1))]
    ids = [others[0], token(prompt, index), *others[1:]][:count]
    return tuple((id, logprob(prompt, index) + 0.25 - 0.25 * place) for place, id in enumerate(ids))


def prompt_logprobs(prompt: tuple[int, ...], count: int) -> tuple[tuple[float, TopLogprobs], ...]:
    """Of all prompt tokens but the first."""
    positions = range(1 - len(prompt), 0)
    return tuple((logprob(prompt, position), alternatives(prompt, position, count)) for position in positions)


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Returns once ``condition`` holds; fails when it does not in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not condition():
        assert loop.time() < deadline, f"not reached within {within_s} s"
        await asyncio.sleep(0.005)


def expected_text(prompt: tuple[int, ...], num_tokens: int) -> str:
    return TOKENIZER.decode([token(prompt, index) for index in range(num_tokens)])


@dataclass
class _Row:
    """A request as a fake decode rank holds it."""

    announce: Announce
    router: ProcessId
    outputs: list[int]
    has_kv: bool = False
    num_sent: int = 0


class FakeDecode:
    """One token a round for every request that has its KV."""

    def __init__(self, context: zmq.asyncio.Context, rank: int, incarnation: int) -> None:
        self.rank, self.incarnation = Rank(rank), Incarnation(incarnation)
        self.process = ProcessId(f"decode-{rank}-{incarnation}")
        self.endpoint = Endpoint(context)
        self.rows: dict[RequestId, _Row] = {}
        self.aborted: asyncio.Queue[Abort] = asyncio.Queue()
        self.released: asyncio.Queue[Release] = asyncio.Queue()
        self.stop_after = -1  # outputs after which the model says end of sequence
        self.round_s = 0.002
        self.paused = False
        self.pause_at = -1  # outputs at which a request makes no progress

    def member(self) -> Member:
        return Member(self.rank, self.incarnation, self.process, "127.0.0.1", self.endpoint.address("127.0.0.1"), "")

    def take_kv(self, request: RequestId, attempt: int) -> None:
        row = self.rows.get(request)
        if row is not None and row.announce.attempt == attempt:
            row.has_kv = True

    async def listen(self) -> None:
        while True:
            incoming = await self.endpoint.receive()
            match incoming.message:
                case Announce() as announce:
                    self.rows[announce.request] = _Row(announce, incoming.peer, list(announce.outputs))
                case Abort() as abort:
                    self.rows.pop(abort.request, None)
                    self.aborted.put_nowait(abort)
                case Release() as release:
                    self.rows.pop(release.request, None)
                    self.released.put_nowait(release)
                case Have(request=request, attempt=attempt, num_outputs=have):
                    row = self.rows.get(request)
                    if row is None:
                        self.endpoint.send(incoming.peer, Unknown(request, attempt))
                    else:
                        self._send(row, have)
                case _:
                    pass

    async def run_rounds(self) -> None:
        while True:
            await asyncio.sleep(self.round_s)
            for row in list(self.rows.values()):
                paused = self.paused or len(row.outputs) == self.pause_at
                if row.has_kv and not paused and not self._finish(row):
                    row.outputs.append(self._next(row))
                    self._send(row, len(row.outputs) - 1)

    def preempt(self, request: RequestId) -> None:
        """Gives it up for lack of KV blocks: the router has its tokens, and places it again."""
        row = self.rows.pop(request)
        refusal = Refused(request, row.announce.attempt, "no KV blocks left", preempted=True)
        self.endpoint.send(row.router, refusal)

    def _next(self, row: _Row) -> int:
        at_end = len(row.outputs) == self.stop_after and not row.announce.sampling.ignore_eos
        return EOS if at_end else token(row.announce.prompt, len(row.outputs))

    def _finish(self, row: _Row) -> str:
        sampling, num_outputs = row.announce.sampling, len(row.outputs)
        if num_outputs > sampling.min_tokens and row.outputs[-1] in sampling.stop_ids:
            return "stop"
        return "length" if num_outputs >= sampling.max_tokens else ""

    def _send(self, row: _Row, start: int) -> None:
        announce, ids = row.announce, tuple(row.outputs[start:])
        prompt, sampling = announce.prompt, announce.sampling
        indices = range(start, start + len(ids))
        tokens = Tokens(
            announce.request,
            announce.attempt,
            start,
            ids,
            tuple(logprob(prompt, index) for index in indices) if sampling.logprobs else (),
            self._finish(row),
            tuple(alternatives(prompt, index, sampling.num_top_logprobs) for index in indices)
            if sampling.num_top_logprobs
            else (),
            prompt_logprobs(prompt, sampling.num_top_logprobs) if sampling.prompt_logprobs and start == 0 else (),
        )
        batch = TokenBatch(self.rank, self.incarnation, Epoch(0), (tokens,), len(self.rows), 1000)
        self.endpoint.send(row.router, batch)


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
