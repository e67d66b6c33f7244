"""Gives the rows of a new placement to the ranks that hold most of them already, and experts to their old slots. Pure.

Balancedness and coverage stay as they are: only ranks of one host with equally many slots change places.

Shapes: L mixture-of-experts layers, R ranks, S expert slots of the largest rank, E logical experts.
"""

import numpy as np

from common.placement import EMPTY
from services.planner.cluster_shape import ClusterShape, FloatArray, IntArray
from services.planner.placement_array import held_by


def relabel(new_LRS: IntArray, old_LRS: IntArray, shape: ClusterShape, load_LE: FloatArray) -> IntArray:
    """``new_LRS`` with its rows exchanged between like ranks, and slots within rows, so that few slots change.

    Loads decide between ranks that have equally many experts in common with a row, so that no numbering does.
    """
    num_layers, num_experts = load_LE.shape
    hosts = shape.host_R or (0,) * len(shape.num_local_R)
    kinds = np.unique(np.array([hosts, shape.num_local_R]), axis=1, return_inverse=True)[1].ravel()
    old_LRE, new_LRE = held_by(old_LRS, num_experts), held_by(new_LRS, num_experts)
    weight_LE = np.ones((num_layers, num_experts + 1))
    weight_LE[:, :num_experts] += load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300) / 2
    overlap_LRR = (old_LRE * weight_LE[:, None, :]) @ new_LRE.astype(np.float64).transpose(0, 2, 1)
    overlap_LRR[:, kinds[:, None] != kinds[None, :]] = -1.0
    source_LR = _match(overlap_LRR)
    return keep_slots(np.take_along_axis(new_LRS, source_LR[:, :, None], axis=1), old_LRS, num_experts)


def _match(overlap_LRR: FloatArray) -> IntArray:
    """[L, R]: which new row each old rank takes; the pair with most in common first."""
    num_layers, num_ranks, _ = overlap_LRR.shape
    layers_L = np.arange(num_layers)
    left_LRR = overlap_LRR.copy()
    source_LR = np.empty((num_layers, num_ranks), dtype=np.int64)
    for _ in range(num_ranks):
        old_L, new_L = np.divmod(left_LRR.reshape(num_layers, -1).argmax(axis=1), num_ranks)
        source_LR[layers_L, old_L] = new_L
        left_LRR[layers_L, old_L] = left_LRR[layers_L, :, new_L] = -2.0
    return source_LR


def keep_slots(new_LRS: IntArray, old_LRS: IntArray, num_logical_experts: int) -> IntArray:
    """Same experts on every rank, each that was there in the slot where it was, the others in the slots left."""
    layers, ranks = np.arange(len(new_LRS))[:, None, None], np.arange(new_LRS.shape[1])[None, :, None]
    locals_S = np.broadcast_to(np.arange(new_LRS.shape[2]), new_LRS.shape)
    old_local_LRE = np.full((*new_LRS.shape[:2], num_logical_experts + 1), EMPTY, dtype=np.int64)
    old_local_LRE[layers, ranks, old_LRS] = locals_S
    old_local_LRE[:, :, EMPTY] = EMPTY
    old_local_LRS = old_local_LRE[layers, ranks, new_LRS]
    kept = old_local_LRS != EMPTY
    is_taken_LRS = np.zeros_like(kept)
    out_LRS = np.full_like(new_LRS, EMPTY)
    layer_K, rank_K, _ = np.nonzero(kept)
    is_taken_LRS[layer_K, rank_K, old_local_LRS[kept]] = True
    out_LRS[layer_K, rank_K, old_local_LRS[kept]] = new_LRS[kept]
    # Both orders begin with what was kept; new experts follow, then padding, which sorts behind slots that exist.
    expert_order = np.argsort(np.where(kept, -1, np.where(new_LRS == EMPTY, 1, 0)), axis=2, kind="stable")
    slot_order = np.argsort(~is_taken_LRS, axis=2, kind="stable")
    np.put_along_axis(
        out_LRS,
        slot_order,
        np.where(
            np.take_along_axis(is_taken_LRS, slot_order, axis=2),
            np.take_along_axis(out_LRS, slot_order, axis=2),
            np.take_along_axis(new_LRS, expert_order, axis=2),
        ),
        axis=2,
    )
    return out_LRS
