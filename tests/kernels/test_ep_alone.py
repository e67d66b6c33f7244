"""Without a monitor: each rank masks who is late, for itself, and goes on; or, with elastic mode off, raises."""

from pathlib import Path

import pytest
import torch

from kernels.elastic_mode import ElasticMode, LateRanksError
from kernels.epoch_state import CLEAN, VOID, VoidReason
from kernels.heap_window import HeapWindow
from kernels.reference import ElasticGroup
from tests.kernels.local_group import (
    LocalGroup,
    Placement,
    Tokens,
    local_group,
    moe_layer,
    oracle,
    reduced_oracle,
    without,
)

MEMBERS = [0, 1, 2]
SURVIVORS = [0, 1]
VICTIM = 2
PLACEMENT = Placement.random(3, MEMBERS, num_copies=1)
DEADLINE_S = 1.0


def tokens_of(rank: int, seed: int = 0) -> Tokens:
    return Tokens.random(10 * seed + rank, 5)


def scaled(tokens: Tokens, out_TH: torch.Tensor) -> torch.Tensor:
    """By the weights of all entries over those of the entries that were not lost with the victim."""
    kept_TK = without(tokens, PLACEMENT, VICTIM).expert_TK >= 0
    total_T, kept_T = torch.zeros(len(out_TH)), torch.zeros(len(out_TH))
    for k in range(kept_TK.shape[1]):
        total_T += torch.where(tokens.expert_TK[:, k] >= 0, tokens.weight_TK[:, k], 0)
        kept_T += torch.where(kept_TK[:, k], tokens.weight_TK[:, k], 0)
    return out_TH * torch.where(kept_T > 0, total_T / kept_T, 1)[:, None]


def expect_masked(cluster: LocalGroup) -> None:
    for rank in SURVIVORS:
        group = cluster.ranks[rank]
        assert (group.status, group.members) == (CLEAN, (0, 1))
        assert group.query_mask_buffer().tolist() == [0, 0, 1, 1]
        assert group.observation_mask().tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("dispatches", [False, True])
def test_survivors_mask_the_dead_and_go_on(heap_dir: Path, dispatches: bool, ordered: bool, renormalise: bool) -> None:
    with local_group(heap_dir, 3, deadline_s=DEADLINE_S, elastic=ElasticMode.ALONE) as cluster:
        cluster.enter(1, MEMBERS)
        for heap in cluster.heaps:
            cluster.layout.view(heap.bytes_U8, "ep_combine_rows")[VICTIM].fill_(float("nan"))
        for group in cluster.ranks:
            group.renormalise = renormalise

        def act(group: ElasticGroup) -> list[torch.Tensor | None]:
            mine = [tokens_of(group.rank, seed) for seed in range(3)]
            if group.rank == VICTIM:
                rank_TK, local_TK = PLACEMENT.route(mine[0])
                if dispatches:
                    assert group.dispatch(mine[0].x_TH, rank_TK, local_TK, mine[0].weight_TK) is not None
                return []
            return [moe_layer(group, tokens, PLACEMENT, ordered=ordered) for tokens in mine]

        out = cluster.run(act)
        expect_masked(cluster)
        for rank in SURVIVORS:
            for seed, got in enumerate(out[rank]):
                tokens = tokens_of(rank, seed)
                left = without(tokens, PLACEMENT, VICTIM)
                wanted = oracle(left) if ordered else reduced_oracle(left, PLACEMENT)
                assert got is not None
                assert torch.equal(got, scaled(tokens, wanted) if renormalise else wanted), (rank, seed)
        waited_s = cluster.ranks[0].wait_ns_by_source()[VICTIM] / 1e9
        assert DEADLINE_S <= waited_s < 3 * DEADLINE_S, "one deadline, not one an operation"


def test_who_is_ahead_does_not_mask_who_waits_for_the_dead(heap_dir: Path) -> None:
    """The victim's combine word is out to rank 0 only, which goes on; both deadlines begin in the same moment."""
    with local_group(heap_dir, 3, deadline_s=DEADLINE_S, elastic=ElasticMode.ALONE) as cluster:
        cluster.enter(1, MEMBERS)
        heap_0 = HeapWindow(cluster.layout, cluster.heaps[0].bytes_U8)

        def act(group: ElasticGroup) -> bool:
            if group.rank == VICTIM:
                rank_TK, local_TK = PLACEMENT.route(tokens_of(VICTIM))
                received = group.dispatch(tokens_of(VICTIM).x_TH, rank_TK, local_TK, tokens_of(VICTIM).weight_TK)
                assert received is not None
                heap_0.combine_word[VICTIM] = group.step + 1
                return True
            return all(moe_layer(group, tokens_of(group.rank, seed), PLACEMENT) is not None for seed in range(3))

        assert all(cluster.run(act).values())
        expect_masked(cluster)


def test_headers_and_barriers_have_the_deadline_too(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, deadline_s=5.0, elastic=ElasticMode.ALONE, manual=[0]) as cluster:
        group = cluster.ranks[0]
        group.adopt(1, [0, 2], 7)
        header = group.allgather([5])
        assert header is not None and header.words_by_rank == {0: (5, 0, 0, 0, 0, 0, 0, 0)}
        assert 5.0 <= cluster.clocks[0].now < 5.1
        group.adopt(2, [0], 7)
        assert group.allgather([]) is not None
        group.update_mask_buffer(1, False)
        assert group.clean_buffer(1.0)
        assert group.query_mask_buffer().tolist() == [0, 1, 1, 1]


def test_poison_and_words_from_the_future_still_void(heap_dir: Path) -> None:
    """Somebody has adopted a new view: who masks for himself must follow."""
    with local_group(heap_dir, 2, elastic=ElasticMode.ALONE) as cluster:
        cluster.enter(1, [0, 1])
        cluster.ranks[1].adopt(2, [0, 1], 7)
        assert not cluster.ranks[0].clean_buffer(5.0)
        assert (cluster.ranks[0].status, cluster.ranks[0].void_reason) == (VOID, VoidReason.PEER_POISON)


def test_off_raises_and_names_the_late(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, deadline_s=5.0, elastic=ElasticMode.OFF, manual=[0, 1]) as cluster:
        cluster.enter(1, MEMBERS)
        for rank in SURVIVORS:
            heap = HeapWindow(cluster.layout, cluster.heaps[rank].bytes_U8)
            heap.dispatch_word[1 - rank] = cluster.ranks[rank].step + 1
        with pytest.raises(LateRanksError, match=r"epoch 1, operation 2 \(deadline\): nothing came from ranks \[2\]"):
            moe_layer(cluster.ranks[0], tokens_of(0), PLACEMENT)
        with pytest.raises(LateRanksError, match=r"\(peer_poison\)"):
            moe_layer(cluster.ranks[1], tokens_of(1), PLACEMENT)
