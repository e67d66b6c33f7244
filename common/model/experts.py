"""Routed experts: memory layout, the MLP of one expert's rows, the order of the weighted sum, and who computes them.

A layer gives its tokens to an `ExpertExchange`. In a decode rank that is the elastic dispatch / combine over the group;
in a prefill worker and in tests it is `LocalExperts`, with all experts in the process. Both compute rows with
`expert_rows` and add them in the order of `combine_ordered` (kernels/cpu/experts.py), so the result is the same bits
wherever an expert lives.

Legend: T tokens, H hidden, I expert intermediate, G = 2 I, K experts per token, F row floats.
"""

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels.cpu.batch import CheckedBatch
from kernels.cpu.experts import ExpertTable, combine_ordered, expert_rows
from kernels.cpu.forward import CompiledModel

if TYPE_CHECKING:
    from common.model.checkpoint import Checkpoint

_ALIGN_FLOATS = 16  # 64 bytes


class VoidRound(Exception):
    """The round's results must be thrown away: an exchange did not complete. KV beyond the committed length is void."""


class ExpertExchange(Protocol):
    """Computes the routed experts of one layer for this rank's tokens."""

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        """Returns out_TH = sum over k, in order, of weight[t, k] * expert[t, k](x[t]).

        x_TH fp32, topk_expert_TK int64 logical experts, topk_weight_TK fp32; all contiguous; T may be 0, and then the
        call still takes part in the round. `layer` counts all layers. Raises VoidRound; nothing else is retried.
        """
        ...


@runtime_checkable
class PassExchange(ExpertExchange, Protocol):
    """One that can also compute all layers at once."""

    def run_pass(self, model: CompiledModel, batch: CheckedBatch) -> Tensor | None:
        """The whole forward pass, with the same bits: logits fp32 [S, V]. None: layer by layer this time. Raises
        VoidRound."""
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

    def table(self, num_slots: int) -> ExpertTable:
        return ExpertTable(self.hidden_size, self.intermediate_size, num_slots)

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


class LocalExperts:
    """All experts of all layers in this process: the exchange of a prefill worker and of tests."""

    def __init__(self, checkpoint: "Checkpoint") -> None:
        config, layout = checkpoint.config, checkpoint.expert_layout
        self._tables: dict[int, ExpertTable] = {}
        for layer in config.moe_layers:
            rows_PF = torch.empty((config.n_routed_experts, layout.row_size))
            self._tables[layer] = layout.table(config.n_routed_experts)
            for expert in range(config.n_routed_experts):
                checkpoint.read_expert(layer, expert, rows_PF[expert])
                self._tables[layer].put(expert, rows_PF[expert])

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        num_tokens, top_k = topk_expert_TK.shape
        token_R = torch.arange(num_tokens).repeat_interleave(top_k)
        rows_RH = expert_rows(x_TH, token_R, topk_expert_TK.view(-1), self._tables[layer])
        return combine_ordered(rows_RH.view(num_tokens, top_k, -1), topk_weight_TK)
