"""How the expert MLP is cut into blocks and programs: chosen by measurement on an H100 (docs/kernels.md).

A plan depends on the sizes of the model only, never on the batch: so it never changes the bits of a row.

Legend: H hidden_size, I intermediate_size.
"""

from dataclasses import dataclass

ROW_BLOCK = 64  # entries of one product: the rows of a warp group's matrix instruction
_MOST_INPUTS = 128
_INPUTS_IN_STAGES = 384
_MOST_STAGES = 6
_AHEAD = 128


@dataclass(frozen=True, slots=True)
class ProductPlan:
    """One product over ragged rows: ``block`` weight rows by ``block_k`` inputs at a time, ``num_stages`` of them in
    flight, ``programs_per_processor`` of such programs on each processor. ``tma``: weights come by tensor copies."""

    block: int
    block_k: int
    num_stages: int
    programs_per_processor: int = 2
    num_warps: int = 4
    tma: bool = False


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """``overlap``: kernels start while the one before still runs. ``ahead``: elements of each weight row of a program's
    first tile that the down product then fetches into the cache."""

    gate_up: ProductPlan
    down: ProductPlan
    overlap: bool
    ahead: int = 0


def plan_experts(hidden_size: int, intermediate_size: int, *, on_gpu: bool) -> ExpertPlan:
    """ValueError for sizes that cannot be cut into blocks."""
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size % 16:
            raise ValueError(f"{name} must be a multiple of 16, got {size}")
    gate_up = _product(intermediate_size, 32, hidden_size, on_gpu)
    down = _product(hidden_size, 64, intermediate_size, on_gpu)
    return ExpertPlan(gate_up, down, on_gpu, _AHEAD if on_gpu and intermediate_size >= _AHEAD else 0)


def _product(num_rows: int, most_rows: int, num_inputs: int, on_gpu: bool) -> ProductPlan:
    block_k = _divisor(num_inputs, _MOST_INPUTS)
    return ProductPlan(
        _divisor(num_rows, most_rows), block_k, min(_MOST_STAGES, _INPUTS_IN_STAGES // block_k), tma=on_gpu
    )


def _divisor(size: int, most: int) -> int:
    """The largest power of two that divides ``size``, at most ``most``."""
    return min(size & -size, most)
