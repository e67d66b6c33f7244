"""Multi-head latent attention over a paged cache; the same code, and the same bits, in prefill and decode.

The cache keeps per token one row [latent | rotated key] (DeepSeek-V2, arXiv:2405.04434). Queries are taken into the
latent space and outputs come from it ("absorbed" form), so keys and values are the cached rows themselves and all
heads read the same row; weights are merged once at load, in fp64.

Work is cut into items: (token, key block), a key block being KEY_BLOCK positions from a multiple of KEY_BLOCK on. All
products of an item have one fixed shape. The maximum over a token's scores is taken over all its blocks first (exact in
any order); then sums run inside a block in a fixed order, and block after block, starting from zero. So a token's
bits depend on the request's own rows up to its position, and on nothing else: not on chunking, on the batch, or on
where blocks lie.

Legend: T tokens (padded to whole row blocks), H hidden, N heads, M = N + 1 (queries, then the cache row), D latent,
C = latent + rope, A items, S keys of a block, P tokens of a part, R requests, W block table width, F rows of the cache.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from common.model.config import ModelConfig
from common.model.kv_cache import Int64Array
from common.model.row_blocks import RmsNorm, linear

# The published models norm the latents with this, whatever rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6
KEY_BLOCK = 64
# Items computed at a time; bounds the memory of their gathered keys.
_PART_ITEMS = 64


@dataclass(frozen=True, slots=True)
class AttentionPart:
    """Tokens start..stop-1 and their items."""

    start: int
    stop: int
    token_A: Tensor  # counted from start, rising
    key_row_AS: Tensor  # flat [A * S]: cache row of each key
    seen_A1S: Tensor  # 1.0 where the token sees the key, else 0.0


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of one forward pass share. Built from the batch by `plan_attention`."""

    cache_row_T: Tensor  # where each token's own row is written; not padded
    parts: tuple[AttentionPart, ...]


