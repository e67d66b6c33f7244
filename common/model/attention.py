"""Multi-head latent attention over a paged cache; the same code, and the same bits, in prefill and decode.

The cache keeps per token one row [latent | rotated key] (DeepSeek-V2, arXiv:2405.04434). Queries are taken into the
latent space and outputs come from it ("absorbed" form), so keys and values are the cached rows themselves and all
heads read the same row; weights are merged once at load, in fp64.

Work is cut into items: (query tile, key block). A tile holds up to QUERY_TILE tokens of one request, a key block
KEY_BLOCK positions from a multiple of KEY_BLOCK on. All products of an item have one fixed shape. The maximum over a
row's scores is taken over all its blocks first (exact in any order); then sums run inside a block in a fixed order, and
block after block, starting from zero. So a row's bits depend on the request's own rows up to its position, and on
nothing else: not on chunking, on the batch, or on where blocks lie.

Legend: T tokens (padded to whole row blocks), H hidden, N heads, M = N + 1 (queries, then the cache row), D latent,
C = latent + rope, Q query tile, U tiles, A items, S keys of a block, R requests in block tables and rows of a tile
(Q * N) in scores, W block table width, F rows of the cache.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from common.model.config import ModelConfig
from common.model.kv_cache import Int64Array
from common.model.row_blocks import linear, rms_norm

KEY_BLOCK = 64
QUERY_TILE = 2


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of one forward pass share. Built from the batch by `plan_attention`."""

    num_tokens: int
    num_tiles: int
    cache_row_T: Tensor  # where each token's own row is written
    tile_row_T: Tensor  # tile * Q + place in the tile
    tile_A: Tensor
    key_row_AS: Tensor  # flat [A * S]: cache row of each key
    masked_AQ1S: Tensor  # True where the query must not see the key


