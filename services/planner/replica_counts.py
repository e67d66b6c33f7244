"""How many copies each expert gets, before their places are known. Pure.

The number of copies serves two ends. Balance: the share of one copy (load / copies) must fit into a rank. Coverage: a
second copy means that one loss orphans nobody. Shares below a fraction of a rank's mean load no longer hinder the
packing, so slots are spent on larger shares first, then on experts that have one copy, then on the largest share again.

Shapes: L mixture-of-experts layers, E logical experts.
"""

import numpy as np

from kernels.cpu import placement_search
from kernels.cpu.library import KernelsNotBuilt
from services.planner.cluster_shape import FloatArray, IntArray


def replica_counts(
    load_LE: FloatArray, num_slots: int, max_copies: int, share_limit: float, *, coverage_first: bool
) -> IntArray:
    """[L, E] copies, their sum at most ``num_slots`` and each at most ``max_copies`` (the number of ranks).

    ``load_LE`` is scaled so that 1 is the mean load of a rank. Shares above ``share_limit`` get further copies before
    experts with a single copy do, but not with ``coverage_first``. With fewer slots than experts the most loaded
    ones get one copy each and the others none.

    >>> replica_counts(np.array([[1.5, 0.3, 0.2]]), 6, 4, 0.5, coverage_first=False)
    array([[3, 2, 1]])
    """
    num_layers, num_experts = load_LE.shape
    counts_LE = np.ones((num_layers, num_experts), dtype=np.int64)
    if num_slots < num_experts:
        order_LE = np.argsort(-load_LE, axis=1, kind="stable")
        np.put_along_axis(counts_LE, order_LE[:, num_slots:], 0, axis=1)
        return counts_LE
    if coverage_first and num_slots >= 2 * num_experts and max_copies >= 2:
        counts_LE += 1
    num_more = min(num_slots, num_experts * max_copies) - int(counts_LE[0].sum())
    try:
        placement_search.replica_counts(load_LE, counts_LE, num_more, max_copies, share_limit, coverage_first)
    except KernelsNotBuilt:
        add_copies(load_LE, counts_LE, num_more, max_copies, share_limit, coverage_first)
    return counts_LE


def add_copies(
    load_LE: FloatArray, counts_LE: IntArray, num_more: int, max_copies: int, share_limit: float, coverage_first: bool
) -> None:
    """``num_more`` copies for each layer, one by one."""
    layers_L = np.arange(len(load_LE))
    urgent = 2.0 * max_copies  # more than any share
    for _ in range(num_more):
        share_LE = load_LE / counts_LE
        key_LE = share_LE + urgent * (counts_LE == 1)
        if not coverage_first:
            key_LE = np.where(share_LE > share_limit, share_LE + 2 * urgent, key_LE)
        key_LE[counts_LE >= max_copies] = -1.0
        counts_LE[layers_L, key_LE.argmax(axis=1)] += 1
