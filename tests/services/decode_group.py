"""Decode streams without sockets and without a monitor: the test makes the views and carries the messages.

`reference_outputs` is what they must produce: the same model with all experts in one process, one request at a time.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from common.config import ClusterConfig, DecodeConfig, ModelConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Announce,
    Directory,
    ExpertLoad,
    KvHandoff,
    Member,
    Message,
    Placement,
    Prepare,
    Sampling,
    TokenBatch,
    View,
    Wake,
    Welcome,
)
from common.model.checkpoint import Checkpoint
from common.model.experts import LocalExperts
from common.model.kv_cache import Int64Array, kv_cache_shape, read_kv
from common.model.model import Batch, Model
from common.model.sampling import sample
from common.placement import initial_placement, num_local_experts
from services.decode import actions
from services.decode.actions import Action
from services.decode.rank_engine import RankEngine
from services.decode.rank_heap import heap_name
from services.decode.stream import Stream

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-random"
MONITOR, ROUTER, PREFILL = ProcessId("monitor-0"), ProcessId("router-0"), ProcessId("prefill-0")
NO_INCARNATION = Incarnation(0)
DEADLINE_S = 30.0


def tiny_config(num_ranks: int, path: Path = TINY) -> ClusterConfig:
    decode = DecodeConfig(num_ranks=num_ranks, max_ranks=num_ranks + 1, num_kv_blocks=64, operation_deadline_s=20.0)
    return ClusterConfig(model=ModelConfig(path=str(path)), decode=decode)


@dataclass(frozen=True)
class Request:
    name: str
    prompt: tuple[int, ...]
    max_tokens: int = 12
    temperature: float = 1.0

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, 1.0, 0, 7, self.max_tokens, ignore_eos=True, logprobs=True)


Outputs = tuple[tuple[int, float], ...]


class Reference:
    """The model in one process: prefill for the streams, and what they must produce."""

    def __init__(self) -> None:
        self.checkpoint = Checkpoint.open(TINY)
        self.config = self.checkpoint.config
        cache = torch.zeros(kv_cache_shape(self.config, 64, 16))
        self.model = Model(self.checkpoint, LocalExperts(self.checkpoint), cache)
        self.table = np.arange(64)

    def prefill(self, request: Request, outputs: Outputs = ()) -> tuple[KvHandoff, list[memoryview]]:
        """KV of prompt and outputs, and the next token. Rank and incarnation are the caller's to fill in."""
        ids = np.array([*request.prompt, *(token for token, _ in outputs)])
        token, logprob = self._next(request, ids, 0, len(outputs))
        kv = read_kv(self.model.kv_cache_LBPC, self.table, 0, len(ids))
        handoff = KvHandoff(RequestId(request.name), 1, Rank(0), Incarnation(0), len(ids), token, logprob)
        return handoff, [memoryview(kv.numpy().tobytes())]

    def outputs(self, request: Request) -> Outputs:
        handoff, _ = self.prefill(request)
        outputs = [(handoff.first_token, handoff.first_logprob)]
        while len(outputs) < request.max_tokens:
            position = len(request.prompt) + len(outputs) - 1
            outputs.append(self._next(request, np.array([outputs[-1][0]]), position, len(outputs)))
        return tuple(outputs)

    def _next(self, request: Request, ids: Int64Array, start: int, index: int) -> tuple[int, float]:
        batch = Batch(
            ids,
            np.arange(start, start + len(ids)),
            np.zeros(len(ids), dtype=np.int64),
            self.table[None],
            np.array([len(ids) - 1]),
        )
        logits = self.model.forward(batch)[0].numpy()
        return sample(logits, temperature=request.temperature, seed=7, output_index=index)

    def logits(self, ids: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Of the last token."""
        zeros, end = np.zeros(len(ids), dtype=np.int64), np.array([len(ids) - 1])
        logits: npt.NDArray[np.float32] = self.model.forward(
            Batch(np.array(ids), np.arange(len(ids)), zeros, self.table[None], end)
        )[0].numpy()
        return logits


@dataclass
class RankUnderTest:
    stream: Stream
    process: ProcessId
    heap_dir: Path
    incarnation: Incarnation = NO_INCARNATION
    told: list[Message] = field(default_factory=list)
    batches: list[TokenBatch] = field(default_factory=list)
    ended: list[BaseException | None] = field(default_factory=list)

    @property
    def engine(self) -> RankEngine:
        assert self.stream._rank is not None
        return self.stream._rank.engine

    def member(self, rank: int) -> Member:
        heap = self.heap_dir / heap_name(self.process, self.stream.status.life)
        endpoint = f"tcp://{self.process}"
        return Member(Rank(rank), self.incarnation, self.process, "localhost", endpoint, str(heap))


class Group:
    """Streams in threads of this process."""

    def __init__(self, num_ranks: int, heap_dir: Path, config: ClusterConfig | None = None) -> None:
        self.config = config or tiny_config(num_ranks)
        self.heap_dir = heap_dir
        self.reference = Reference()
        self.ranks: dict[int, RankUnderTest] = {}
        self.outputs: dict[str, dict[int, tuple[int, float]]] = defaultdict(dict)
        self.finished: dict[str, str] = {}
        self.arrived = threading.Condition()
        self.epoch = 1024
        self.num_started = 0
        decode, model = self.config.decode, self.reference.config
        num_local = num_local_experts(decode, model.n_routed_experts)
        self.placement = Placement(
            1025,
            initial_placement(
                model.num_moe_layers, model.n_routed_experts, decode.max_ranks, decode.num_ranks, num_local
            ),
        )

    def start_rank(self, rank: int) -> RankUnderTest:
        """A process that has just got a slot."""
        process = ProcessId(f"decode-{self.num_started}")
        self.num_started += 1
        ended: list[BaseException | None] = []
        made = RankUnderTest(
            Stream(process, self.heap_dir, lambda out: self._on_output(made, out), ended.append),
            process,
            self.heap_dir,
            ended=ended,
        )
        self.epoch += 1
        made.incarnation = Incarnation(self.epoch)
        self.ranks[rank] = made
        made.stream.start()
        directory = Directory(MONITOR, 1, 1, ())
        welcome = Welcome(MONITOR, 1, self.config, directory, None, Rank(rank), made.incarnation)
        made.stream.deliver(MONITOR, welcome)
        return made

    def view(self, ranks: list[int], placement: Placement | None = None) -> View:
        self.epoch += 1
        members = tuple(self.ranks[rank].member(rank) for rank in sorted(ranks))
        return View(MONITOR, 1, Epoch(self.epoch), members, placement or self.placement, "test")

    def form(self, num_ranks: int) -> View:
        """All ranks 0..num_ranks-1 join the first view."""
        for rank in range(num_ranks):
            self.start_rank(rank)
        view = self.view(list(range(num_ranks)))
        self.prepare(view, Epoch(0))
        self.await_epoch(view)
        return view

    def prepare(self, view: View, base_epoch: Epoch) -> None:
        for member in view.members:
            self.prepare_at(member.rank, view, base_epoch)

    def prepare_at(self, rank: int, view: View, base_epoch: Epoch) -> None:
        self.ranks[rank].stream.deliver(MONITOR, Prepare(view, base_epoch))

    def publish(self, view: View, only: list[int] | None = None) -> None:
        for rank, made in self.ranks.items():
            if only is None or rank in only:
                made.stream.deliver(MONITOR, view)

    def await_epoch(self, view: View) -> None:
        for member in view.members:
            self.wait_until(partial(self._is_in, member.rank, view.epoch))

    def _is_in(self, rank: int, epoch: int) -> bool:
        view = self.ranks[rank].stream.status.view
        return view is not None and view.epoch == epoch

    def submit(self, request: Request, rank: int, outputs: Outputs = (), attempt: int = 1) -> None:
        made = self.ranks[rank]
        handoff, frames = self.reference.prefill(request, outputs)
        known = tuple(token for token, _ in outputs)
        announce = Announce(
            RequestId(request.name), attempt, ROUTER, made.incarnation, request.prompt, known, request.sampling
        )
        made.stream.deliver(ROUTER, announce)
        kv = KvHandoff(
            handoff.request,
            attempt,
            Rank(rank),
            made.incarnation,
            handoff.num_tokens,
            handoff.first_token,
            handoff.first_logprob,
        )
        made.stream.deliver(PREFILL, kv, frames)

    def announce(self, request: Request, rank: int, outputs: Outputs = (), attempt: int = 1) -> None:
        """Without KV: the rank computes it."""
        made, name, known = self.ranks[rank], RequestId(request.name), tuple(token for token, _ in outputs)
        made.stream.deliver(
            ROUTER,
            Announce(name, attempt, ROUTER, made.incarnation, request.prompt, known, request.sampling, True),
        )

    def abort(self, request: Request, rank: int) -> None:
        self.ranks[rank].stream.deliver(ROUTER, Abort(RequestId(request.name), 1))

    def now(self) -> float:
        return time.monotonic()

    def await_outputs(self, requests: list[Request], count: int | None = None) -> None:
        self.wait_until(lambda: all(len(self.outputs[r.name]) >= (count or r.max_tokens) for r in requests))

    def await_told(self, made: RankUnderTest, kind: type[Message]) -> None:
        self.wait_until(lambda: any(isinstance(message, kind) for message in made.told))

    def outputs_of(self, request: Request) -> Outputs:
        got = self.outputs[request.name]
        assert sorted(got) == list(range(len(got))), "a gap in the outputs"
        return tuple(got[index] for index in range(len(got)))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        with self.arrived:
            while not condition():
                for made in self.ranks.values():
                    for error in made.ended:
                        if error is not None:
                            raise error
                assert time.monotonic() < deadline, "timed out"
                self.arrived.wait(0.01)

    def stop(self) -> None:
        for made in self.ranks.values():
            made.stream.stop()
        for made in self.ranks.values():
            assert made.stream.join(DEADLINE_S), "a stream does not end"

    def _on_output(self, made: RankUnderTest, out: list[Action | ExpertLoad]) -> None:
        with self.arrived:
            for action in out:
                match action:
                    case actions.Send(message=TokenBatch() as batch):
                        made.batches.append(batch)
                        for item in batch.items:
                            for index, pair in enumerate(zip(item.ids, item.logprobs, strict=True), item.start):
                                known = self.outputs[item.request].setdefault(index, pair)
                                assert known == pair, f"{item.request}: output {index} was {known}, is now {pair}"
                    case actions.Send(message=message) | actions.Tell(message=message):
                        made.told.append(message)
                    case actions.ForwardView(view=view, endpoints=endpoints):
                        self._to_endpoints(endpoints, view)
                    case actions.WakeMembers(epoch=epoch, endpoints=endpoints):
                        self._to_endpoints(endpoints, Wake(epoch))
                    case _:
                        pass
            self.arrived.notify_all()

    def _to_endpoints(self, endpoints: tuple[str, ...], message: Message) -> None:
        for made in self.ranks.values():
            if f"tcp://{made.process}" in endpoints:
                made.stream.deliver(MONITOR, message)


@contextmanager
def decode_group(num_ranks: int, heap_dir: Path, config: ClusterConfig | None = None) -> Iterator[Group]:
    torch.set_num_threads(1)
    group = Group(num_ranks, heap_dir, config)
    try:
        yield group
    finally:
        group.stop()
    assert not list(heap_dir.iterdir()), "a heap was left behind"
