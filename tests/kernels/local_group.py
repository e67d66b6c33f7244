"""Several ranks of one group in this process, over real shared memory; and the oracle they are compared with.

Legend: T tokens, K top-k, H hidden.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from kernels.compiled_group import CompiledGroup
from kernels.elastic_mode import ElasticMode
from kernels.heap_layout import EpShape, HeapLayout
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.shm import ShmHeap, ShmProvider

SHAPE = EpShape(max_ranks=4, max_tokens=6, top_k=3, hidden_size=20)
NUM_EXPERTS = 8
DIGEST = 77
GENEROUS_S = 20.0

Result = TypeVar("Result")


class ManualClock:
    """Time passes only in pauses; ``on_poll`` (given the number of polls) may act for the others meanwhile."""

    def __init__(self, tick_s: float = 0.01) -> None:
        self.now = 0.0
        self.tick_s = tick_s
        self.on_poll: Callable[[int], None] = lambda num_polls: None

    def __call__(self) -> float:
        return self.now

    def pause(self, num_polls: int) -> None:
        self.now += self.tick_s
        self.on_poll(num_polls)


@dataclass
class LocalGroup:
    """``ranks[r]`` for each slot made; heaps of all slots are mapped by all."""

    layout: HeapLayout
    heaps: list[ShmHeap]
    ranks: list[ElasticGroup]
    clocks: list[ManualClock]

    def run(self, act: Callable[[ElasticGroup], Result], only: Sequence[int] | None = None) -> dict[int, Result]:
        """``act`` on each rank, in a thread of its own; what each returned."""
        results: dict[int, Result] = {}
        errors: list[BaseException] = []

        def body(rank: int) -> None:
            try:
                results[rank] = act(self.ranks[rank])
            except BaseException as error:
                errors.append(error)
                self.ranks[rank].poison_members()

        chosen = range(len(self.ranks)) if only is None else only
        threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in chosen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GENEROUS_S)
            assert not thread.is_alive(), "a rank hangs"
        if errors:
            raise errors[0]
        return results

    def enter(self, epoch: int, members: Sequence[int]) -> None:
        """All members adopt the view and pass the first header."""
        for rank in members:
            self.ranks[rank].adopt(epoch, members, DIGEST)
        headers = self.run(lambda group: group.allgather([]), only=members)
        assert all(headers.values())

    def snapshot(self, rank: int) -> torch.Tensor:
        """The bytes of a heap, with poison words and rings blanked: a void rank may write those."""
        copy = self.heaps[rank].bytes_U8.clone()
        self.layout.view(copy, "ep_poison").zero_()
        self.layout.view(copy, "ep_bell").zero_()
        return copy


@contextmanager
def local_group(
    directory: Path,
    num_ranks: int = 4,
    *,
    shape: EpShape = SHAPE,
    deadline_s: float = GENEROUS_S,
    elastic: ElasticMode = ElasticMode.VIEWS,
    manual: Sequence[int] = (),
    compiled: Sequence[int] = (1, 3),
) -> Iterator[LocalGroup]:
    """Ranks 0..num_ranks-1; those in ``manual`` have a clock that passes only in their own pauses. Of the others
    those in ``compiled`` have their inner loops in C; all share one group."""
    layout = HeapLayout.build(shape)
    provider = ShmProvider(directory)
    heaps = [provider.allocate(f"heap{rank}", layout.nbytes) for rank in range(num_ranks)]
    clocks = [ManualClock() for _ in heaps]
    ranks = []
    for rank, heap in enumerate(heaps):
        layout.format(heap.bytes_U8)
        if rank in manual:
            clock = clocks[rank]
            group = ElasticGroup(
                layout, heap, rank, deadline_s=deadline_s, elastic=elastic, clock=clock, pause=clock.pause
            )
        else:
            kind = CompiledGroup if rank in compiled and not shape.is_fp8 else ElasticGroup
            group = kind(layout, heap, rank, deadline_s=deadline_s, elastic=elastic)
        ranks.append(group)
    for group in ranks:
        for peer, heap in enumerate(heaps):
            if peer != group.rank:
                group.map_peer(peer, provider.map_peer(heap.descriptor))
    try:
        yield LocalGroup(layout, heaps, ranks, clocks)
    finally:
        provider.close()
        for rank in range(num_ranks):
            provider.unlink(f"heap{rank}")


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens of a round and the logical experts they chose, -1 = dropped."""

    x_TH: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor

    @staticmethod
    def random(seed: int, num_tokens: int, hidden_size: int = SHAPE.hidden_size) -> "Tokens":
        generator = torch.Generator().manual_seed(seed)
        score = torch.rand(num_tokens, NUM_EXPERTS, generator=generator)
        expert = score.argsort(dim=1)[:, : SHAPE.top_k]
        dropped = torch.rand(num_tokens, SHAPE.top_k, generator=generator) < 0.1
        return Tokens(
            torch.randn(num_tokens, hidden_size, generator=generator),
            torch.where(dropped, -1, expert),
            torch.rand(num_tokens, SHAPE.top_k, generator=generator),
        )


