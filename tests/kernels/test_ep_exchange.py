"""dispatch and combine against an oracle without ranks: the bits must be equal under every placement."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kernels.heap_layout import HeapLayout
from kernels.reference import ElasticGroup
from kernels.symmetric_memory.shm import ShmProvider
from tests.kernels.local_group import (
    SHAPE,
    LocalGroup,
    Placement,
    Tokens,
    local_group,
    moe_layer,
    oracle,
    reduced_oracle,
    without,
)


def run_layer(
    cluster: LocalGroup,
    members: Sequence[int],
    tokens: Sequence[Tokens],
    placement: Placement,
    *,
    ordered: bool = True,
) -> dict[int, torch.Tensor]:
    def act(group: ElasticGroup) -> torch.Tensor | None:
        return moe_layer(group, tokens[group.rank], placement, ordered=ordered)

    out = cluster.run(act, only=members)
    return {rank: got for rank, got in out.items() if got is not None}


@pytest.mark.parametrize("num_tokens_by_rank", [(3, 2, 4, 1), (0, 6, 0, 1), (6, 6, 6, 6), (0, 0, 0, 0), (1, 0, 0, 0)])
def test_bits_do_not_depend_on_placement(heap_dir: Path, num_tokens_by_rank: tuple[int, ...]) -> None:
    members = [0, 1, 2, 3]
    tokens = [Tokens.random(10 + rank, num) for rank, num in enumerate(num_tokens_by_rank)]
    with local_group(heap_dir) as cluster:
        cluster.enter(1, members)
        for seed in range(4):
            out = run_layer(cluster, members, tokens, Placement.random(seed, members, num_copies=1 + seed % 3))
            for rank, mine in enumerate(tokens):
                assert torch.equal(out[rank], oracle(mine)), (rank, seed)


def test_bits_do_not_depend_on_members(heap_dir: Path) -> None:
    tokens = [Tokens.random(rank, 4) for rank in range(4)]
    with local_group(heap_dir) as cluster:
        for epoch, members in enumerate([[2], [0, 2], [1, 2, 3], [0, 1, 2, 3]], start=5):
            cluster.enter(epoch, members)
            out = run_layer(cluster, members, tokens, Placement.random(epoch, members, num_copies=1))
            for rank in members:
                assert torch.equal(out[rank], oracle(tokens[rank])), (rank, epoch)


@pytest.mark.parametrize("num_tokens_by_rank", [(3, 2, 4, 1), (0, 6, 0, 1), (0, 0, 0, 0)])
def test_reduced_sums_by_rank_and_is_near_the_ordered_sum(heap_dir: Path, num_tokens_by_rank: tuple[int, ...]) -> None:
    members = [0, 1, 2, 3]
    tokens = [Tokens.random(10 + rank, num) for rank, num in enumerate(num_tokens_by_rank)]
    with local_group(heap_dir) as cluster:
        cluster.enter(1, members)
        for seed in range(3):
            placement = Placement.random(seed, members, num_copies=1 + seed)
            out = run_layer(cluster, members, tokens, placement, ordered=False)
            for rank, mine in enumerate(tokens):
                assert torch.equal(out[rank], reduced_oracle(mine, placement)), (rank, seed)
                torch.testing.assert_close(out[rank], oracle(mine), rtol=0, atol=2e-6)


def test_rows_sent_to_each_expert_are_counted(heap_dir: Path) -> None:
    """Dropped entries, padding among them, are none."""
    layout = HeapLayout.build(SHAPE)
    provider = ShmProvider(heap_dir)
    heap = provider.allocate("heap", layout.nbytes)
    layout.format(heap.bytes_U8)
    group = ElasticGroup(layout, heap, 0, deadline_s=20.0, num_local_experts=5)
    group.adopt(1, [0], 7)
    assert group.allgather([]) is not None

    def layer(rank_TK: list[list[int]], local_TK: list[list[int]]) -> None:
        x_TH, weight_TK = torch.zeros(len(rank_TK), SHAPE.hidden_size), torch.ones(len(rank_TK), SHAPE.top_k)
        received = group.dispatch(x_TH, torch.tensor(rank_TK), torch.tensor(local_TK), weight_TK)
        assert received is not None
        assert group.combine(received.x_NH(), received) is not None

    layer([[0, 0, -1], [0, -1, -1]], [[4, 1, 9], [4, 0, 0]])
    layer([[-1, -1, -1]], [[0, 0, 0]])
    with pytest.raises(ValueError, match=r"local experts must be in 0\.\.4"):
        layer([[0, 0, 0]], [[0, 5, 0]])
    assert group.expert_load().tolist() == [[0, 1, 0, 0, 2], *[[0] * 5] * 3]
    provider.close()
    provider.unlink("heap")


def test_the_sum_is_near_the_exact_one(heap_dir: Path) -> None:
    """The oracle's own order of operations could be wrong in the same way: a float64 sum in any order is close."""
    tokens = [Tokens.random(rank, 6) for rank in range(2)]
    exact = [oracle(Tokens(mine.x_TH.double(), mine.expert_TK, mine.weight_TK.double())) for mine in tokens]
    with local_group(heap_dir, 2) as cluster:
        cluster.enter(1, [0, 1])
        out = run_layer(cluster, [0, 1], tokens, Placement.random(0, [0, 1]))
    for rank in (0, 1):
        torch.testing.assert_close(out[rank].double(), exact[rank], rtol=0, atol=2e-6)


