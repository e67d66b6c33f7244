"""Multi-head latent attention: the cache keeps per token one row [latent | rotated key] (arXiv:2405.04434).

Queries are taken into the latent space and outputs come from it ("absorbed" form), so keys and values are the cached
rows themselves and all heads read the same row; weights are merged once at load, in fp64.

Legend: T tokens (padded to whole row blocks), H hidden, N heads, M = N + 1 (queries, then the cache row), D latent,
C = latent + rope, A items, S keys of a block, P tokens of a part, F rows of the cache.
"""

import torch
from torch import Tensor

from common.model.architecture import LatentAttentionShape
from common.model.checkpoint import Checkpoint
from common.model.paged_attention import KEY_BLOCK, AttentionPart, AttentionPlan, softmax_numerators
from common.model.rotary import pair_order
from common.model.row_blocks import RmsNorm, input_major, linear

# The published models norm the latents with this, whatever rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6


class LatentAttention:
    """One layer's attention. Weights are merged for the absorbed form and stored input-major."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        config, shape = checkpoint.config, checkpoint.config.attention
        assert isinstance(shape, LatentAttentionShape)
        self._shape, self._num_heads = shape, config.num_attention_heads
        prefix = f"model.layers.{layer}.self_attn"
        heads, latent, rope = config.num_attention_heads, shape.kv_lora_rank, shape.qk_rope_head_dim
        nope, value, hidden = shape.qk_nope_head_dim, shape.v_head_dim, config.hidden_size

        def read(name: str, *shape: int) -> Tensor:
            return checkpoint.tensor(f"{prefix}.{name}.weight", shape)

        query_input = shape.q_lora_rank or hidden
        query_name = "q_proj" if shape.q_lora_rank is None else "q_b_proj"
        query = read(query_name, heads * (nope + rope), query_input).double().view(heads, nope + rope, query_input)
        kv_b = read("kv_b_proj", heads * (nope + value), latent).double().view(heads, nope + value, latent)
        kv_a = read("kv_a_proj_with_mqa", latent + rope, hidden).double()
        output = read("o_proj", hidden, heads * value).double().view(hidden, heads, value)
        pairs = pair_order(rope, shape.rope_interleave)
        score_factor = 1.0 if config.rope.yarn is None else config.rope.yarn.score_factor
        scale = score_factor * (nope + rope) ** -0.5
        latent_query = torch.einsum("hnd,hni->hdi", kv_b[:, :nope], query[:, :nope])
        merged = torch.cat((latent_query, query[:, nope:][:, pairs]), dim=1) * scale
        query_weight = merged.reshape(heads * (latent + rope), query_input)
        kv_weight = torch.cat((kv_a[:latent], kv_a[latent:][pairs]))
        self._kv_norm = RmsNorm(read("kv_a_layernorm", latent), _LATENT_NORM_EPS)
        if shape.q_lora_rank is None:
            self._first = input_major(torch.cat((query_weight, kv_weight)))
        else:
            query_a = read("q_a_proj", shape.q_lora_rank, hidden).double()
            self._first = input_major(torch.cat((query_a, kv_weight)))
            self._query_norm = RmsNorm(read("q_a_layernorm", shape.q_lora_rank), _LATENT_NORM_EPS)
            self._query_b = input_major(query_weight)
        merged_output = torch.einsum("xhv,hvd->xhd", output, kv_b[:, nope:])
        self._output = input_major(merged_output.reshape(hidden, heads * latent))

    def run(self, x_TH: Tensor, turn_T1h: Tensor, plan: AttentionPlan, cache_FC: Tensor) -> Tensor:
        """Writes the cache rows of the batch's tokens, then attends. x_TH and the result are padded to row blocks."""
        latent = self._shape.kv_lora_rank
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
        shape = self._shape
        first = linear(x_TH, self._first)
        if shape.q_lora_rank is not None:
            query_a, kv = first[:, : shape.q_lora_rank], first[:, shape.q_lora_rank :]
            first = torch.cat((linear(self._query_norm.run(query_a), self._query_b), kv), dim=1)
        return first.view(x_TH.shape[0], self._num_heads + 1, shape.kv_row_size)


def _attend(query_PNC: Tensor, part: AttentionPart, cache_FC: Tensor, latent: int) -> Tensor:
    """Softmax attention of each token of a part over its request's rows: [P, N * D]."""
    num_tokens, heads, width = query_PNC.shape
    num_items = len(part.token_A)
    query_ANC = query_PNC.index_select(0, part.token_A)
    key_ASC = cache_FC.index_select(0, part.key_row_AS).view(num_items, KEY_BLOCK, width)
    score_ANS = torch.bmm(query_ANC, key_ASC.transpose(1, 2))
    weight_ANS = softmax_numerators(score_ANS, part)
    # The latent is the value; a column of ones behind it makes the same product and sums yield the softmax's total.
    key_ASC[:, :, latent] = 1.0
    sums_PND = score_ANS.new_zeros((num_tokens, heads, latent + 1))
    sums_PND.index_add_(0, part.token_A, torch.bmm(weight_ANS, key_ASC[:, :, : latent + 1]))
    return (sums_PND[:, :, :latent] / sums_PND[:, :, latent:]).view(num_tokens, heads * latent)
