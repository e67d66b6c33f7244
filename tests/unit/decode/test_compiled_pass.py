"""A forward pass with its exchanges in one call of C, against the same layer by layer."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import DecodeConfig
from common.model.checkpoint import Checkpoint
from common.model.experts import VoidRound
from common.model.kv_cache import kv_cache_shape
from common.model.model import Batch, Model
from common.pace import Pace
from common.placement import initial_placement, num_local_experts
from common.replica_choice import ReplicaChoice
from kernels.compiled_group import CompiledGroup
from kernels.compiled_wait import FIRST_PART_NS
from kernels.cpu.batch import CheckedBatch
from kernels.cpu.forward import CompiledModel
from kernels.epoch_state import CLEAN, VoidReason
from kernels.heap_layout import EpShape
from kernels.reference import ElasticGroup
from services.decode.elastic_exchange import ElasticExchange
from services.decode.expert_slots import ExpertSlots
from services.decode.load_counts import CountedLoad
from tests.kernels.local_group import GENEROUS_S, LocalGroup, local_group
from tests.unit.model.tiny_models import TINY_RANDOM, int64

RANKS = (0, 1, 2)
DECODE = DecodeConfig(num_ranks=3, max_ranks=4)
NUM_TOKENS = 5


class Rank:
    """Model and exchange of one rank. ``late(operation)`` is called before each operation of a rank that goes layer by
    layer."""

    def __init__(self, group: ElasticGroup, missing_expert: int | None = None) -> None:
        checkpoint = Checkpoint.open(TINY_RANDOM)
        config, layout = checkpoint.config, checkpoint.expert_layout
        num_local = num_local_experts(DECODE, config.n_routed_experts)
        num_rows = num_local * config.num_moe_layers
        slots = ExpertSlots(
            torch.zeros(num_rows, layout.row_size),
            torch.zeros(num_rows, 4, dtype=torch.int64),
            layout,
            config.num_moe_layers,
            num_local,
            lambda layer, expert, row: checkpoint.read_expert(config.moe_layers[layer], expert, row),
        )
        sizes = config.num_moe_layers, config.n_routed_experts
        placement = initial_placement(*sizes, DECODE.max_ranks, len(RANKS), num_local)
        slots.adopt([rows[group.rank] for rows in placement], 1)
        rows = tuple(
            tuple(tuple(-1 if expert == missing_expert else expert for expert in held) for held in of_layer)
            for of_layer in placement
        )
        self.group = group
        self.exchange = ElasticExchange(slots, config.moe_layers, config.n_routed_experts, Pace(time.monotonic, _skip))
        choice = ReplicaChoice(rows, RANKS, config.n_routed_experts, group.rank)
        self.exchange.enter(group, choice, has_orphans=missing_expert is not None)
        self.cache = torch.full(kv_cache_shape(config, 8, 16), float("nan"))
        self.model = Model(checkpoint, self.exchange, self.cache)
        self.missed: list[bool] = []
        self.num_at_once = 0
        at_once = self.exchange.run_pass

        def counted(model: CompiledModel, batch: CheckedBatch) -> Tensor | None:
            logits_SV = at_once(model, batch)
            self.num_at_once += logits_SV is not None
            return logits_SV

        self.exchange.run_pass = counted  # type: ignore[method-assign]

    def go_layer_by_layer(self, late: Callable[[str], None]) -> None:
        dispatch, combine = self.group.dispatch, self.group.combine

        def late_dispatch(*args: Tensor) -> object:
            late("dispatch")
            return dispatch(*args)

        def late_combine(*args: object, **options: object) -> object:
            late("combine")
            return combine(*args, **options)  # type: ignore[arg-type]

        self.group.dispatch, self.group.combine = late_dispatch, late_combine  # type: ignore[method-assign, assignment]
        self.exchange.run_pass = lambda model, batch: None  # type: ignore[method-assign]

    def passes(self, number: int) -> list[Tensor]:
        """Of requests that differ from rank to rank; rank 2 has no token in every second pass."""
        logits, table = [], int64([[1, 2], [5, 4], [3, 0]])
        every = 2 if self.group.rank == 2 else 1
        for turn in range(number):
            position, num_tokens = turn // every, 0 if turn % every else 3
            index = np.arange(num_tokens)
            tokens = int64([(7 * self.group.rank + 3 * row + position) % 250 for row in range(num_tokens)])
            missed_T = self.exchange.begin(num_tokens)
            logits.append(self.model.forward(Batch(tokens, np.full(num_tokens, position), index, table, index)))
            self.missed += missed_T.tolist()
        return logits


def _skip(_: float) -> None:
    pass


@contextmanager
def three_ranks(directory: Path, missing_expert: int | None = None) -> Iterator[tuple[LocalGroup, list[Rank]]]:
    config = Checkpoint.open(TINY_RANDOM).config
    shape = EpShape(DECODE.max_ranks, NUM_TOKENS, config.num_experts_per_tok, config.hidden_size)
    directory.mkdir()
    with local_group(directory, 3, shape=shape, compiled=RANKS) as cluster:
        cluster.enter(1, RANKS)
        yield cluster, [Rank(group, missing_expert) for group in cluster.ranks]


Outcome = tuple[dict[int, list[Tensor]], list[CountedLoad | None], list[list[bool]], list[Tensor], list[int], list[int]]


def outcome(directory: Path, prepare: Callable[[list[Rank]], None], missing_expert: int | None = None) -> Outcome:
    """What four passes gave: logits, loads, tokens that missed an expert, caches, operations, passes made at once."""
    with three_ranks(directory, missing_expert) as (cluster, ranks):
        prepare(ranks)
        logits = cluster.run(lambda group: ranks[group.rank].passes(4))
        assert all(cluster.run(lambda group: group.allgather([])).values())
        assert all(rank.group.status == CLEAN for rank in ranks)
        return (
            logits,
            [rank.exchange.load.take() for rank in ranks],
            [rank.missed for rank in ranks],
            [rank.cache for rank in ranks],
            [rank.exchange.num_operations for rank in ranks],
            [rank.num_at_once for rank in ranks],
        )


def all_layer_by_layer(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.go_layer_by_layer(lambda operation: None)


@pytest.mark.parametrize("late", ["nobody", "dispatch", "combine"])
@pytest.mark.parametrize("missing_expert", [None, 3])
def test_a_pass_at_once_is_the_same_in_every_respect(tmp_path: Path, late: str, missing_expert: int | None) -> None:
    """Who is late goes layer by layer, and is later than C waits at a time."""

    def prepare(ranks: list[Rank]) -> None:
        if late != "nobody":
            ranks[1].go_layer_by_layer(lambda operation: time.sleep(0.03 if operation == late else 0.0))

    got = outcome(tmp_path / "at-once", prepare, missing_expert)
    wanted = outcome(tmp_path / "by-layer", all_layer_by_layer, missing_expert)
    assert got[5] == ([4, 4, 4] if late == "nobody" else [4, 0, 4]) and wanted[5] == [0, 0, 0]
    for rank in RANKS:
        for mine, theirs in zip(got[0][rank], wanted[0][rank], strict=True):
            assert torch.equal(mine, theirs)
        assert got[3][rank].numpy().tobytes() == wanted[3][rank].numpy().tobytes()
    assert got[1] == wanted[1] and any(load and any(load.served) for load in got[1])
    assert got[2] == wanted[2]
    assert any(map(any, got[2])) == (missing_expert is not None)
    assert got[4] == wanted[4] and min(got[4]) > 0


@pytest.mark.parametrize("point", ["dispatch", "combine"])
def test_a_pass_accuses_who_never_comes(tmp_path: Path, point: str) -> None:
    with three_ranks(tmp_path / "heaps") as (cluster, ranks):
        gone = threading.Event()

        def late(operation: str) -> None:
            if operation == point:
                gone.set()
                raise VoidRound

        ranks[2].go_layer_by_layer(late)
        for group in cluster.ranks:
            group.deadline_s = 1.0  # on a busy machine the others need a while as well

        def run(group: ElasticGroup) -> bool:
            try:
                ranks[group.rank].passes(1)
            except VoidRound:
                return True
            return False

        assert cluster.run(run) == dict.fromkeys(RANKS, True) and gone.is_set()
        reasons = {group.void_reason for group in cluster.ranks[:2]}
        assert VoidReason.DEADLINE in reasons <= {VoidReason.DEADLINE, VoidReason.PEER_POISON}
        for group in cluster.ranks[:2]:
            assert group.observation_mask().tolist() == [0, 0, int(group.void_reason is VoidReason.DEADLINE), 0]
            if group.void_reason is VoidReason.DEADLINE:  # and the part that was waited in C before it
                assert group.wait_ns_by_source()[2] >= 1e9 + FIRST_PART_NS
            before = cluster.snapshot(1 - group.rank)
            assert isinstance(group, CompiledGroup)
            with pytest.raises(VoidRound):
                ranks[group.rank].passes(1)
            assert torch.equal(cluster.snapshot(1 - group.rank), before), "a void rank published"


def test_poison_of_the_host_ends_a_pass(tmp_path: Path) -> None:
    with three_ranks(tmp_path / "heaps") as (cluster, ranks):
        ranks[2].go_layer_by_layer(lambda operation: ranks[0].group.poison_self(1) if operation == "combine" else None)

        def run(group: ElasticGroup) -> VoidReason | None:
            with pytest.raises(VoidRound):
                ranks[group.rank].passes(2)
            return group.void_reason

        reasons = cluster.run(run)
        assert VoidReason.HOST_POISON in reasons.values()
        assert set(reasons.values()) <= {VoidReason.HOST_POISON, VoidReason.PEER_POISON}
        assert not any(group.observation_mask().any() for group in cluster.ranks)


def test_what_does_not_fit_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with three_ranks(tmp_path / "heaps") as (cluster, ranks):
        before = [cluster.snapshot(rank) for rank in RANKS]
        one, many = np.zeros(1, np.int64), np.zeros(NUM_TOKENS + 1, np.int64)
        ranks[0].exchange.begin(len(many))
        with pytest.raises(ValueError, match="at most 5 tokens"):
            ranks[0].model.forward(Batch(many, many, many, int64([[1]]), many))
        ranks[0].group._routable_W[:] = False
        ranks[0].exchange.begin(1)
        with pytest.raises(ValueError, match="no member"):
            ranks[0].model.forward(Batch(one, one, one, int64([[1]]), one))
        for rank in RANKS:
            assert torch.equal(cluster.snapshot(rank), before[rank])


Kind = Callable[[list[Rank]], None]


@pytest.mark.parametrize("prepare", [lambda ranks: None, all_layer_by_layer], ids=["at-once", "by-layer"])
@pytest.mark.parametrize("fault", [None, VoidReason.STOPPED, VoidReason.DIGEST, VoidReason.HOST_POISON])
def test_nothing_is_dispatched_before_the_headers_are_here(
    tmp_path: Path, prepare: Kind, fault: VoidReason | None
) -> None:
    """PROTOCOL 1.4: whoever has tokens computes them meanwhile, but they stay at home."""
    with three_ranks(tmp_path / "heaps") as (cluster, ranks):
        prepare(ranks)
        late, stopping = cluster.ranks[2], threading.Event()
        for rank in RANKS:
            cluster.ranks[rank].adopt(2, RANKS, 78 if rank == 2 and fault is VoidReason.DIGEST else 77)
        before = [cluster.layout.view(cluster.snapshot(rank), "ep_dispatch_rows") for rank in RANKS]
        words = [cluster.layout.view(cluster.snapshot(rank), "ep_dispatch_word") for rank in RANKS]

        def run(group: ElasticGroup) -> list[Tensor] | None:
            if group is late:
                deadline = time.monotonic() + GENEROUS_S
                while any(2 not in cluster.ranks[rank].missing for rank in (0, 1)):
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                time.sleep(0.02)  # longer than one part of a wait
                for rank in RANKS:
                    heap_U8 = cluster.snapshot(rank)
                    assert torch.equal(cluster.layout.view(heap_U8, "ep_dispatch_rows"), before[rank])
                    assert torch.equal(cluster.layout.view(heap_U8, "ep_dispatch_word"), words[rank])
                if fault is VoidReason.HOST_POISON:
                    for other in (0, 1):
                        cluster.ranks[other].poison_self(2)
                elif fault is VoidReason.STOPPED:
                    stopping.set()
                if fault in (VoidReason.HOST_POISON, VoidReason.STOPPED):
                    return None
            group.send_header([group.rank], stopping.is_set)
            try:
                return ranks[group.rank].passes(1)
            except VoidRound:
                return None

        results = cluster.run(run)
        if fault is None:
            assert all(results.values())
            for group in cluster.ranks:
                assert group.headers is not None and not group.header_due
                assert {rank: words[0] for rank, words in group.headers.words_by_rank.items()} == {0: 0, 1: 1, 2: 2}
            return
        assert not any(results.values())
        reasons = {group.void_reason for group in cluster.ranks[:2]}
        assert fault in reasons <= {fault, VoidReason.PEER_POISON}
        for group in cluster.ranks[:2]:
            assert group.headers is None and not group.observation_mask().any()
            assert not (cluster.layout.view(cluster.snapshot(group.rank), "ep_dispatch_word")[:, 0] >= 2 << 40).any()


def test_headers_are_sent_and_awaited_in_turns(tmp_path: Path) -> None:
    with three_ranks(tmp_path / "heaps") as (cluster, _):
        group = cluster.ranks[0]
        with pytest.raises(RuntimeError, match="send_header comes first"):
            group.await_headers()
        group.send_header([1])
        with pytest.raises(RuntimeError, match="not waited for"):
            group.send_header([1])
        with pytest.raises(RuntimeError, match="out of order"):
            group.clean_buffer(1.0)
        none_TK = torch.zeros(0, 4, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="out of order"):
            group.dispatch(torch.zeros(0, 64), none_TK, none_TK, torch.zeros(0, 4))