def plan_attention(
    position_T: Int64Array, request_T: Int64Array, block_table_RW: Int64Array, block_size: int
) -> AttentionPlan:
    """Items and indices of a batch; arrays are those of `model.Batch`, T > 0 and not padded."""
    blocks_T = position_T // KEY_BLOCK + 1
    ends_T = np.cumsum(blocks_T)
    token_A = np.repeat(np.arange(len(position_T)), blocks_T)
    block_A = np.arange(len(token_A)) - (ends_T - blocks_T)[token_A]
    key_AS = block_A[:, None] * KEY_BLOCK + np.arange(KEY_BLOCK)
    seen_AS = key_AS <= position_T[token_A][:, None]
    # Places past the token read the request's first row, which every token sees: it does not raise the maximum, and it
    # is finite, where zero times whatever lies in unused memory could be NaN.
    read_AS = np.where(seen_AS, key_AS, 0)
    request_A1 = request_T[token_A][:, None]
    key_row_AS = torch.from_numpy(block_table_RW[request_A1, read_AS // block_size] * block_size + read_AS % block_size)
    seen_A1S = torch.from_numpy(seen_AS.astype(np.float32)[:, None])

    part_T = (ends_T - 1) // _PART_ITEMS
    starts = np.flatnonzero(np.diff(part_T, prepend=-1)).tolist()
    parts = []
    for start, stop in zip(starts, [*starts[1:], len(position_T)], strict=True):
        items = slice(int(ends_T[start] - blocks_T[start]), int(ends_T[stop - 1]))
        token_A_of_part = torch.from_numpy(token_A[items] - start)
        parts.append(AttentionPart(start, stop, token_A_of_part, key_row_AS[items].reshape(-1), seen_A1S[items]))
    cache_row_T = block_table_RW[request_T, position_T // block_size] * block_size + position_T % block_size
    return AttentionPlan(torch.from_numpy(cache_row_T), tuple(parts))


class RotaryTable:
    """cos + i sin of every position's angles, [max_position_embeddings, rope / 2], complex64."""

    def __init__(self, config: ModelConfig) -> None:
        dim = config.qk_rope_head_dim
        frequency = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        angle = torch.arange(config.max_position_embeddings, dtype=torch.float)[:, None] * frequency
        self._turn = torch.complex(angle.cos(), angle.sin())

    def at(self, position_T: Tensor) -> Tensor:
        """[T, 1, rope / 2], to multiply pairs of rotary dimensions with."""
        return self._turn.index_select(0, position_T)[:, None]


class Attention:
    """One layer's attention. Weights are merged for the absorbed form and stored input-major."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        config = checkpoint.config
        self._config = config
        prefix = f"model.layers.{layer}.self_attn"
        heads, latent, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        nope, value, hidden = config.qk_nope_head_dim, config.v_head_dim, config.hidden_size

        def read(name: str, *shape: int) -> Tensor:
            return checkpoint.tensor(f"{prefix}.{name}.weight", shape)

        query_input = config.q_lora_rank or hidden
        query_name = "q_proj" if config.q_lora_rank is None else "q_b_proj"
        query = read(query_name, heads * (nope + rope), query_input).double().view(heads, nope + rope, query_input)
        kv_b = read("kv_b_proj", heads * (nope + value), latent).double().view(heads, nope + value, latent)
        kv_a = read("kv_a_proj_with_mqa", latent + rope, hidden).double()
        output = read("o_proj", hidden, heads * value).double().view(hidden, heads, value)
        pairs = _pair_order(rope, config.rope_interleave)
        latent_query = torch.einsum("hnd,hni->hdi", kv_b[:, :nope], query[:, :nope])
        merged = torch.cat((latent_query, query[:, nope:][:, pairs]), dim=1) * (nope + rope) ** -0.5
        query_weight = merged.reshape(heads * (latent + rope), query_input)
        kv_weight = torch.cat((kv_a[:latent], kv_a[latent:][pairs]))
        self._kv_norm = RmsNorm(read("kv_a_layernorm", latent), _LATENT_NORM_EPS)
        if config.q_lora_rank is None:
            self._first = _input_major(torch.cat((query_weight, kv_weight)))
        else:
            query_a = read("q_a_proj", config.q_lora_rank, hidden).double()
            self._first = _input_major(torch.cat((query_a, kv_weight)))
            self._query_norm = RmsNorm(read("q_a_layernorm", config.q_lora_rank), _LATENT_NORM_EPS)
            self._query_b = _input_major(query_weight)
        merged_output = torch.einsum("xhv,hvd->xhd", output, kv_b[:, nope:])
        self._output = _input_major(merged_output.reshape(hidden, heads * latent))

    def run(self, x_TH: Tensor, turn_T1h: Tensor, plan: AttentionPlan, cache_FC: Tensor) -> Tensor:
        """Writes the cache rows of the batch's tokens, then attends. x_TH and the result are padded to row blocks."""
        latent = self._config.kv_lora_rank
        rows_TMC = self._project(x_TH)
        pairs_TMh2 = rows_TMC[:, :, latent:].view(*rows_TMC.shape[:2], -1, 2)
        torch.view_as_complex(pairs_TMh2).mul_(turn_T1h)
        kv_TC = rows_TMC[: len(plan.cache_row_T), -1]
        kv_TC[:, :latent] = self._kv_norm.run(kv_TC[:, :latent])
        cache_FC.index_copy_(0, plan.cache_row_T, kv_TC)
        attended = x_TH.new_zeros((x_TH.shape[0], (rows_TMC.shape[1] - 1) * latent))
        for part in plan.parts:
            attended[part.start : part.stop] = _attend(rows_TMC[part.start : part.stop, :-1], part, cache_FC, latent)
        return linear(attended, self._output)

    def _project(self, x_TH: Tensor) -> Tensor:
        """[T, N + 1, C]: the queries of all heads, then the token's cache row, not yet normed and rotated."""
        config = self._config
        first = linear(x_TH, self._first)
        if config.q_lora_rank is not None:
            query_a, kv = first[:, : config.q_lora_rank], first[:, config.q_lora_rank :]
            first = torch.cat((linear(self._query_norm.run(query_a), self._query_b), kv), dim=1)
        return first.view(x_TH.shape[0], config.num_attention_heads + 1, config.kv_row_size)


def _attend(query_PNC: Tensor, part: AttentionPart, cache_FC: Tensor, latent: int) -> Tensor:
    """Softmax attention of each token of a part over its request's rows: [P, N * D]."""
    num_tokens, heads, width = query_PNC.shape
    num_items = len(part.token_A)
    query_ANC = query_PNC.index_select(0, part.token_A)
    key_ASC = cache_FC.index_select(0, part.key_row_AS).view(num_items, KEY_BLOCK, width)
    score_ANS = torch.bmm(query_ANC, key_ASC.transpose(1, 2))
    top_PN = score_ANS.new_full((num_tokens, heads), float("-inf"))
    top_PN.scatter_reduce_(0, part.token_A[:, None].expand(num_items, heads), score_ANS.amax(-1), "amax")
    score_ANS.sub_(top_PN.index_select(0, part.token_A)[:, :, None])
    # exp is ten times slower where it underflows, so nothing is left below e^-80; what is masked becomes exactly zero.
    weight_ANS = score_ANS.clamp_(min=-80.0).exp_().mul_(part.seen_A1S)
    # The latent is the value; a column of ones behind it makes the same product and sums yield the softmax's total.
    key_ASC[:, :, latent] = 1.0
    sums_PND = score_ANS.new_zeros((num_tokens, heads, latent + 1))
    sums_PND.index_add_(0, part.token_A, torch.bmm(weight_ANS, key_ASC[:, :, : latent + 1]))
    return (sums_PND[:, :, :latent] / sums_PND[:, :, latent:]).view(num_tokens, heads * latent)


def _pair_order(rope: int, interleaved: bool) -> Tensor:
    """Rows of the rotary part reordered so that the two of a pair are neighbours."""
    order = torch.arange(rope)
    return order if interleaved else order.view(2, -1).t().reshape(-1)


def _input_major(weight_NK: Tensor) -> Tensor:
    return weight_NK.t().to(torch.float32).contiguous()
