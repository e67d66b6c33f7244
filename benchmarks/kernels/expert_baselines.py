"""The same expert MLP by torch's own means: a loop of matrix products, and ``torch._grouped_mm``.

Both are given on the host, for nothing, what our kernels find on the device: which experts have rows, and which.

Legend: N entries, H hidden_size, I intermediate_size, E local experts.
"""

from collections.abc import Callable

import torch

from benchmarks.kernels.expert_rig import MAX_TOKENS, ExpertSet


def _indices(rig: ExpertSet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows to read, rows to write, expert of each entry, sorted by expert."""
    source, row, k, expert = rig.entries().T
    read_N = source * MAX_TOKENS + row
    return read_N, read_N * rig.shape.top_k + k, expert


def matmul_loop(rig: ExpertSet) -> Callable[[], None]:
    read_N, write_N, expert_N = _indices(rig)
    active = sorted(set(expert_N.tolist()))
    parts = [(expert, read_N[expert_N == expert], write_N[expert_N == expert]) for expert in active]
    x_SH = rig.group.row_x_WMH.reshape(-1, rig.shape.hidden_size)  # a copy, not timed
    out = rig.rows_WMKH.view(-1, rig.shape.hidden_size)

    def run() -> None:
        for expert, read, write in parts:
            gate_up = x_SH[read] @ rig.gate_up[expert].view(-1, rig.shape.hidden_size).T
            gate, up = gate_up.chunk(2, -1)
            out.index_copy_(0, write, (torch.nn.functional.silu(gate) * up) @ rig.down[expert].T)

    return run


def grouped_mm(rig: ExpertSet) -> Callable[[], None] | None:
    """None where this torch has no such function."""
    multiply = getattr(torch, "_grouped_mm", None)
    if multiply is None:
        return None
    read_N, write_N, expert_N = _indices(rig)
    shape = rig.shape
    ends_E = torch.bincount(expert_N, minlength=shape.num_local).cumsum(0).int()
    x_SH = rig.group.row_x_WMH.reshape(-1, shape.hidden_size)
    out = rig.rows_WMKH.view(-1, shape.hidden_size)
    gate_up_EHJ = rig.gate_up.view(shape.num_local, -1, shape.hidden_size).mT
    down_EIH = rig.down.mT

    def run() -> None:
        gate, up = multiply(x_SH[read_N], gate_up_EHJ, offs=ends_E).chunk(2, -1)
        out.index_copy_(0, write_N, multiply(torch.nn.functional.silu(gate) * up, down_EIH, offs=ends_E))

    return run
