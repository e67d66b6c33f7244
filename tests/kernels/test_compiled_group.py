"""The compiled inner loops against those of the reference: the same bytes in every heap, the same bits in every result.

Legend: T tokens, K top-k, H hidden.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.compiled_group import CompiledGroup
from kernels.epoch_state import VoidReason
from kernels.heap_layout import EpShape, HeapLayout
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.shm import ShmProvider
from tests.kernels.local_group import GENEROUS_S, SHAPE, LocalGroup, local_group

NUM_LOCAL = 5
RANKS = (0, 1, 2)
SHAPES = (SHAPE, EpShape(max_ranks=3, max_tokens=4, top_k=1, hidden_size=6))


class Routing:
    """Of one rank: distinct or doubled ranks, dropped entries, any number of tokens."""

    def __init__(self, draw: st.DataObject, shape: EpShape) -> None:
        generator = torch.Generator().manual_seed(draw.draw(st.integers(0, 1 << 30)))
        num_tokens = draw.draw(st.integers(0, shape.max_tokens))
        size = (num_tokens, shape.top_k)
        # A column more, so that rows do not follow each other in memory.
        self.x_TH = torch.randn(num_tokens, shape.hidden_size + 1, generator=generator)[:, :-1]
        self.rank_TK = torch.randint(-1, len(RANKS), size, generator=generator)
        self.local_TK = torch.randint(0, NUM_LOCAL, size, generator=generator, dtype=torch.int32)
        self.weight_TK = torch.randn(*size, generator=generator)


def experts(received: Any) -> torch.Tensor:
    scale_N = received.local_expert_N + 1 + received.k_N
    return torch.sin(received.x_NH() * scale_N[:, None])


def layers(
    kind: type[ElasticGroup], shape: EpShape, rounds: list[list[Routing]], ordered: bool, masked: bool
) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """What every rank got of every layer, and all heaps afterwards. ``masked``: the last rank is, without a view."""
    got: list[list[torch.Tensor]] = [[] for _ in RANKS]
    members = RANKS[:-1] if masked else RANKS
    with TemporaryDirectory(dir="/dev/shm") as directory:
        layout, provider = HeapLayout.build(shape), ShmProvider(Path(directory))
        heaps = [provider.allocate(f"heap{rank}", layout.nbytes) for rank in RANKS]
        groups = []
        for rank, heap in enumerate(heaps):
            layout.format(heap.bytes_U8)
            groups.append(kind(layout, heap, rank, deadline_s=GENEROUS_S, num_local_experts=NUM_LOCAL))
        for group in groups:
            for peer in RANKS:
                if peer != group.rank:
                    group.map_peer(peer, heaps[peer])
            group.adopt(1, RANKS, 7)
            group.renormalise = masked
        cluster = LocalGroup(layout, heaps, groups, [])
        assert all(cluster.run(lambda group: group.allgather([])).values())
        for rank in members if masked else ():
            groups[rank].update_mask_buffer(RANKS[-1], True)

        def run(group: ElasticGroup) -> None:
            for routings in rounds:
                mine = routings[group.rank]
                received = group.dispatch(mine.x_TH, mine.rank_TK, mine.local_TK, mine.weight_TK)
                assert received is not None
                fields = (received.row_N, received.source_N, received.token_N, received.k_N, received.local_expert_N)
                kept = [field.clone() for field in (*fields, received.weight_N)]
                out_TH = group.combine(experts(received), received, ordered=ordered)
                assert out_TH is not None
                got[group.rank] += [*kept, torch.tensor(received.num_rows_W), out_TH, group.expert_load()]

        cluster.run(run, only=members)
        snapshots = [cluster.snapshot(rank) for rank in RANKS]
        for rank in RANKS:
            layout.view(snapshots[rank], "ep_sleeper").zero_()
        provider.close()
    return got, snapshots


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(SHAPES), st.booleans(), st.booleans())
def test_compiled_and_reference_are_the_same_bits(
    draw: st.DataObject, shape: EpShape, ordered: bool, masked: bool
) -> None:
    rounds = [[Routing(draw, shape) for _ in RANKS] for _ in range(2)]
    got, heaps = layers(CompiledGroup, shape, rounds, ordered, masked)
    wanted, reference_heaps = layers(ElasticGroup, shape, rounds, ordered, masked)
    for mine, theirs in zip(got, wanted, strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype
            assert a.numpy().tobytes() == b.numpy().tobytes()
    for mine_U8, theirs_U8 in zip(heaps, reference_heaps, strict=True):
        assert torch.equal(mine_U8, theirs_U8)


@pytest.mark.parametrize("kind", [ElasticGroup, CompiledGroup])
def test_nothing_returns_to_a_rank_that_was_masked_after_its_dispatch(heap_dir: Path, kind: type[ElasticGroup]) -> None:
    layout, provider = HeapLayout.build(SHAPES[0]), ShmProvider(heap_dir)
    heaps = [provider.allocate(f"heap{rank}", layout.nbytes) for rank in range(2)]
    groups = []
    for rank, heap in enumerate(heaps):
        layout.format(heap.bytes_U8)
        groups.append(kind(layout, heap, rank, deadline_s=GENEROUS_S))
    for group, peer in zip(groups, (1, 0), strict=True):
        group.map_peer(peer, heaps[peer])
        group.adopt(1, (0, 1), 7)
    cluster = LocalGroup(layout, heaps, groups, [])
    assert all(cluster.run(lambda group: group.allgather([])).values())
    top_k, hidden = SHAPES[0].top_k, SHAPES[0].hidden_size
    x_TH, to_first_TK = torch.ones(1, hidden), torch.zeros((1, top_k), dtype=torch.int64)
    received = cluster.run(
        lambda group: group.dispatch(x_TH, to_first_TK, torch.zeros_like(to_first_TK), torch.ones(1, top_k))
    )[0]
    assert received is not None and (received.source_N == 1).any()
    before = cluster.snapshot(1)
    groups[0].update_mask_buffer(1, True)
    assert groups[0].combine(torch.full((received.num_entries, hidden), 3.0), received) is not None
    assert torch.equal(cluster.snapshot(1), before)
    provider.close()
    for rank in range(2):
        provider.unlink(f"heap{rank}")


@pytest.mark.parametrize("change", ["rank 3", "rank -2", "rank 99", "local -1", "local 5", "tokens"])
def test_bad_routing_is_refused_before_anything_is_sent(heap_dir: Path, change: str) -> None:
    what, _, value = change.partition(" ")
    with local_group(heap_dir, 2, compiled=(0, 1)) as cluster:
        cluster.enter(1, [0, 1])
        layout, heap = cluster.layout, cluster.heaps[0]
        group = CompiledGroup(layout, heap, 0, deadline_s=GENEROUS_S, num_local_experts=NUM_LOCAL)
        group.map_peer(1, cluster.heaps[1])
        group.adopt(2, [0, 1], 7)
        before = cluster.snapshot(1)
        num_tokens = SHAPE.max_tokens + (what == "tokens")
        rank_TK, local_TK = (torch.zeros(num_tokens, SHAPE.top_k, dtype=torch.int64) for _ in range(2))
        if what != "tokens":
            {"rank": rank_TK, "local": local_TK}[what][-1, -1] = int(value)
        with pytest.raises(ValueError):
            group.dispatch(torch.zeros(num_tokens, 20), rank_TK, local_TK, torch.zeros(num_tokens, SHAPE.top_k))
        assert torch.equal(before, cluster.snapshot(1))


def test_float8_rows_are_refused(heap_dir: Path) -> None:
    layout = HeapLayout.build(EpShape(2, 4, 2, 128, dispatch_dtype=torch.float8_e4m3fn))
    provider = ShmProvider(heap_dir)
    heap = provider.allocate("heap0", layout.nbytes)
    layout.format(heap.bytes_U8)
    try:
        with pytest.raises(ValueError, match="float32 rows only"):
            CompiledGroup(layout, heap, 0, deadline_s=1.0)
    finally:
        provider.close()
        provider.unlink("heap0")


class Cut:
    """A link fault that a test begins."""

    def __init__(self) -> None:
        self.mute = self.deaf = False
        self.num_out = self.num_in = 0

    def is_mute(self) -> bool:
        return self.mute

    def is_deaf(self) -> bool:
        return self.deaf

    def on_lost(self, num_out: int, num_in: int) -> None:
        self.num_out += num_out
        self.num_in += num_in


def meanwhile(act: Callable[[], object], is_due: Callable[[], bool]) -> threading.Thread:
    def body() -> None:
        give_up = time.monotonic() + GENEROUS_S
        while not is_due() and time.monotonic() < give_up:
            time.sleep(0.001)
        act()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def test_a_wait_ends_by_deadline_and_accuses_the_late_rank(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, compiled=RANKS) as cluster:
        cluster.enter(1, RANKS)
        for rank in (0, 1):
            cluster.ranks[rank].deadline_s = 0.1
        assert cluster.run(lambda group: group.clean_buffer(0.1), only=[0, 1]) == {0: False, 1: False}
        reasons = {cluster.ranks[rank].void_reason for rank in (0, 1)}
        assert VoidReason.DEADLINE in reasons <= {VoidReason.DEADLINE, VoidReason.PEER_POISON}
        accuser = next(group for group in cluster.ranks[:2] if group.void_reason is VoidReason.DEADLINE)
        assert accuser.observation_mask().tolist() == [0, 0, 1, 0]
        assert accuser.missing == (2,)
        assert accuser.wait_ns_by_source().tolist()[2] >= 0.1e9


@pytest.mark.parametrize(
    "end", [VoidReason.HOST_POISON, VoidReason.PEER_POISON, VoidReason.STOPPED, VoidReason.FUTURE_WORD]
)
def test_other_ends_of_a_wait_accuse_nobody(heap_dir: Path, end: VoidReason) -> None:
    with local_group(heap_dir, 3, compiled=RANKS) as cluster:
        cluster.enter(1, RANKS)
        group, peer, stopping = cluster.ranks[0], cluster.ranks[1], threading.Event()

        def future_word() -> None:
            peer.adopt(2, [0, 1], 7, in_band=True)
            words = group._own.header_word
            for bank in range(4):
                words[bank][1] = max(words[bank][1], peer.step)

        act = {
            VoidReason.HOST_POISON: lambda: group.poison_self(1),
            VoidReason.PEER_POISON: peer.poison_members,
            VoidReason.STOPPED: stopping.set,
            VoidReason.FUTURE_WORD: future_word,
        }[end]
        thread = meanwhile(act, lambda: group.missing == (1, 2))
        began = time.monotonic()
        assert group.allgather([], stop=stopping.is_set) is None
        assert time.monotonic() - began < GENEROUS_S / 2
        thread.join(GENEROUS_S)
        assert group.void_reason is end
        assert not group.observation_mask().any()
        assert group.unheard == (
            (1, 2)
            if end in (VoidReason.HOST_POISON, VoidReason.STOPPED)
            else (2,)
            if end is VoidReason.PEER_POISON
            else ()
        )


def test_what_is_lost_on_a_link_is_neither_sent_nor_seen(heap_dir: Path) -> None:
    with local_group(heap_dir, 2, compiled=RANKS) as cluster:
        cluster.enter(1, [0, 1])
        mute, deaf = Cut(), Cut()
        cluster.ranks[0].set_link_fault(mute)
        cluster.ranks[1].set_link_fault(deaf)
        mute.mute = True
        before = cluster.snapshot(1)
        cluster.ranks[0].deadline_s = 0.05
        empty = torch.zeros(1, 20), torch.ones(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
        assert cluster.ranks[0].dispatch(*empty, torch.zeros(1, 3)) is None
        assert mute.num_out > 0
        assert torch.equal(before, cluster.snapshot(1))
        mute.mute = False
        cluster.enter(2, [0, 1])
        deaf.deaf = True
        found = cluster.run(lambda group: group.clean_buffer(0.1))
        assert found[1] is False
        assert cluster.ranks[1].void_reason is VoidReason.DEADLINE
        assert deaf.num_in > 0
