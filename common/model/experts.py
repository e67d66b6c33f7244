"""Routed experts: memory layout, the MLP of one expert's rows, the order of the weighted sum, and who computes them.

A layer gives its tokens to an `ExpertExchange`. In a decode rank that is the elastic dispatch / combine over the group;
in a prefill worker and in tests it is `LocalExperts`, with all experts in the process. Both compute rows with
`expert_rows` (blocks of 16 rows of one expert) and add them in the order of `combine_ordered`, so the result is the
same bits wherever an expert lives.

Legend: T tokens, H hidden, I expert intermediate, G = 2 I, K experts per token, R rows, P expert slots, F row floats.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.model.row_blocks import ROW_BLOCK, silu

if TYPE_CHECKING:
    from common.model.checkpoint import Checkpoint

_ALIGN_FLOATS = 16  # 64 bytes


class VoidRound(Exception):
    """The round's results must be thrown away: an exchange did not complete. KV beyond the committed length is void."""


class ExpertExchange(Protocol):
    """Computes the routed experts of one layer for this rank's tokens."""

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        """Returns out_TH = sum over k, in order, of weight[t, k] * expert_mlp(x[t], expert[t, k]).

        x_TH fp32, topk_expert_TK int64 logical experts, topk_weight_TK fp32; all contiguous; T may be 0, and then the
        call still takes part in the round. `layer` counts all layers. Raises VoidRound; nothing else is retried.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Views into one packed row: gate and up side by side, input-major as the products want them."""

    gate_up_HG: Tensor
    down_IH: Tensor


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """How one expert lies in memory: `row_size` floats = gate_up [H, 2 I], then down [I, H], padded to 64 bytes."""

    hidden_size: int
    intermediate_size: int

    @property
    def row_size(self) -> int:
        return -(-3 * self.hidden_size * self.intermediate_size // _ALIGN_FLOATS) * _ALIGN_FLOATS

    @property
    def row_bytes(self) -> int:
        return 4 * self.row_size

    def views(self, row_F: Tensor) -> ExpertWeights:
        """The weights in a packed row (fp32 [row_size], contiguous, 64-byte aligned); no copy."""
        hidden, inter = self.hidden_size, self.intermediate_size
        split = 2 * hidden * inter
        return ExpertWeights(
            row_F[:split].view(hidden, 2 * inter),
            row_F[split : split + hidden * inter].view(inter, hidden),
        )

    def pack(self, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor, out_row: Tensor) -> None:
        """Writes a checkpoint's three matrices (fp32 or bf16) into out_row in the computing layout; padding is zero."""
        weights = self.views(out_row)
        weights.gate_up_HG[:, : self.intermediate_size] = gate_IH.t()
        weights.gate_up_HG[:, self.intermediate_size :] = up_IH.t()
        weights.down_IH.copy_(down_HI.t())
        out_row[3 * self.hidden_size * self.intermediate_size :] = 0.0


def row_checksum(row_F: Tensor) -> int:
    """CRC-32 of the bytes of a packed expert row; finds torn and overwritten copies."""
    return zlib.crc32(row_F.numpy().tobytes())


def expert_mlp(x_RH: Tensor, weights: ExpertWeights) -> Tensor:
    """down(silu(gate(x)) * up(x)) of one expert for any number of rows."""
    num_rows = x_RH.shape[0]
    return expert_rows(x_RH, np.arange(num_rows), np.zeros(num_rows, dtype=np.int64), lambda _: weights)


def expert_rows(
    x_SH: Tensor,
    row_R: npt.NDArray[np.int64],
    expert_R: npt.NDArray[np.int64],
    weights_of: Callable[[int], ExpertWeights],
) -> Tensor:
    """x_SH[row_R[r]] through expert expert_R[r]: [R, H]; weights_of(expert) is called once per 16-row block.

    Rows of one expert share blocks of exactly 16 rows; a row's bits depend on itself and its expert only.
    """
    num_rows, hidden = len(row_R), x_SH.shape[1]
    if num_rows == 0:
        return x_SH.new_empty((0, hidden))
    order = np.argsort(expert_R, kind="stable")
    counts = np.bincount(expert_R)
    experts = np.flatnonzero(counts)
    counts = counts[experts]
    first = np.cumsum(counts) - counts
    blocks = -(-counts // ROW_BLOCK)
    block_start = np.cumsum(blocks) - blocks
    # Place of each row in the padded buffer: its expert's first block, then its rank among that expert's rows.
    place = np.empty(num_rows, dtype=np.int64)
    place[order] = np.arange(num_rows) + np.repeat(block_start * ROW_BLOCK - first, counts)
    # What is left of a block holds some row again: finite numbers that nobody reads.
    padded_row = np.full(int(blocks.sum()) * ROW_BLOCK, row_R[0])
    padded_row[place] = row_R
    x_padded = x_SH.index_select(0, torch.from_numpy(padded_row))
    weights = [weights_of(expert) for expert in np.repeat(experts, blocks).tolist()]
    gate_up = x_SH.new_empty((len(padded_row), weights[0].gate_up_HG.shape[1]))
    for x, out, weight in zip(_blocks(x_padded), _blocks(gate_up), weights, strict=True):
        torch.mm(x, weight.gate_up_HG, out=out)
    gate, up = gate_up.chunk(2, dim=1)
    inner = silu(gate).mul_(up)
    for x, out, weight in zip(_blocks(inner), _blocks(x_padded), weights, strict=True):
        torch.mm(x, weight.down_IH, out=out)
    return x_padded.index_select(0, torch.from_numpy(place))


def _blocks(x_RK: Tensor) -> tuple[Tensor, ...]:
    return x_RK.view(-1, ROW_BLOCK, x_RK.shape[1]).unbind(0)


def combine_ordered(rows_TKH: Tensor, topk_weight_TK: Tensor) -> Tensor:
    """Sum over k, in order, of weight[t, k] * row[t, k], from zero; each product rounded before it is added."""
    out_TH = rows_TKH.new_zeros((rows_TKH.shape[0], rows_TKH.shape[2]))
    for k in range(rows_TKH.shape[1]):
        out_TH += rows_TKH[:, k] * topk_weight_TK[:, k, None]
    return out_TH


class LocalExperts:
    """All experts of all layers in this process: the exchange of a prefill worker and of tests."""

    def __init__(self, checkpoint: "Checkpoint") -> None:
        config, layout = checkpoint.config, checkpoint.expert_layout
        self._weights: dict[int, list[ExpertWeights]] = {}
        for layer in config.moe_layers:
            rows_PF = torch.empty((config.n_routed_experts, layout.row_size))
            for expert in range(config.n_routed_experts):
                checkpoint.read_expert(layer, expert, rows_PF[expert])
            self._weights[layer] = [layout.views(row) for row in rows_PF]

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        num_tokens, top_k = topk_expert_TK.shape
        token_R = np.repeat(np.arange(num_tokens), top_k)
        rows_RH = expert_rows(x_TH, token_R, topk_expert_TK.numpy().reshape(-1), self._weights[layer].__getitem__)
        return combine_ordered(rows_RH.view(num_tokens, top_k, -1), topk_weight_TK)