def expert_mlp(x_NH: torch.Tensor, expert_N: torch.Tensor) -> torch.Tensor:
    """Row by row, so that its bits depend on nothing else; another function for every expert."""
    scale = (expert_N + 1).to(x_NH.dtype)[:, None]
    return torch.tanh(x_NH.double() * scale.double() * 0.3).to(x_NH.dtype) + scale


def oracle(tokens: Tokens) -> torch.Tensor:
    """What combine must return: the same sums in the same order, with no ranks at all. float32 [T, H]."""
    out_TH = torch.zeros_like(tokens.x_TH)
    for k in range(tokens.expert_TK.shape[1]):
        expert_T = tokens.expert_TK[:, k]
        product_TH = tokens.weight_TK[:, k, None] * expert_mlp(tokens.x_TH, expert_T)
        out_TH = torch.where((expert_T >= 0)[:, None], out_TH + product_TH, out_TH)
    return out_TH


@dataclass(frozen=True)
class Placement:
    """``home[e]`` lists the (rank, local) copies of logical expert e; ``logical[rank]`` maps local to logical."""

    home: tuple[tuple[tuple[int, int], ...], ...]
    logical: dict[int, torch.Tensor]

    @staticmethod
    def random(seed: int, members: Sequence[int], num_copies: int = 2) -> "Placement":
        generator = torch.Generator().manual_seed(seed)
        held: dict[int, list[int]] = {rank: [] for rank in members}
        home = []
        for expert in range(NUM_EXPERTS):
            order = torch.randperm(len(members), generator=generator)[:num_copies].tolist()
            copies = [members[i] for i in order]
            home.append(tuple((rank, len(held[rank])) for rank in copies))
            for rank in copies:
                held[rank].append(expert)
        return Placement(tuple(home), {rank: torch.tensor(e, dtype=torch.int64) for rank, e in held.items()})

    def route(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        """rank_TK, local_TK; which copy differs from entry to entry."""
        pairs = [
            [self.home[e][(t + k) % len(self.home[e])] if e >= 0 else (-1, 0) for k, e in enumerate(experts)]
            for t, experts in enumerate(tokens.expert_TK.tolist())
        ]
        pair_TK2 = torch.tensor(pairs, dtype=torch.int64).reshape(len(pairs), SHAPE.top_k, 2)
        return pair_TK2[..., 0], pair_TK2[..., 1]


def without(tokens: Tokens, placement: Placement, gone: int) -> Tokens:
    """Entries routed to rank ``gone`` dropped."""
    rank_TK, _ = placement.route(tokens)
    return Tokens(tokens.x_TH, torch.where(rank_TK == gone, -1, tokens.expert_TK), tokens.weight_TK)


def reduced_oracle(tokens: Tokens, placement: Placement) -> torch.Tensor:
    """What a reduced combine must return: sums over each rank's entries in top-k order, added in order of ranks."""
    rank_TK, _ = placement.route(tokens)
    out_TH = torch.zeros_like(tokens.x_TH)
    for rank in range(SHAPE.max_ranks):
        here_TK = torch.where(rank_TK == rank, tokens.expert_TK, -1)
        out_TH += oracle(Tokens(tokens.x_TH, here_TK, tokens.weight_TK))
    return out_TH


def moe_layer(
    group: ElasticGroup, tokens: Tokens, placement: Placement, *, ordered: bool = True
) -> torch.Tensor | None:
    """dispatch, experts, combine."""
    rank_TK, local_TK = placement.route(tokens)
    received = group.dispatch(tokens.x_TH, rank_TK, local_TK, tokens.weight_TK)
    if received is None:
        return None
    expert_N = placement.logical[group.rank][received.local_expert_N]
    return group.combine(expert_mlp(received.x_NH(), expert_N), received, ordered=ordered)
