"""Rows through routed experts, all experts of a call at once, and the ordered sum of what they gave.

Legend: S row slots of the input, R rows, H hidden, I expert intermediate, P expert slots, F floats of a packed expert,
T tokens, K experts per token.
"""

from functools import cache

import torch
from torch import Tensor

from kernels.cpu.library import POINTER, SIZE, CountingFunction, KernelFunction, counting_function, kernel_function


class ExpertTable:
    """Where the packed weights of P experts lie: gate and up side by side [H, 2 I], then down [I, H], fp32.

    A slot may be empty. The table keeps what lies in its slots alive.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_slots: int) -> None:
        self.hidden_size, self.intermediate_size, self.num_slots = hidden_size, intermediate_size, num_slots
        self._rows: list[Tensor | None] = [None] * num_slots
        self._addresses_P = torch.zeros(num_slots, dtype=torch.int64)
        self.pointer = self._addresses_P.data_ptr()

    def put(self, slot: int, row_F: Tensor | None) -> None:
        """None: nothing lies there. Raises ValueError for memory that does not hold an expert."""
        if row_F is not None:
            size = 3 * self.hidden_size * self.intermediate_size
            if row_F.dtype != torch.float32 or not row_F.is_contiguous() or row_F.numel() < size:
                raise ValueError(f"an expert is {size} floats in one piece, got {row_F.dtype} {list(row_F.shape)}")
        self._rows[slot] = row_F
        self._addresses_P[slot] = 0 if row_F is None else row_F.data_ptr()

    def row(self, slot: int) -> Tensor | None:
        return self._rows[slot]


def expert_rows(x_SH: Tensor, row_R: Tensor, expert_R: Tensor, table: ExpertTable) -> Tensor:
    """down(silu(gate x) * up x) of x_SH[row_R[r]] through the expert in slot expert_R[r]: fp32 [R, H].

    x_SH fp32, its rows may lie apart; row_R and expert_R int64. A row's bits depend on itself and its expert only.
    Raises ValueError, having computed nothing, when a row or an expert is not there.
    """
    num_rows, hidden = len(row_R), table.hidden_size
    if x_SH.dtype != torch.float32 or x_SH.shape[1] != hidden or x_SH.stride(1) != 1:
        raise ValueError(f"rows must be fp32 [slots, {hidden}], got {x_SH.dtype} {list(x_SH.shape)}")
    for index in (row_R, expert_R):
        if index.dtype != torch.int64 or index.shape != (num_rows,) or not index.is_contiguous():
            raise ValueError(f"indices must be int64 [{num_rows}], got {index.dtype} {list(index.shape)}")
    out_RH = torch.empty(num_rows, hidden)
    num_wrong = _expert_rows()(
        x_SH.data_ptr(),
        x_SH.stride(0),
        x_SH.shape[0],
        row_R.data_ptr(),
        expert_R.data_ptr(),
        num_rows,
        table.pointer,
        table.num_slots,
        hidden,
        table.intermediate_size,
        out_RH.data_ptr(),
    )
    if num_wrong:
        raise ValueError(f"{num_wrong} of {num_rows} rows name a row or an expert that is not there")
    return out_RH


def combine_ordered(rows_TKH: Tensor, topk_weight_TK: Tensor) -> Tensor:
    """Sum over k, in order, of weight[t, k] * row[t, k], from zero; each product rounded before it is added."""
    num_tokens, top_k, hidden = rows_TKH.shape
    for tensor, shape in ((rows_TKH, rows_TKH.shape), (topk_weight_TK, (num_tokens, top_k))):
        if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"rows and weights must be fp32 [T, K, H] and [T, K], got {list(tensor.shape)}")
    out_TH = torch.empty(num_tokens, hidden)
    weights = topk_weight_TK.data_ptr()
    _combine_ordered()(rows_TKH.data_ptr(), weights, num_tokens, top_k, hidden, out_TH.data_ptr())
    return out_TH


@cache
def _expert_rows() -> CountingFunction:
    rows = (POINTER, SIZE, SIZE, POINTER, POINTER, SIZE)
    return counting_function("regrow_expert_rows", *rows, POINTER, SIZE, SIZE, SIZE, POINTER)


@cache
def _combine_ordered() -> KernelFunction:
    return kernel_function("regrow_combine_ordered", POINTER, POINTER, SIZE, SIZE, SIZE, POINTER)
