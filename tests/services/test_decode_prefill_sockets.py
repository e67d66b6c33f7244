"""The shells of decode and prefill over real sockets, in one event loop; the test plays monitor and router."""

import asyncio
import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import zmq.asyncio

from common.config import ClusterConfig, ModelConfig, PrefillConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Announce,
    AskPrefill,
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
    Prepare,
    Release,
    SlotLeft,
    TokenBatch,
    Unknown,
    View,
    Welcome,
)
from common.monitor_address import MonitorAddress
from common.placement import initial_placement, num_local_experts
from common.process_args import parse_process_args
from common.transport import Endpoint, Link
from services.decode.service import DecodeService
from services.prefill.prefill_engine import Piece, PrefillEngine
from services.prefill.prefill_queue import Chunk
from services.prefill.service import PrefillService
from tests.services.decode_group import Reference, Request, tiny_config

MONITOR, ROUTER = ProcessId("monitor-0"), ProcessId("router-0")
NUM_RANKS = 2


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not reached within {within_s} s"
        await asyncio.sleep(0.005)


class Cluster:
    """Gives out slots 0 and 1 and one first view; collects what the router is told."""

    def __init__(self, context: zmq.asyncio.Context, heap_dir: Path, config: ClusterConfig) -> None:
        self._context, self._heap_dir, self.config = context, heap_dir, config
        self.address, self._endpoint = _listen(context)
        self.hellos: dict[ProcessId, Hello] = {}
        self.beats: dict[ProcessId, Heartbeat] = {}
        self.left: list[SlotLeft] = []
        self.view: View | None = None
        self.links: dict[str, Link] = {}
        self.tokens: dict[int, tuple[int, float]] = {}
        self.finish = ""
        self.answers: list[Message] = []
        self.tasks: list[asyncio.Future[None]] = [asyncio.ensure_future(self.run())]

    async def run(self) -> None:
        while True:
            incoming = await self._endpoint.receive()
            match incoming.message:
                case Hello() as hello:
                    self.hellos[hello.process] = hello
                    self._endpoint.send(hello.process, self._welcome(hello))
                case Heartbeat() as beat:
                    self.beats[beat.process] = beat
                    self._endpoint.send(incoming.peer, HeartbeatReply(MONITOR, 1024, Epoch(0), 0))
                case SlotLeft() as left:
                    self.left.append(left)
                case _:
                    pass

    def of_kind(self, kind: str) -> list[Hello]:
        return sorted((h for h in self.hellos.values() if h.kind == kind), key=lambda hello: hello.name)

    def form(self) -> View:
        decode, rows = self.config.decode, num_local_experts(self.config.decode, 32)
        placement = Placement(1030, initial_placement(2, 32, decode.max_ranks, decode.num_ranks, rows))
        members = tuple(
            Member(Rank(rank), Incarnation(1025 + rank), hello.process, hello.host, hello.endpoint, hello.heap)
            for rank, hello in enumerate(self.of_kind("decode"))
        )
        view = self.view = View(MONITOR, 1024, Epoch(1031), members, placement)
        for member in members:
            self._endpoint.send(member.process, Prepare(view, Epoch(0)))
        return view

    def _welcome(self, hello: Hello) -> Welcome:
        directory = Directory(MONITOR, 1024, 1, ())
        if hello.kind != "decode":
            return Welcome(MONITOR, 1024, self.config, directory)
        rank = int(hello.name[-1])
        return Welcome(MONITOR, 1024, self.config, directory, None, Rank(rank), Incarnation(1025 + rank))

    def link(self, endpoint: str) -> Link:
        """As a router: one link for each endpoint, answers collected."""
        if endpoint not in self.links:
            self.links[endpoint] = Link(self._context, ROUTER, endpoint)
            self.tasks.append(asyncio.ensure_future(self._collect(self.links[endpoint])))
        return self.links[endpoint]

    async def _collect(self, link: Link) -> None:
        while True:
            message, _ = await link.receive()
            if isinstance(message, TokenBatch):
                for item in message.items:
                    self.tokens |= dict(enumerate(zip(item.ids, item.logprobs, strict=True), item.start))
                    self.finish = item.finish or self.finish
            else:
                self.answers.append(message)


def _listen(context: zmq.asyncio.Context) -> tuple[MonitorAddress, Endpoint]:
    for _ in range(50):
        port = random.randrange(20000, 60000)
        try:
            return MonitorAddress("127.0.0.1", port), Endpoint(context, port)
        except ValueError:
            continue
    raise AssertionError("no free port")


@asynccontextmanager
async def cluster(heap_dir: Path, config: ClusterConfig) -> AsyncIterator[tuple[Cluster, list["asyncio.Task[None]"]]]:
    """A monitor, two decode ranks and a prefill worker; the tasks are those of the services."""
    context = zmq.asyncio.Context()
    made, stop = Cluster(context, heap_dir, config), asyncio.Event()

    def args(kind: str, name: str) -> list[str]:
        where = ["--monitor-address", str(made.address), "--host", "127.0.0.1", "--heap-dir", str(heap_dir)]
        return [*where, "--name", name, "--process-id", f"{name}-test"]

    services = [
        asyncio.create_task(DecodeService(parse_process_args("decode", args("decode", f"decode-{n}"))).serve(stop))
        for n in range(NUM_RANKS)
    ]
    prefill = PrefillService(parse_process_args("prefill", args("prefill", "prefill-0")))
    services.append(asyncio.create_task(prefill.serve(stop)))
    try:
        yield made, services
    finally:
        stop.set()
        await asyncio.gather(*services, return_exceptions=True)
        for task in made.tasks:
            task.cancel()
        await asyncio.gather(*made.tasks, return_exceptions=True)
        context.destroy(linger=0)


