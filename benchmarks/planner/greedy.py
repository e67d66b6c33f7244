"""Greedy replicate-and-pack, for comparison: the scheme of DeepSeek's EPLB, which vLLM and SGLang ship too.

Written from its published description (https://github.com/deepseek-ai/EPLB): a further copy goes to the expert whose
copies have the largest share, one after the other; then copies go by share, largest first, to the lightest rank with
room. With groups: first groups to hosts the same way, then each host on its own. It knows no present placement and
does not keep copies of one expert apart.

Shapes: L layers, E experts, R ranks, S slots of a rank, N things to pack, B bins.
"""

import numpy as np

from common.placement import EMPTY
from services.planner.cluster_shape import FloatArray, IntArray


def greedy_placement(
    load_LE: FloatArray, num_slots: int, num_ranks: int, num_groups: int = 1, num_hosts: int = 1
) -> IntArray:
    """placement_LRS. The groups count only if they divide over the hosts."""
    if num_groups % num_hosts:
        num_groups = num_hosts = 1
    num_layers, num_experts = load_LE.shape
    size = num_experts // num_groups
    group_LHG = balanced_packing(load_LE.reshape(num_layers, num_groups, size).sum(axis=2), num_hosts)
    expert_LE = (group_LHG[:, :, :, None] * size + np.arange(size)).reshape(num_layers * num_hosts, -1)
    inner_LE = np.take_along_axis(np.repeat(load_LE, num_hosts, axis=0), expert_LE, axis=1)
    copy_LN, share_LN = replicate(inner_LE, num_slots // num_hosts)
    copy_LRS = balanced_packing(share_LN, num_ranks // num_hosts)
    local_LN = np.take_along_axis(copy_LN, copy_LRS.reshape(len(copy_LN), -1), axis=1)
    return np.take_along_axis(expert_LE, local_LN, axis=1).reshape(num_layers, num_ranks, -1)


def replicate(load_LE: FloatArray, num_copies: int) -> tuple[IntArray, FloatArray]:
    """Expert and share of each copy, [L, num_copies]; first one of each, then the further ones as they were given."""
    num_layers, num_experts = load_LE.shape
    layers_L = np.arange(num_layers)
    counts = np.ones((num_layers, num_experts))
    copies = [np.tile(np.arange(num_experts), (num_layers, 1))]
    for _ in range(num_copies - num_experts):
        expert_L = (load_LE / counts).argmax(axis=1)
        counts[layers_L, expert_L] += 1.0
        copies.append(expert_L[:, None])
    copy_LN = np.concatenate(copies, axis=1)
    return copy_LN, np.take_along_axis(load_LE / counts, copy_LN, axis=1)


def balanced_packing(load_LN: FloatArray, num_bins: int) -> IntArray:
    """[L, B, N / B]: equally many things in each bin, each put into the lightest one that has room."""
    num_layers, num_things = load_LN.shape
    room = num_things // num_bins
    if room == 1:
        return np.broadcast_to(np.arange(num_things)[None, :, None], (num_layers, num_bins, 1))
    layers_L = np.arange(num_layers)
    packed = np.full((num_layers, num_bins, room), EMPTY, dtype=np.int64)
    fill = np.zeros((num_layers, num_bins), dtype=np.int64)
    weight = np.zeros((num_layers, num_bins))
    for thing_L in np.argsort(-load_LN, axis=1, kind="stable").T:
        bin_L = np.where(fill < room, weight, np.inf).argmin(axis=1)
        packed[layers_L, bin_L, fill[layers_L, bin_L]] = thing_L
        fill[layers_L, bin_L] += 1
        weight[layers_L, bin_L] += load_LN[layers_L, thing_L]
    return packed


def naive_repair(placement_LRS: IntArray, lost_rank: int, num_logical_experts: int) -> tuple[IntArray, int]:
    """Without the rank, each orphan into the first slot of the first rank whose expert has another copy. And how many
    moves that took. Knows neither loads nor which rank has got orphans already."""
    left_LRS = np.delete(placement_LRS, lost_rank, axis=1)
    num_moves = 0
    for rows in left_LRS:
        flat = rows.reshape(-1)
        counts = np.bincount(flat, minlength=num_logical_experts)
        for orphan in np.flatnonzero(counts == 0):
            spare = int((counts[flat] > 1).argmax())
            if counts[flat[spare]] < 2:
                break
            counts[flat[spare]] -= 1
            counts[orphan] = 1
            flat[spare] = orphan
            num_moves += 1
    return left_LRS, num_moves
