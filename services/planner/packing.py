"""Places given numbers of copies onto ranks: largest share first, onto the least loaded rank with room. Pure.

No two copies of an expert go to one rank, and the second copy goes to another host if one has room. Where that leaves a
copy without a place it is dropped and its slot stays empty; the first copy of an expert always finds one.

Shapes: L mixture-of-experts layers, R ranks, S expert slots of the largest rank, E logical experts, N copies.
"""

import numpy as np

from common.placement import EMPTY
from services.planner.cluster_shape import ClusterShape, FloatArray, IntArray

_SAME_HOST = 1e6
_SAME_RANK = 1e9


def place(expert_LN: IntArray, share_LN: FloatArray, shape: ClusterShape, placement_LRS: IntArray) -> None:
    """Fills ``placement_LRS``, EMPTY everywhere, with copies in the order of `largest_first`."""
    num_layers, num_ranks, _ = placement_LRS.shape
    layers_L, host_R = np.arange(num_layers), np.array(shape.host_R or (0,) * num_ranks)
    num_local_R = np.array(shape.num_local_R)
    num_placed_LR = np.zeros((num_layers, len(host_R)), dtype=np.int64)
    load_LR = np.zeros((num_layers, len(host_R)))
    load_LR[:, num_local_R == 0] = np.inf
    taken_LR, host_taken_LR = np.zeros_like(load_LR), np.zeros_like(load_LR)
    has_hosts = len(set(shape.host_R)) > 1
    previous_L = np.full(num_layers, EMPTY)
    for expert_L, share_L in zip(expert_LN.T, share_LN.T, strict=True):
        is_first_L = expert_L != previous_L
        previous_L = expert_L
        taken_LR[is_first_L] = host_taken_LR[is_first_L] = 0.0
        key_LR = load_LR + taken_LR
        if has_hosts:
            key_LR += host_taken_LR
        rank_L = key_LR.argmin(axis=1)
        fits_L = key_LR[layers_L, rank_L] < _SAME_RANK
        layer_F, rank_F = layers_L[fits_L], rank_L[fits_L]
        local_F = num_placed_LR[layer_F, rank_F]
        placement_LRS[layer_F, rank_F, local_F] = expert_L[fits_L]
        num_placed_LR[layer_F, rank_F] = local_F + 1
        load_LR[layer_F, rank_F] += share_L[fits_L]
        is_full_F = local_F + 1 == num_local_R[rank_F]
        load_LR[layer_F[is_full_F], rank_F[is_full_F]] = np.inf
        taken_LR[layer_F, rank_F] = _SAME_RANK
        if has_hosts:
            same_host_LR = host_R[None, :] == host_R[rank_L][:, None]
            host_taken_LR = np.where(same_host_LR & is_first_L[:, None], _SAME_HOST, 0.0)


def largest_first(load_LE: FloatArray, counts_LE: IntArray) -> tuple[IntArray, FloatArray]:
    """Expert and share of each of ``counts_LE`` copies, [L, N] both; copies of one expert follow each other."""
    num_layers, num_experts = load_LE.shape
    experts = np.repeat(np.tile(np.arange(num_experts), num_layers), counts_LE.ravel()).reshape(num_layers, -1)
    share_LN = np.take_along_axis(load_LE / np.maximum(counts_LE, 1), experts, axis=1)
    order_LN = np.argsort(-share_LN, axis=1, kind="stable")
    return np.take_along_axis(experts, order_LN, axis=1), np.take_along_axis(share_LN, order_LN, axis=1)
