"""A process declared dead that still writes: PROTOCOL 1.1."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.reference import ElasticGroup
from tests.kernels.local_group import GENEROUS_S, Placement, Tokens, local_group, moe_layer, oracle
from tests.kernels.rank_process import DyingRow

NUM_TOKENS = {0: 4, 1: 0, 2: 0}


class StoppedStore:
    """Stands in for the rows of a peer's heap: a store stops before it begins, until ``go``."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.slot = rows, 0
        self.is_reached, self.go = threading.Event(), threading.Event()

    def __getitem__(self, slot: int) -> "StoppedStore":
        self.slot = slot
        return self

    def __setitem__(self, place: Any, rows: Any) -> None:
        self.is_reached.set()
        assert self.go.wait(GENEROUS_S)
        self.rows[self.slot][place] = rows


def all_on(rank: int) -> Placement:
    placement = Placement.random(1, [rank], num_copies=1)
    return Placement(placement.home, {0: torch.empty(0, dtype=torch.int64), **placement.logical})


def layer(group: ElasticGroup, seed: int, rank: int) -> torch.Tensor | None:
    return moe_layer(group, Tokens.random(seed, NUM_TOKENS[group.rank]), all_on(rank))


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_zombie_stopped_inside_a_combine_store_wakes_two_views_later(heap_dir: Path, is_shared: bool) -> None:
    """Its successor has just stored the row for the same token and k. A version that shares rows between sources loses
    that row; with rows of its own, the zombie harms nobody."""
    with local_group(heap_dir, 3, compiled=()) as cluster:
        survivor, zombie, successor = cluster.ranks
        if is_shared:
            for group in cluster.ranks:
                for window in group._windows.values():
                    rows = window.combine_rows
                    window.combine_rows = np.lib.stride_tricks.as_strided(rows, strides=(0, *rows.strides[1:]))
        cluster.enter(1, [0, 1])
        stopped = StoppedStore(zombie._windows[0].combine_rows)
        zombie._windows[0].combine_rows = stopped  # type: ignore[assignment]
        threads = [threading.Thread(target=layer, args=(group, 1, 1)) for group in (survivor, zombie)]
        for thread in threads:
            thread.start()
        assert stopped.is_reached.wait(GENEROUS_S)
        survivor.poison_self(1)
        threads[0].join(GENEROUS_S)
        for epoch in (2, 3):
            cluster.enter(epoch, [0, 2])

        def wake_the_zombie() -> None:
            """The successor's rows are out, its word is not."""
            stopped.go.set()
            threads[1].join(GENEROUS_S)
            assert not threads[1].is_alive()

        window = successor._windows[0]
        window.combine_word = DyingRow(window.combine_word, wake_the_zombie)  # type: ignore[assignment]
        out = cluster.run(lambda group: layer(group, 2, 2), only=[0, 2])
        got = out[0]
        assert got is not None and stopped.go.is_set()
        assert torch.equal(got, oracle(Tokens.random(2, NUM_TOKENS[0]))) is not is_shared
