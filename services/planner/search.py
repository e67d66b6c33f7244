"""Local search and packing as plans use them: compiled where the CPU kernels are built, else by their specifications in
numpy, which give the same placements in three times the time. Pure.

Shapes: L layers, R ranks, S slots of the largest rank, N copies, E logical experts.
"""

import numpy as np

from common.placement import EMPTY
from kernels.cpu import placement_search
from kernels.cpu.library import KernelsNotBuilt
from services.planner.cluster_shape import ClusterShape, FloatArray, IntArray
from services.planner.local_search import NUM_EXPERTS, NUM_LIGHT, NUM_SLOTS, LocalSearch
from services.planner.packing import largest_first, place
from services.planner.search_path import SearchPath


def find_path(
    load_LE: FloatArray,
    placement_LRS: IntArray,
    shape: ClusterShape,
    coverage_price: float,
    max_steps: int,
    most_L: IntArray,
) -> SearchPath:
    """What `LocalSearch` finds in ``max_steps`` steps; no layer loads more than ``most_L`` slots."""
    num_layers, num_ranks, _ = placement_LRS.shape
    num_experts, has_hosts = load_LE.shape[1], len(set(shape.host_R)) > 1
    held_LP = np.where(placement_LRS == EMPTY, num_experts, placement_LRS).reshape(num_layers, -1)
    limits = placement_search.SearchLimits(
        min(NUM_SLOTS, held_LP.shape[1]),
        min(NUM_EXPERTS, num_experts),
        min(NUM_LIGHT - has_hosts, num_ranks),
        max_steps,
        coverage_price,
    )
    hosts = np.array(shape.host_R if has_hosts else (0,) * num_ranks)
    try:
        found = placement_search.search(load_LE, held_LP, hosts, shape.exists_RS().ravel(), most_L, limits)
    except KernelsNotBuilt:
        return LocalSearch(load_LE, placement_LRS, shape, coverage_price).run(max_steps, most_L)
    num_steps = int(found.num_moves_L.max(initial=0))
    # A layer that has come to its end stays as it is.
    at = np.arange(len(held_LP)), np.minimum(np.arange(num_steps + 1)[:, None], found.num_moves_L)
    states = found.cost_LN[at], found.largest_LN[at], found.deficit_LN[at]
    return SearchPath(held_LP, found.changed_LN4[:, :num_steps], *states)


def pack(load_LE: FloatArray, counts_LE: IntArray, shape: ClusterShape) -> IntArray:
    """placement_LRS for ``counts_LE`` copies; every layer has the same sum of counts, at most the number of slots.

    >>> pack(np.array([[4.0, 3.0, 1.0]]), np.array([[2, 1, 1]]), ClusterShape((2, 2)))
    array([[[1, 2],
            [0, 0]]])
    """
    expert_LN, share_LN = largest_first(load_LE, counts_LE)
    num_local_R = np.array(shape.num_local_R)
    placement_LRS = np.full((len(load_LE), len(num_local_R), max(shape.num_local_R)), EMPTY, dtype=np.int64)
    try:
        hosts = np.array(shape.host_R or (0,) * len(num_local_R))
        placement_search.pack(expert_LN, share_LN, num_local_R, hosts, placement_LRS)
    except KernelsNotBuilt:
        place(expert_LN, share_LN, shape, placement_LRS)
    return placement_LRS