def test_many_layers_reuse_the_same_buffers(heap_dir: Path) -> None:
    members = [0, 1, 2, 3]

    def rounds(group: ElasticGroup) -> bool:
        same = True
        for number in range(10):
            header = group.allgather([number, group.rank])
            assert header is not None
            assert header.words_by_rank == {rank: (number, rank, 0, 0, 0, 0, 0, 0) for rank in members}
            for layer in range(number % 4):  # 0: idle rounds, header after header
                tokens = Tokens.random(100 * number + 10 * layer + group.rank, (number * 3 + layer + group.rank) % 7)
                got = moe_layer(group, tokens, Placement.random(number + layer, members))
                assert got is not None
                same &= torch.equal(got, oracle(tokens))
            assert group.clean_buffer(20.0)
            assert group.clean_buffer(20.0)
        return same

    with local_group(heap_dir) as cluster:
        cluster.enter(1, members)
        assert all(cluster.run(rounds).values())


def test_each_token_goes_once_to_each_distinct_rank_in_a_fixed_order(heap_dir: Path) -> None:
    """Two ranks; rank 1's token 0 wants both experts of rank 0 and one of its own; token 1 was dropped by two of
    three.
    """
    rank_TK = {0: [[0, 1, 0]], 1: [[0, 1, 0], [-1, 0, -1]]}
    local_TK = {0: [[0, 1, 2]], 1: [[3, 4, 5], [9, 6, 9]]}
    with local_group(heap_dir, 2) as cluster:
        cluster.enter(1, [0, 1])

        def act(group: ElasticGroup) -> tuple[object, ...]:
            ranks = torch.tensor(rank_TK[group.rank])
            x_TH = torch.arange(ranks.shape[0])[:, None] + 10.0 * group.rank + torch.zeros(1, SHAPE.hidden_size)
            weight_TK = torch.tensor(local_TK[group.rank]) / 8
            received = group.dispatch(x_TH, ranks, torch.tensor(local_TK[group.rank]), weight_TK)
            assert received is not None
            found = (
                received.num_rows_W[:2],
                received.source_N.tolist(),
                received.token_N.tolist(),
                received.k_N.tolist(),
                received.local_expert_N.tolist(),
                (received.weight_N * 8).tolist(),
                received.x_NH()[:, 0].tolist(),
            )
            assert received.x_SH.data_ptr() != received.x_NH().data_ptr()
            assert group.combine(received.x_NH(), received) is not None
            return found

        found = cluster.run(act)
    assert found[0] == (
        (1, 2),
        [0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1],
        [0, 2, 0, 2, 1],
        [0, 2, 3, 5, 6],
        [0, 2, 3, 5, 6],
        [0, 0, 10, 10, 11],
    )
    assert found[1] == ((1, 1), [0, 1], [0, 0], [1, 1], [1, 4], [1, 4], [0, 10])


