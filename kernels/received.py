"""What a dispatch left in the own heap, laid out for the expert MLP.

Legend: W max_ranks, M max_tokens, H hidden_size, S = W * M row slots of the heap, N (row, k) entries for the experts
held here, R rows with at least one of them.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.fp8 import dequantise
from kernels.heap_layout import EpShape
from kernels.heap_window import FloatArray, Int32Array


@dataclass(frozen=True, slots=True)
class Received:
    """Entries are ordered by (source slot, row, k), the same on every run. Valid until the next dispatch of any
    member, that is until this rank's own ``combine``.

    ``x_SH`` is a view of the heap, not a copy (but what came in float8 is made float32); the input of entry n is
    ``x_SH[row_N[n]]``. Only rows named in ``row_N`` mean anything.
    """

    step: int
    num_rows_W: tuple[int, ...]
    x_SH: torch.Tensor  # float32
    row_N: torch.Tensor  # int64, index into x_SH: source * M + row
    source_N: torch.Tensor  # int64, slot of the token's owner
    token_N: torch.Tensor  # int64, the token's index at its owner
    k_N: torch.Tensor  # int64, which of the token's top-k
    local_expert_N: torch.Tensor  # int64, local physical expert
    weight_N: torch.Tensor  # float32

    @property
    def num_entries(self) -> int:
        return len(self.row_N)

    def x_NH(self) -> torch.Tensor:
        """Inputs of all entries, gathered: float32 [N, H], a copy."""
        return self.x_SH.index_select(0, self.row_N)


def read_received(
    words_SC: Int32Array,
    x_SH: torch.Tensor | None,
    ep: EpShape,
    rank: int,
    step: int,
    num_rows_W: tuple[int, ...],
) -> Received:
    """Pick the entries meant for ``rank`` out of the rows (int32 words) that have arrived. ``x_SH``: `x_of_rows`, None
    when they came in float8."""
    num_slots_per_rank, top_k = ep.max_tokens, ep.top_k
    slots = [
        np.arange(source * num_slots_per_rank, source * num_slots_per_rank + num_rows)
        for source, num_rows in enumerate(num_rows_W)
        if num_rows
    ]
    slot_R = np.concatenate(slots) if slots else np.empty(0, np.int64)
    header = words_SC[slot_R, : 1 + 2 * top_k]
    code_RK = header[:, 1 : 1 + top_k]
    row_R, k_N = np.nonzero(code_RK >> 16 == rank)
    slot_N = slot_R[row_R]
    return Received(
        step=step,
        num_rows_W=num_rows_W,
        x_SH=_dequantised(words_SC, ep, slot_R) if x_SH is None else x_SH,
        row_N=torch.from_numpy(slot_N),
        source_N=torch.from_numpy(slot_N // num_slots_per_rank),
        token_N=torch.from_numpy(header[row_R, 0].astype(np.int64)),
        k_N=torch.from_numpy(k_N),
        local_expert_N=torch.from_numpy((code_RK[row_R, k_N] & 0xFFFF).astype(np.int64)),
        weight_N=torch.from_numpy(header[row_R, 1 + top_k + k_N].view(np.float32)),
    )


def x_of_rows(words_SC: Int32Array, ep: EpShape) -> torch.Tensor:
    """The inputs in all row slots, float32 [S, H], a view."""
    return torch.from_numpy(words_SC)[:, ep.row_header_words :][:, : ep.hidden_size].view(torch.float32)


def _dequantised(words_SC: Int32Array, ep: EpShape, slot_R: npt.NDArray[np.int64]) -> torch.Tensor:
    row_R = torch.from_numpy(words_SC[slot_R])
    q_RH = row_R.view(torch.float8_e4m3fn)[:, 4 * ep.row_header_words :][:, : ep.hidden_size]
    scale_RG = row_R[:, ep.scale_word :][:, : ep.num_scales].view(torch.float32)
    x_SH = torch.zeros(len(words_SC), ep.hidden_size)
    x_SH[torch.from_numpy(slot_R)] = dequantise(q_RH, scale_RG)
    return x_SH


def sum_of_each_row(
    expert_rows_NH: torch.Tensor, received: Received, top_k: int
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """What a rank returns for each token that it received, when it adds up its own experts' rows first.

    The first entry of each row, and ((0 + w * row) + w' * row') + ... in top-k order, rounded to float32 after each
    step: float32 [R, H].
    """
    _, first_R, row_N = np.unique(received.row_N.numpy(), return_index=True, return_inverse=True)
    product_NH = (expert_rows_NH * received.weight_N[:, None]).numpy()
    total_RH: FloatArray = np.zeros((len(first_R), expert_rows_NH.shape[1]), np.float32)
    for k in range(top_k):
        chosen_N = received.k_N.numpy() == k
        total_RH[row_N[chosen_N]] += product_NH[chosen_N]
    return first_R, total_RH
