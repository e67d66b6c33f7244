"""Whose memory an expert is read from when it moves. Pure.

Shapes: N moves, L layers, R ranks, S expert slots of the largest rank.
"""

from collections.abc import Collection

import numpy as np

from common.placement import EMPTY
from services.planner.cluster_shape import ClusterShape, IntArray


def move_sources(moves_N4: IntArray, before_LRS: IntArray, readable: Collection[int], shape: ClusterShape) -> IntArray:
    """[N]: the rank to read from for each move; EMPTY when no copy can be read (host memory or checkpoint).

    ``readable``: ranks whose memory is alive and trusted, masked and leaving ones too: what the members have lost may
    still be read there. A copy on the host that wants it comes first, then the rank that has the fewest reads.
    """
    hosts = shape.host_R or (0,) * len(shape.num_local_R)
    num_reads = dict.fromkeys(sorted(readable), 0)
    is_held_LRS = before_LRS[moves_N4[:, 0]] == moves_N4[:, 3, None, None]
    holds_NR = is_held_LRS.any(axis=2)
    source_N = np.full(len(moves_N4), EMPTY, dtype=np.int64)
    for number, (target, holds_R) in enumerate(zip(moves_N4[:, 1].tolist(), holds_NR.tolist(), strict=True)):
        able = [rank for rank in num_reads if holds_R[rank] and rank != target]
        if able:
            best = min(able, key=lambda rank: (hosts[rank] != hosts[target], num_reads[rank], rank))
            num_reads[best] += 1
            source_N[number] = best
    return source_N