def plan_attention(
    position_T: Int64Array, request_T: Int64Array, block_table_RW: Int64Array, block_size: int
) -> AttentionPlan:
    """Tiles, items and indices of a batch; arrays are those of `model.Batch`, T > 0 and not padded."""
    num_tokens = len(position_T)
    token = np.arange(num_tokens)
    starts = np.flatnonzero(np.diff(request_T, prepend=-1) != 0)
    run_offset = token - np.repeat(starts, np.diff(starts, append=num_tokens))
    tile_T = np.cumsum(run_offset % QUERY_TILE == 0) - 1
    tile_row_T = tile_T * QUERY_TILE + run_offset % QUERY_TILE
    first_of_tile = np.flatnonzero(run_offset % QUERY_TILE == 0)
    last_U = np.maximum.reduceat(position_T, first_of_tile)
    request_U = request_T[first_of_tile]
    num_tiles = len(last_U)

    blocks_U = last_U // KEY_BLOCK + 1
    tile_A = np.repeat(np.arange(num_tiles), blocks_U)
    block_A = np.arange(len(tile_A)) - np.repeat(np.cumsum(blocks_U) - blocks_U, blocks_U)
    key_AS = block_A[:, None] * KEY_BLOCK + np.arange(KEY_BLOCK)
    # Places past the tile's last position read the request's first row: finite, and the request's own. Masked scores
    # make it count as zero, but zero times whatever lies in unused memory could be NaN.
    read_AS = np.where(key_AS <= last_U[tile_A][:, None], key_AS, 0)
    request_A = request_U[tile_A][:, None]
    key_row_AS = block_table_RW[request_A, read_AS // block_size] * block_size + read_AS % block_size

    # Unused places of a tile see all keys: their rows are dropped, and a row without any key would be NaN.
    query_position = np.repeat(last_U, QUERY_TILE)
    query_position[tile_row_T] = position_T
    masked_AQS = key_AS[:, None, :] > query_position.reshape(num_tiles, QUERY_TILE)[tile_A][:, :, None]
    cache_row_T = block_table_RW[request_T, position_T // block_size] * block_size + position_T % block_size
    return AttentionPlan(
        num_tokens=num_tokens,
        num_tiles=num_tiles,
        cache_row_T=torch.from_numpy(cache_row_T),
        tile_row_T=torch.from_numpy(tile_row_T),
        tile_A=torch.from_numpy(tile_A),
        key_row_AS=torch.from_numpy(key_row_AS.reshape(-1)),
        masked_AQ1S=torch.from_numpy(masked_AQS[:, :, None, :]),
    )


class RotaryTable:
    """cos and sin of every position, [max_position_embeddings, rope / 2]."""

    def __init__(self, config: ModelConfig) -> None:
        dim = config.qk_rope_head_dim
        frequency = 1.0 / (config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        angle = torch.arange(config.max_position_embeddings, dtype=torch.float)[:, None] * frequency
        self._cos, self._sin = angle.cos(), angle.sin()

    def at(self, position_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, 1, rope / 2]."""
        return self._cos.index_select(0, position_T)[:, None], self._sin.index_select(0, position_T)[:, None]


def _rotate(x_TMr: Tensor, cos_T1h: Tensor, sin_T1h: Tensor) -> None:
    """Rotates pairs (i, i + rope / 2) in place; weights are permuted at load so that pairs lie like this."""
    half = x_TMr.shape[-1] // 2
    first, second = x_TMr[..., :half], x_TMr[..., half:]
    rotated_first = first * cos_T1h - second * sin_T1h
    second.copy_(second * cos_T1h + first * sin_T1h)
    first.copy_(rotated_first)


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
        self._kv_norm = read("kv_a_layernorm", latent)
        if config.q_lora_rank is None:
            self._first = _input_major(torch.cat((query_weight, kv_weight)))
        else:
            query_a = read("q_a_proj", config.q_lora_rank, hidden).double()
            self._first = _input_major(torch.cat((query_a, kv_weight)))
            self._query_norm = read("q_a_layernorm", config.q_lora_rank)
            self._query_b = _input_major(query_weight)
        merged_output = torch.einsum("xhv,hvd->xhd", output, kv_b[:, nope:])
        self._output = _input_major(merged_output.reshape(hidden, heads * latent))

    def run(self, x_TH: Tensor, cos_sin: tuple[Tensor, Tensor], plan: AttentionPlan, cache_FC: Tensor) -> Tensor:
        """Writes the cache rows of the batch's tokens, then attends. x_TH and the result are padded to row blocks."""
        config = self._config
        latent = config.kv_lora_rank
        rows_TMC = self._project(x_TH)
        _rotate(rows_TMC[:, :, latent:], *cos_sin)
        kv_TC = rows_TMC[:, -1]
        kv_TC[:, :latent] = rms_norm(kv_TC[:, :latent], self._kv_norm, config.rms_norm_eps)
        cache_FC.index_copy_(0, plan.cache_row_T, kv_TC[: plan.num_tokens])
        attended = _attend(rows_TMC[: plan.num_tokens, :-1], plan, cache_FC, latent)
        out = x_TH.new_zeros((x_TH.shape[0], attended.shape[1]))
        out[: plan.num_tokens] = attended
        return linear(out, self._output)

    def _project(self, x_TH: Tensor) -> Tensor:
        """[T, N + 1, C]: the queries of all heads, then the token's cache row, not yet normed and rotated."""
        config = self._config
        first = linear(x_TH, self._first)
        if config.q_lora_rank is not None:
            query_a, kv = first[:, : config.q_lora_rank], first[:, config.q_lora_rank :]
            query_a = rms_norm(query_a, self._query_norm, config.rms_norm_eps)
            first = torch.cat((linear(query_a, self._query_b), kv), dim=1)
        return first.view(x_TH.shape[0], config.num_attention_heads + 1, config.kv_row_size)


def _attend(query_TNC: Tensor, plan: AttentionPlan, cache_FC: Tensor, latent: int) -> Tensor:
    """Softmax attention of each token over its request's rows: [T, N * D]."""
    num_tokens, heads, width = query_TNC.shape
    num_items, rows = len(plan.tile_A), QUERY_TILE * heads
    query = query_TNC.new_zeros((plan.num_tiles * QUERY_TILE, heads * width))
    query.index_copy_(0, plan.tile_row_T, query_TNC.reshape(num_tokens, heads * width))
    query_ARC = query.view(plan.num_tiles, rows, width).index_select(0, plan.tile_A)
    key_ASC = cache_FC.index_select(0, plan.key_row_AS).view(num_items, KEY_BLOCK, width)

    score_ARS = torch.bmm(query_ARC, key_ASC.transpose(1, 2))
    score_ARS.view(num_items, QUERY_TILE, heads, KEY_BLOCK).masked_fill_(plan.masked_AQ1S, float("-inf"))
    top_UR = score_ARS.new_full((plan.num_tiles, rows), float("-inf"))
    top_UR.scatter_reduce_(0, plan.tile_A[:, None].expand(num_items, rows), score_ARS.amax(-1), "amax")
    weight_ARS = score_ARS.sub_(top_UR.index_select(0, plan.tile_A)[:, :, None]).exp_()
    total_UR = torch.zeros_like(top_UR).index_add_(0, plan.tile_A, weight_ARS.sum(-1))
    value_URD = query.new_zeros((plan.num_tiles, rows, latent))
    value_URD.index_add_(0, plan.tile_A, torch.bmm(weight_ARS, key_ASC[:, :, :latent]))
    value_URD.div_(total_UR[:, :, None])
    return value_URD.view(-1, heads * latent).index_select(0, plan.tile_row_T)


def _pair_order(rope: int, interleaved: bool) -> Tensor:
    order = torch.arange(rope)
    return torch.cat((order[0::2], order[1::2])) if interleaved else order


def _input_major(weight_NK: Tensor) -> Tensor:
    return weight_NK.t().to(torch.float32).contiguous()
