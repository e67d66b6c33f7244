"""The tokens of a rank's last dispatch: the rows in which they go out, and how what comes back is added up.

Legend: W max_ranks, M max_tokens, T tokens of the last dispatch, K top_k, H hidden_size.
"""

import numpy as np
import numpy.typing as npt
import torch

from kernels.fp8 import quantise
from kernels.heap_layout import EpShape
from kernels.heap_window import FloatArray, Int32Array

DROPPED = -1  # by whoever routed the token
MASKED = -2  # lost to a rank that is masked without a view: renormalising makes up for it


class OwnTokens:
    """Row: token, K codes (rank << 16 | local expert, or DROPPED, MASKED), K weights, padding, x, scales of x."""

    def __init__(self, ep: EpShape) -> None:
        self._ep = ep
        self._outbox: Int32Array = np.zeros((ep.max_tokens, ep.row_bytes // 4), np.int32)
        self._outbox[:, 0] = np.arange(ep.max_tokens)
        self._place_MK = np.arange(ep.max_tokens * ep.top_k).reshape(ep.max_tokens, ep.top_k)
        self._rows: Int32Array = self._outbox[:0]

    def fill(
        self, x_TH: torch.Tensor, rank_TK: npt.NDArray[np.int64], local_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> Int32Array:
        """The rows, int32 [T, words]; valid until the next call."""
        self.note_filled(len(x_TH))
        ep, rows = self._ep, self._rows
        rows[:, 1 : 1 + ep.top_k] = np.where(rank_TK >= 0, rank_TK << 16 | local_TK.numpy(), rank_TK)
        rows[:, 1 + ep.top_k : 1 + 2 * ep.top_k] = weight_TK.numpy().view(np.int32)
        if ep.is_fp8:
            q_TH, scale_TG = quantise(x_TH)
            rows.view(np.uint8)[:, 4 * ep.row_header_words :][:, : ep.hidden_size] = q_TH.view(torch.uint8).numpy()
            rows[:, ep.scale_word : ep.scale_word + ep.num_scales] = scale_TG.numpy().view(np.int32)
        else:
            rows[:, ep.row_header_words :][:, : ep.hidden_size] = x_TH.numpy().view(np.int32)
        return rows

    @property
    def outbox(self) -> Int32Array:
        """All rows, filled or not: int32 [M, words]. For who fills their headers without `fill`, and then says so."""
        return self._outbox

    @property
    def num_tokens(self) -> int:
        return len(self._rows)

    def note_filled(self, num_tokens: int) -> None:
        self._rows = self._outbox[:num_tokens]

    def note_masked(self, masked_W: npt.NDArray[np.bool_]) -> None:
        """Ranks masked since these tokens went out send nothing back."""
        code_TK = self._rows[:, 1 : 1 + self._ep.top_k]
        code_TK[(code_TK >= 0) & masked_W[code_TK >> 16]] = MASKED

    def add_up(self, rows: FloatArray, renormalise: bool) -> FloatArray:
        """rows [W, M * K, H], one for each entry, in top-k order."""
        ep = self._ep
        rank_TK = self._rank_TK
        weight_TK = self._rows[:, 1 + ep.top_k : 1 + 2 * ep.top_k].view(np.float32)
        place_TK = self._place_MK[: len(rank_TK)] + rank_TK.astype(np.int64) * self._place_MK.size
        # A dropped entry (rank below 0) reads some row, whatever is in it, and is zeroed after the product.
        rows_TKH = rows.reshape(-1, ep.hidden_size).take(place_TK, axis=0, mode="clip")
        with np.errstate(all="ignore"):
            rows_TKH *= weight_TK[:, :, None]
            rows_TKH[rank_TK < 0] = 0
            out_TH: FloatArray = rows_TKH[:, 0] + np.float32(0)
            for k in range(1, ep.top_k):
                out_TH += rows_TKH[:, k]
        return self.renormalised(out_TH) if renormalise else out_TH

    def add_up_ranks(self, rows: FloatArray, renormalise: bool) -> FloatArray:
        """The first of a token's K rows of each rank is that rank's sum; these in order of ranks."""
        ep, rank_TK = self._ep, self._rank_TK
        out_TH: FloatArray = np.zeros((len(rank_TK), ep.hidden_size), np.float32)
        for rank in range(ep.max_ranks):
            held_T = (rank_TK == rank).any(axis=1)
            out_TH[held_T] += rows[rank, : len(rank_TK) * ep.top_k : ep.top_k][held_T]
        return self.renormalised(out_TH) if renormalise else out_TH

    @property
    def _rank_TK(self) -> Int32Array:
        return self._rows[:, 1 : 1 + self._ep.top_k] >> 16

    def renormalised(self, out_TH: FloatArray) -> FloatArray:
        ep = self._ep
        code_TK = self._rows[:, 1 : 1 + ep.top_k]
        weight_TK = self._rows[:, 1 + ep.top_k : 1 + 2 * ep.top_k].view(np.float32)
        total_T, kept_T = (np.zeros(len(code_TK), np.float32) for _ in range(2))
        for k in range(ep.top_k):
            total_T += np.where(code_TK[:, k] != DROPPED, weight_TK[:, k], np.float32(0))
            kept_T += np.where(code_TK[:, k] >= 0, weight_TK[:, k], np.float32(0))
        scale_T = np.divide(total_T, kept_T, out=np.ones_like(total_T), where=kept_T != 0)
        return out_TH * scale_T[:, None]
