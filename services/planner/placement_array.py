"""The map of experts as one array, and what is counted on it. Pure.

``placement_LRS`` holds the logical expert of each slot; EMPTY where a slot holds none, or where a row is padded.

Shapes: L mixture-of-experts layers, R ranks, S expert slots of the largest rank, E logical experts, H hosts.
"""

import numpy as np

from common.placement import EMPTY, PhysicalToLogical
from services.planner.cluster_shape import BoolArray, ClusterShape, FloatArray, IntArray


def to_array(physical_to_logical: PhysicalToLogical, shape: ClusterShape) -> IntArray:
    """Rows are cut or padded to the slots that ``shape`` gives to each rank."""
    num_ranks, width = len(shape.num_local_R), max(shape.num_local_R)
    placement_LRS = np.full((len(physical_to_logical), num_ranks, width), EMPTY, dtype=np.int64)
    for layer, rows in enumerate(physical_to_logical):
        for rank, row in enumerate(rows[:num_ranks]):
            kept = row[: shape.num_local_R[rank]]
            placement_LRS[layer, rank, : len(kept)] = kept
    return placement_LRS


def to_tuples(placement_LRS: IntArray, shape: ClusterShape) -> PhysicalToLogical:
    return tuple(
        tuple(tuple(row[:num_local]) for row, num_local in zip(rows, shape.num_local_R, strict=True))
        for rows in placement_LRS.tolist()
    )


def num_copies(placement_LRS: IntArray, num_logical_experts: int) -> IntArray:
    """[L, E]"""
    num_layers, width = len(placement_LRS), num_logical_experts + 1
    held = np.where(placement_LRS == EMPTY, num_logical_experts, placement_LRS).reshape(num_layers, -1)
    flat = held + (np.arange(num_layers) * width)[:, None]
    counts = np.bincount(flat.ravel(), minlength=num_layers * width).reshape(num_layers, width)
    return counts[:, :num_logical_experts].astype(np.int64)


def held_by(placement_LRS: IntArray, num_logical_experts: int) -> BoolArray:
    """[L, R, E + 1]: does this rank hold a copy; the last column is always False, so EMPTY may be looked up."""
    num_layers, num_ranks, _ = placement_LRS.shape
    held_LRE = np.zeros((num_layers, num_ranks, num_logical_experts + 1), dtype=np.bool_)
    held_LRE[np.arange(num_layers)[:, None, None], np.arange(num_ranks)[None, :, None], placement_LRS] = True
    held_LRE[:, :, num_logical_experts] = False
    return held_LRE


def rank_loads(load_LE: FloatArray, placement_LRS: IntArray) -> FloatArray:
    """[L, R]: an expert's load is split evenly over its copies; orphans count nowhere."""
    share_LE = load_LE / np.maximum(num_copies(placement_LRS, load_LE.shape[1]), 1)
    padded = np.concatenate([share_LE, np.zeros((len(load_LE), 1))], axis=1)
    shares: FloatArray = padded[np.arange(len(load_LE))[:, None, None], placement_LRS]
    return np.asarray(shares.sum(axis=2))


def balancedness(load_LE: FloatArray, placement_LRS: IntArray) -> float:
    """As `common.placement.balancedness`, over all R ranks."""
    load_LR = rank_loads(load_LE, placement_LRS)
    largest = float(load_LR.max(axis=1).sum())
    return float(load_LR.mean(axis=1).sum()) / largest if largest > 0 else 1.0


def num_gained(before_LRS: IntArray, after_LRS: IntArray, num_logical_experts: int) -> int:
    """Slots whose rank holds an expert after that it did not hold before: what must be loaded."""
    before, after = held_by(before_LRS, num_logical_experts), held_by(after_LRS, num_logical_experts)
    return int((after & ~before).sum())


def moves_between(before_LRS: IntArray, after_LRS: IntArray) -> IntArray:
    """[N, 4] layer, rank, local, logical expert of the slots to load, ascending. Equal rows must keep their slots."""
    changed = np.nonzero((before_LRS != after_LRS) & (after_LRS != EMPTY))
    return np.stack([*changed, after_LRS[changed]], axis=1)


def num_orphans_of_single_losses(
    placement_LRS: IntArray, num_logical_experts: int, domain_R: tuple[int, ...]
) -> IntArray:
    """[number of domains]: experts over all layers whose every copy lies in that fault domain."""
    held_LRE = held_by(placement_LRS, num_logical_experts)[:, :, :num_logical_experts]
    domains = np.unique(np.array(domain_R))
    in_domain_DLE = np.stack([held_LRE[:, np.array(domain_R) == domain].any(axis=1) for domain in domains])
    alone_LE = in_domain_DLE.sum(axis=0) == 1
    return np.asarray((in_domain_DLE & alone_LE).sum(axis=(1, 2)))