async def formed(made: Cluster) -> View:
    await until(lambda: len(made.of_kind("decode")) == NUM_RANKS and len(made.of_kind("prefill")) == 1)
    await until(lambda: len(made.beats) == NUM_RANKS + 1)
    view = made.form()
    await until(lambda: all(made.beats[member.process].epoch == view.epoch for member in view.members))
    return view


async def test_a_request_through_prefill_and_decode(tmp_path: Path) -> None:
    request = Request("r", tuple(range(40, 70)), max_tokens=20)
    async with cluster(tmp_path, tiny_config(NUM_RANKS)) as (made, services):
        view = await formed(made)
        member, worker = view.members[1], made.of_kind("prefill")[0]
        name, sampling = RequestId(request.name), request.sampling
        decode, prefill = made.link(member.endpoint), made.link(worker.endpoint)
        decode.send(Announce(name, 1, ROUTER, member.incarnation, request.prompt, (), sampling))
        prefill.send(
            Prefill(name, 1, ROUTER, request.prompt, (), sampling, member.rank, member.incarnation, member.endpoint)
        )
        await until(lambda: len(made.tokens) == request.max_tokens)
        outputs = tuple(made.tokens[index] for index in range(request.max_tokens))
        assert outputs == Reference().outputs(request)
        assert made.finish == "length"
        assert PrefillDone(name, 1) in made.answers

        # Placed again in the middle, it finds its own prompt in the worker's prefix cache.
        known = tuple(outputs[index][0] for index in range(7))
        made.tokens.clear()
        decode.send(Announce(name, 2, ROUTER, member.incarnation, request.prompt, known, sampling))
        prefill.send(
            Prefill(name, 2, ROUTER, request.prompt, known, sampling, member.rank, member.incarnation, member.endpoint)
        )
        await until(lambda: len(made.tokens) == request.max_tokens - len(known))
        assert tuple(made.tokens[index] for index in range(len(known), request.max_tokens)) == outputs[len(known) :]
        await until(lambda: made.beats[worker.process].counters["prefix_hits"] == 1)
        assert made.beats[worker.process].counters["prefix_tokens_saved"] == 16

        decode.send(Release(name, 2))
        decode.send(Have(name, 1, 3))
        prefill.send(AskPrefill(RequestId("other"), 1))
        await until(lambda: made.answers.count(Unknown(name, 1)) == 1)
        await until(lambda: Unknown(RequestId("other"), 1) in made.answers)
        beat = made.beats[member.process]
        assert beat.state == "serving" and beat.rank == 1
        num_committed = 2 * request.max_tokens - len(known)
        await until(lambda: made.beats[member.process].counters["tokens_committed"] == num_committed)
        assert made.beats[member.process].counters["prompt_tokens_computed"] == 0
        assert made.beats[worker.process].counters["prompt_tokens_computed"] == 30 + (30 + 7 - 16)

        decode.send(Abort(name, 2))  # unknown: no harm
        assert not any(task.done() for task in services)
    assert sorted(left.rank for left in made.left) == [0, 1], "asked to stop, both gave their slots back"
    assert not os.listdir(tmp_path), "a heap was left behind"


async def test_a_broken_checkpoint_ends_the_services_with_one_line(tmp_path: Path) -> None:
    config = ClusterConfig(model=ModelConfig(path=str(tmp_path / "nothing")), decode=tiny_config(NUM_RANKS).decode)
    async with cluster(tmp_path, config) as (_, services):
        done = await asyncio.gather(*services, return_exceptions=True)
    for error in done:
        assert isinstance(error, ValueError) and str(tmp_path / "nothing") in str(error)
        assert "\n" not in str(error)


async def test_pieces_computed_while_the_worker_ends_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the worker waits for its thread, whose last pieces then wait in the loop."""
    started, ending, late_pieces = threading.Event(), threading.Event(), []
    errors: list[dict[str, object]] = []
    compute, push, run_until = PrefillEngine.compute, PrefillService._push, PrefillService._run_until

    async def note_end(service: PrefillService, stop: asyncio.Event, executor: ThreadPoolExecutor) -> None:
        try:
            await run_until(service, stop, executor)
        finally:
            ending.set()  # what the loop does next is to wait for the thread

    def compute_late(engine: PrefillEngine, batch: list[Chunk], push: Callable[[Piece], None]) -> object:
        started.set()
        assert ending.wait(30)
        return compute(engine, batch, push)

    def note_late(service: PrefillService, piece: Piece) -> None:
        late_pieces.append(ending.is_set())
        push(service, piece)

    monkeypatch.setattr(PrefillEngine, "compute", compute_late)
    monkeypatch.setattr(PrefillService, "_push", note_late)
    monkeypatch.setattr(PrefillService, "_run_until", note_end)
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    request = Request("r", tuple(range(40, 70)), max_tokens=20)
    config = msgspec.structs.replace(tiny_config(NUM_RANKS), prefill=PrefillConfig(chunk_tokens=16))
    async with cluster(tmp_path, config) as (made, _):
        member, worker = (await formed(made)).members[1], made.of_kind("prefill")[0]
        made.link(worker.endpoint).send(
            Prefill(
                RequestId(request.name),
                1,
                ROUTER,
                request.prompt,
                (),
                request.sampling,
                member.rank,
                member.incarnation,
                member.endpoint,
            )
        )
        await until(started.is_set)
    assert late_pieces and all(late_pieces)
    assert not errors


async def test_a_missing_heap_directory_is_named(tmp_path: Path) -> None:
    async with cluster(tmp_path / "no-such-directory", tiny_config(NUM_RANKS)) as (_, services):
        with pytest.raises(ValueError, match="no-such-directory"):
            await services[0]
