"""What no placement can exceed: an upper bound of balancedness. Pure.

The heaviest rank bears at least the mean load, and at least the largest share of one copy; dividing copies greedily
makes the largest share as small as any division can.
"""

import numpy as np

from services.planner.cluster_shape import ClusterShape, FloatArray
from services.planner.replica_counts import replica_counts


def balancedness_bound(load_LE: FloatArray, shape: ClusterShape) -> float:
    """Of even splits over copies on distinct ranks, over all numbers of copies. 1.0 where there is no load."""
    num_ranks = len(shape.active_ranks)
    mean_L = load_LE.sum(axis=1) / num_ranks
    if not mean_L.any():
        return 1.0
    counts_LE = replica_counts(load_LE, shape.num_slots, num_ranks, 0.0, coverage_first=False)
    largest_L = (load_LE / counts_LE).max(axis=1)
    return float(mean_L.sum() / np.maximum(mean_L, largest_L).sum())
