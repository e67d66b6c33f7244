"""A model so small that its tokens can be told by hand, and so sensitive that any lost or wrong row changes them.

The next token is a function of the whole context, read from the KV cache position by position, and of one row from
each of two experts per layer. All arithmetic is on small whole numbers, exact in float32 and in every order. An expert
slot that was never loaded, a combine row that is stale, a KV block that two requests share: each gives another token.

Legend: T tokens, S rows that want a token, H hidden, L layers, B blocks, P rows of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from common.model.experts import ExpertLayout
from common.model.model import Batch
from kernels.cpu.experts import ExpertTable

NUM_EXPERTS, TOP_K, HIDDEN = 8, 2, 4
VOCAB, MAX_POSITIONS = 97, 96
STOP_ID = 3
_PRIME = 4093
_POWERS = np.array([pow(31, n, _PRIME) for n in range(MAX_POSITIONS + 1)], dtype=np.int64)
_LAYOUT = ExpertLayout(HIDDEN, 1)


def _expert(value: int, layer: int, expert: int) -> int:
    weight = layer * NUM_EXPERTS + expert + 1
    return (value * (weight + 2) + 13 * weight) % _PRIME


def _choose(value: int) -> tuple[int, int]:
    first = value % NUM_EXPERTS
    return first, (first + 1 + value // NUM_EXPERTS % (NUM_EXPERTS - 1)) % NUM_EXPERTS


def next_token(context: tuple[int, ...], num_layers: int) -> int:
    """What an undisturbed model says."""
    value = sum(int(power) * (token + 1) for power, token in zip(_POWERS, context, strict=False)) % _PRIME
    for layer in range(num_layers):
        first, second = _choose(value)
        value = (value + _expert(value, layer, first) + 2 * _expert(value, layer, second)) % _PRIME
    return value % VOCAB


def whole_output(prompt: tuple[int, ...], max_tokens: int, num_layers: int) -> tuple[tuple[int, ...], str]:
    """What a client must get, and why it ends."""
    context = prompt
    while len(context) - len(prompt) < max_tokens:
        context += (next_token(context, num_layers),)
        if context[-1] == STOP_ID:
            return context[len(prompt) :], "stop"
    return context[len(prompt) :], "length"


@dataclass
class SymbolicCheckpoint:
    """In place of `common.model.checkpoint.Checkpoint`."""

    config: Any
    expert_layout: ExpertLayout = _LAYOUT

    @classmethod
    def of(cls, num_layers: int) -> "SymbolicCheckpoint":
        return cls(
            SimpleNamespace(
                n_routed_experts=NUM_EXPERTS,
                num_moe_layers=num_layers,
                moe_layers=tuple(range(num_layers)),
                num_experts_per_tok=TOP_K,
                hidden_size=HIDDEN,
                first_k_dense_replace=0,
                num_hidden_layers=1,
                kv_lora_rank=1,
                qk_rope_head_dim=0,
                kv_row_size=1,
                vocab_size=VOCAB,
                max_position_embeddings=MAX_POSITIONS,
            )
        )

    def read_expert(self, layer: int, expert: int, out_row: torch.Tensor) -> None:
        out_row.fill_(layer * NUM_EXPERTS + expert + 1)


def expert_rows(x_SH: torch.Tensor, row_R: torch.Tensor, expert_R: torch.Tensor, table: ExpertTable) -> torch.Tensor:
    """In place of `kernels.cpu.experts.expert_rows`: the weight is read from the expert slot."""
    rows_RH = np.zeros((len(expert_R), HIDDEN), dtype=np.float32)
    values = x_SH.numpy()[row_R.numpy(), 0].tolist() if len(expert_R) else []
    weights: dict[int, int] = {}
    for row, (value, local) in enumerate(zip(values, expert_R.tolist(), strict=True)):
        if local not in weights:
            packed_F = table.row(local)
            assert packed_F is not None, f"slot {local} holds no expert"
            weights[local] = int(packed_F[0])
        rows_RH[row, 0] = (int(value) * (weights[local] + 2) + 13 * weights[local]) % _PRIME
    return torch.from_numpy(rows_RH)


class LocalExperts:
    """The exchange of a prefill worker: all experts are here."""

    def __init__(self, checkpoint: SymbolicCheckpoint) -> None:
        self._checkpoint = checkpoint

    def run(self, layer: int, x_TH: torch.Tensor, topk_expert_TK: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        out_TH = torch.zeros_like(x_TH)
        for row, experts in enumerate(topk_expert_TK.tolist()):
            value = int(x_TH[row, 0])
            out_TH[row, 0] = _expert(value, layer, experts[0]) + 2 * _expert(value, layer, experts[1])
        return out_TH


class SymbolicModel:
    """In place of `common.model.model.Model`."""

    def __init__(self, checkpoint: SymbolicCheckpoint, exchange: Any, kv_cache_LBPC: torch.Tensor) -> None:
        self.config, self.kv_cache_LBPC = checkpoint.config, kv_cache_LBPC
        self._num_layers, self._exchange = checkpoint.config.num_moe_layers, exchange
        self._rows = kv_cache_LBPC.numpy()[0, :, :, 0]  # [B, P]

    def forward(self, batch: Batch, on_kv: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [S, VOCAB]; raises VoidRound as the exchange does."""
        block_size = self._rows.shape[1]
        for token, position, row in zip(
            batch.token_ids_T.tolist(), batch.position_T.tolist(), batch.request_index_T.tolist(), strict=True
        ):
            self._rows[batch.block_table_RW[row, position // block_size], position % block_size] = token + 1
        if on_kv:
            on_kv(0)
        values = [self._context_value(batch, int(t)) for t in batch.logit_index_S]
        for layer in range(self._num_layers):
            values = self._layer(layer, values)
        logits_SV = np.zeros((len(values), VOCAB), dtype=np.float32)
        for row, value in enumerate(values):
            logits_SV[row, value % VOCAB] = 9.0
        return torch.from_numpy(logits_SV)

    def _context_value(self, batch: Batch, t: int) -> int:
        num_positions = int(batch.position_T[t]) + 1
        context = self._rows[batch.block_table_RW[batch.request_index_T[t]]].reshape(-1)[:num_positions]
        return int(context.astype(np.int64) @ _POWERS[:num_positions]) % _PRIME

    def _layer(self, layer: int, values: list[int]) -> list[int]:
        x_TH = np.zeros((len(values), HIDDEN), dtype=np.float32)
        x_TH[:, 0] = values
        experts = np.array([_choose(value) for value in values], dtype=np.int64).reshape(-1, TOP_K)
        weights = np.tile(np.array([1.0, 2.0], dtype=np.float32), (len(values), 1))
        out_TH = self._exchange.run(layer, torch.from_numpy(x_TH), torch.from_numpy(experts), torch.from_numpy(weights))
        return [(value + int(out)) % _PRIME for value, out in zip(values, out_TH[:, 0].tolist(), strict=True)]