def test_a_dropped_entry_adds_nothing_even_where_garbage_lies(heap_dir: Path) -> None:
    with local_group(heap_dir, 1) as cluster:
        cluster.layout.view(cluster.heaps[0].bytes_U8, "ep_combine_rows").fill_(float("nan"))
        cluster.enter(1, [0])
        tokens = Tokens(
            torch.ones(1, SHAPE.hidden_size), torch.tensor([[-1, 2, -1]]), torch.tensor([[float("inf"), 0.5, 1.0]])
        )
        got = moe_layer(cluster.ranks[0], tokens, Placement.random(0, [0], num_copies=1))
    assert got is not None
    only = Tokens(tokens.x_TH, torch.tensor([[2]]), torch.tensor([[0.5]]))
    assert torch.equal(got, oracle(only))


def test_a_rank_masked_without_a_view_gets_nothing_and_is_not_awaited(heap_dir: Path) -> None:
    members = [0, 1, 2]
    placement = Placement.random(3, members, num_copies=1)
    tokens = [Tokens.random(rank, 5) for rank in members]

    with local_group(heap_dir, 3) as cluster:
        cluster.enter(1, members)
        for heap in cluster.heaps:
            cluster.layout.view(heap.bytes_U8, "ep_combine_rows")[2].fill_(float("nan"))
        for group in cluster.ranks[:2]:
            group.update_mask_buffer(2, True)
            assert group.query_mask_buffer().tolist() == [0, 0, 1, 1]
        out = cluster.run(lambda group: moe_layer(group, tokens[group.rank], placement), only=[0, 1])
        for rank in (0, 1):
            got = out[rank]
            assert got is not None
            assert torch.equal(got, oracle(without(tokens[rank], placement, 2)))
            assert not torch.equal(got, oracle(tokens[rank]))


def test_wrong_arguments_are_named(heap_dir: Path) -> None:
    with local_group(heap_dir, 2) as cluster:
        group = cluster.ranks[0]
        x_TH, zero_TK, weight_TK = torch.zeros(1, 20), torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)
        with pytest.raises(RuntimeError, match="no view adopted"):
            group.allgather([])
        group.adopt(3, [0], 0)
        with pytest.raises(RuntimeError, match="begins with allgather"):
            group.dispatch(x_TH, zero_TK, zero_TK, weight_TK)
        with pytest.raises(RuntimeError, match="begins with allgather"):
            group.clean_buffer(1.0)
        assert group.allgather([2**32 - 1]) is not None
        with pytest.raises(ValueError, match="32-bit"):
            group.allgather([2**32])
        with pytest.raises(ValueError, match="a header has 8 words"):
            group.allgather([0] * 9)
        with pytest.raises(ValueError, match="outside epoch 3's members"):
            group.dispatch(x_TH, zero_TK + 1, zero_TK, weight_TK)
        with pytest.raises(ValueError, match="outside epoch 3's members"):
            group.dispatch(x_TH, zero_TK - 2, zero_TK, weight_TK)
        with pytest.raises(ValueError, match="local experts"):
            group.dispatch(x_TH, zero_TK, zero_TK + 65536, weight_TK)
        with pytest.raises(ValueError, match="x must be float32"):
            group.dispatch(torch.zeros(7, 20), zero_TK, zero_TK, weight_TK)
        with pytest.raises(ValueError, match="must be \\[1, 3\\]"):
            group.dispatch(x_TH, zero_TK[:, :2], zero_TK, weight_TK)
        received = group.dispatch(x_TH, zero_TK, zero_TK, weight_TK)
        assert received is not None
        with pytest.raises(RuntimeError, match="between dispatch and combine"):
            group.allgather([])
        with pytest.raises(ValueError, match="expert rows must be"):
            group.combine(torch.zeros(2, 20), received)
        assert group.combine(torch.zeros(3, 20), received) is not None
        with pytest.raises(RuntimeError, match="combine out of order"):
            group.combine(torch.zeros(3, 20), received)
