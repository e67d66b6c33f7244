"""Words lost between ranks, at any moment: what a rank finds clean is right."""

from pathlib import Path

import pytest
import torch

from kernels.elastic_mode import ElasticMode
from kernels.epoch_state import CLEAN
from kernels.reference import ElasticGroup
from tests.kernels.local_group import Placement, Tokens, local_group, moe_layer, oracle

RANKS = (0, 1)


class Flip:
    """Mute until the look of this number, or from it on."""

    def __init__(self, at: int, is_mute_before: bool) -> None:
        self._left, self._is_mute_before = at, is_mute_before

    def is_mute(self) -> bool:
        self._left -= 1
        return (self._left >= 0) is self._is_mute_before

    def is_deaf(self) -> bool:
        return False

    def on_lost(self, num_out: int, num_in: int) -> None:
        pass


@pytest.mark.parametrize("compiled", [(), RANKS], ids=["reference", "compiled"])
@pytest.mark.parametrize("is_mute_before", [True, False])
def test_rows_and_their_words_are_lost_together(
    heap_dir: Path, compiled: tuple[int, ...], is_mute_before: bool
) -> None:
    placement = Placement.random(1, RANKS)
    num_clean = 0
    with local_group(heap_dir, 2, compiled=compiled) as cluster:
        for at in range(13):
            tokens = [Tokens.random(10 * at + rank, 5) for rank in RANKS]
            for group in cluster.ranks:
                group.set_link_fault(Flip(0, True))
                group.deadline_s = 20.0
            cluster.enter(at + 1, RANKS)
            cluster.ranks[0].set_link_fault(Flip(at, is_mute_before))
            for group in cluster.ranks:
                group.deadline_s = 0.03

            def run(group: ElasticGroup, tokens: list[Tokens] = tokens) -> torch.Tensor | None:
                return moe_layer(group, tokens[group.rank], placement)

            for rank, out_TH in cluster.run(run).items():
                if out_TH is not None and cluster.ranks[rank].status == CLEAN:
                    num_clean += 1
                    assert torch.equal(out_TH, oracle(tokens[rank])), f"flipped at look {at}"
    assert num_clean > 0


def test_a_heap_that_is_mapped_while_a_rank_is_mute_is_used_afterwards(heap_dir: Path) -> None:
    with local_group(heap_dir, 2, compiled=RANKS) as cluster:
        group = cluster.ranks[0]
        group.set_link_fault(Flip(1000, True))
        group.map_peer(1, cluster.heaps[1])
        group.set_link_fault(Flip(0, True))
        cluster.enter(1, RANKS)
        assert all(cluster.run(lambda group: group.clean_buffer(20.0)).values())


def test_who_is_masked_is_missed_no_more(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, compiled=(0, 1, 2), elastic=ElasticMode.ALONE) as cluster:
        cluster.enter(1, (0, 1, 2))
        for _ in range(2):
            assert all(cluster.run(lambda group: group.clean_buffer(1.0), only=RANKS).values())
        for rank in RANKS:
            assert cluster.ranks[rank].members == RANKS
            assert cluster.ranks[rank].missing == ()
