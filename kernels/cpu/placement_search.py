"""The planner's loops, compiled: numpy arrays in, numpy arrays out. What they compute is specified by
`services.planner.local_search`, `packing` and `replica_counts`, to the bit; no torch.

Shapes: L layers, R ranks, S slots of the largest rank, P = R * S, E experts (number E stands for an empty slot).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from kernels.cpu.library import POINTER, KernelFunction, kernel_function

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


_MAX_LIGHT = 3  # the C source has room for twice as many, once on any host and once on the heaviest rank's


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """Slots, experts and light ranks that a step considers; steps; and what an expert covered is worth."""

    num_slots: int
    num_experts: int
    num_light: int
    max_steps: int
    coverage_price: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Of a layer the first ``num_moves_L`` changes count, and one more of the others."""

    num_moves_L: IntArray
    changed_LN4: IntArray
    cost_LN: IntArray
    largest_LN: FloatArray
    deficit_LN: FloatArray


def search(
    load_LE: FloatArray,
    held_LP: IntArray,
    host_R: IntArray,
    exists_P: npt.NDArray[np.bool_],
    most_L: IntArray,
    limits: SearchLimits,
) -> SearchResult:
    """``host_R``: numbers from 0; one host when all are 0. Experts in ``held_LP`` are 0..E. Raises MemoryError,
    KernelsNotBuilt."""
    num_layers, num_experts = load_LE.shape
    num_ranks, num_slots = len(host_R), held_LP.shape[1]
    _check(held_LP.shape[0] == num_layers == len(most_L) and num_slots % num_ranks == 0 and len(exists_P) == num_slots)
    _check(not held_LP.size or (held_LP.min() >= 0 and held_LP.max() <= num_experts))
    num_hosts, steps = int(host_R.max()) + 1, limits.max_steps
    sizes = limits.num_slots, limits.num_experts, limits.num_light, steps
    _check(sizes[2] <= _MAX_LIGHT)
    _check(min(sizes) >= 0 and sizes[0] <= num_slots and sizes[1] <= num_experts and sizes[2] <= num_ranks)
    width = num_slots // num_ranks
    dims = _ints([num_layers, num_ranks, width, num_experts, num_hosts if num_hosts > 1 else 0, *sizes])
    result = SearchResult(
        np.zeros(num_layers, np.int64),
        np.full((num_layers, steps, 4), -1, np.int64),
        np.zeros((num_layers, steps + 1), np.int64),
        np.zeros((num_layers, steps + 1)),
        np.zeros((num_layers, steps + 1)),
    )
    failed, price = np.zeros(1, np.int64), np.array([limits.coverage_price])
    given = (
        np.ascontiguousarray(load_LE, np.float64), np.array(held_LP, np.int64, order="C"), _ints(host_R),
        np.ascontiguousarray(exists_P, np.uint8), price, _ints(most_L),
    )  # fmt: skip
    made = result.num_moves_L, result.cost_LN, result.largest_LN, result.deficit_LN, result.changed_LN4
    _search()(*(array.ctypes.data for array in (dims, *given, *made, failed)))
    if failed[0]:
        raise MemoryError("no memory to search placements in")
    return result


def pack(
    expert_LN: IntArray, share_LN: FloatArray, num_local_R: IntArray, host_R: IntArray, placement_LRS: IntArray
) -> None:
    """Fills ``placement_LRS``, which is contiguous and holds -1 everywhere."""
    num_layers, num_ranks, width = placement_LRS.shape
    _check(expert_LN.shape == share_LN.shape and len(expert_LN) == num_layers and placement_LRS.flags.c_contiguous)
    _check(len(num_local_R) == len(host_R) == num_ranks and num_local_R.max() <= width)
    dims = _ints([num_layers, expert_LN.shape[1], num_ranks, width, len(set(host_R.tolist())) > 1])
    shares = np.ascontiguousarray(share_LN, np.float64)
    given = dims, _ints(expert_LN), shares, _ints(num_local_R), _ints(host_R)
    _pack()(*(array.ctypes.data for array in (*given, placement_LRS)))


def replica_counts(
    load_LE: FloatArray, counts_LE: IntArray, num_more: int, max_copies: int, share_limit: float, coverage_first: bool
) -> None:
    """Adds ``num_more`` copies to each layer of ``counts_LE``, which is contiguous and at least 1 everywhere."""
    _check(load_LE.shape == counts_LE.shape and counts_LE.flags.c_contiguous and counts_LE.dtype == np.int64)
    dims = _ints([*load_LE.shape, max(0, num_more), max_copies, coverage_first])
    given = dims, np.ascontiguousarray(load_LE, np.float64), np.array([share_limit]), counts_LE
    _replica_counts()(*(array.ctypes.data for array in given))


def _ints(values: npt.ArrayLike) -> IntArray:
    return np.ascontiguousarray(values, np.int64)


def _check(holds: bool | np.bool_) -> None:
    if not holds:
        raise ValueError("shapes, experts or limits of a placement do not fit together")


@cache
def _search() -> KernelFunction:
    return kernel_function("regrow_placement_search", *[POINTER] * 13)


@cache
def _replica_counts() -> KernelFunction:
    return kernel_function("regrow_replica_counts", *[POINTER] * 4)


@cache
def _pack() -> KernelFunction:
    return kernel_function("regrow_pack", *[POINTER] * 6)
