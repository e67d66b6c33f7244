"""Grouped-query attention (arXiv:2305.13245): a token's cache row is [rotated keys | values] of all key heads.

Queries and keys are normed per head and then rotated (Qwen3, arXiv:2505.09388); the scale of the scores is merged into
the queries' norm. Each key head serves the N / G query heads that follow each other, as one product of fixed shape.

Legend: T tokens (padded to whole row blocks), H hidden, N heads, G key heads, D head size, C = 2 G D row floats,
A items, S keys of a block, P tokens of a part, F rows of the cache.
"""

import torch
from torch import Tensor

from common.model.architecture import GroupedAttentionShape
from common.model.checkpoint import Checkpoint
from common.model.paged_attention import KEY_BLOCK, AttentionPart, AttentionPlan, softmax_numerators
from common.model.rotary import pair_order
from common.model.row_blocks import RmsNorm, input_major, linear


class GroupedAttention:
    """One layer's attention. Rotary pairs are neighbours in the merged weights and in the cache."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        config, shape = checkpoint.config, checkpoint.config.attention
        assert isinstance(shape, GroupedAttentionShape)
        heads, key_heads, size = config.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self._num_heads, self._num_key_heads, self._head_size = heads, key_heads, size
        prefix = f"model.layers.{layer}.self_attn"
        pairs = pair_order(size, interleaved=False)

        def read(name: str, *sizes: int) -> Tensor:
            return checkpoint.tensor(f"{prefix}.{name}.weight", sizes)

        def read_heads(name: str, count: int) -> Tensor:
            return read(name, count * size, config.hidden_size).view(count, size, config.hidden_size)

        query, key = read_heads("q_proj", heads)[:, pairs], read_heads("k_proj", key_heads)[:, pairs]
        merged = torch.cat((query, key, read_heads("v_proj", key_heads)))
        self._query_key_value = input_major(merged.flatten(0, 1))
        query_norm, key_norm = read("q_norm", size)[pairs] * size**-0.5, read("k_norm", size)[pairs]
        norms = torch.cat((query_norm.expand(heads, size), key_norm.expand(key_heads, size)))
        self._norm = RmsNorm(norms, config.rms_norm_eps)
        self._output = input_major(read("o_proj", config.hidden_size, heads * size))

    def run(self, x_TH: Tensor, turn_T1h: Tensor, plan: AttentionPlan, cache_FC: Tensor) -> Tensor:
        """Writes the cache rows of the batch's tokens, then attends. x_TH and the result are padded to row blocks."""
        heads, key_heads, size = self._num_heads, self._num_key_heads, self._head_size
        rows = linear(x_TH, self._query_key_value).view(-1, heads + 2 * key_heads, size)
        turned = self._norm.run(rows[:, : heads + key_heads])
        torch.view_as_complex(turned.view(*turned.shape[:2], -1, 2)).mul_(turn_T1h)
        num_tokens = len(plan.cache_row_T)
        written = torch.cat((turned[:num_tokens, heads:], rows[:num_tokens, heads + key_heads :]), dim=1)
        cache_FC.index_copy_(0, plan.cache_row_T, written.flatten(1))
        attended = x_TH.new_zeros((x_TH.shape[0], heads * size))
        for part in plan.parts:
            attended[part.start : part.stop] = self._attend(turned[part.start : part.stop, :heads], part, cache_FC)
        return linear(attended, self._output)

    def _attend(self, query_PND: Tensor, part: AttentionPart, cache_FC: Tensor) -> Tensor:
        """Softmax attention of each token of a part over its request's rows: [P, N * D]."""
        num_tokens, heads, size = query_PND.shape
        key_heads, num_items = self._num_key_heads, len(part.token_A)
        # The cache as rows of one head each: 2 G to a token, first the keys, then the values.
        cache_head_rows = cache_FC.view(-1, size)
        first = part.key_row_AS.view(num_items, 1, KEY_BLOCK) * (2 * key_heads)
        key_row = (first + torch.arange(key_heads)[:, None]).view(-1)
        key = cache_head_rows.index_select(0, key_row).view(-1, KEY_BLOCK, size)
        value = cache_head_rows.index_select(0, key_row + key_heads).view(-1, KEY_BLOCK, size)

        query = query_PND.index_select(0, part.token_A).view(num_items * key_heads, -1, size)
        score_ANS = torch.bmm(query, key.transpose(1, 2)).view(num_items, heads, KEY_BLOCK)
        weight_ANS = softmax_numerators(score_ANS, part)
        weighted = torch.bmm(weight_ANS.view(num_items * key_heads, -1, KEY_BLOCK), value)
        sums_PND = query_PND.new_zeros((num_tokens, heads, size))
        sums_PND.index_add_(0, part.token_A, weighted.view(num_items, heads, size))
        total_PN = query_PND.new_zeros((num_tokens, heads))
        total_PN.index_add_(0, part.token_A, weight_ANS.sum(-1))
        return (sums_PND / total_PN[:, :, None]).view(num_tokens, heads * size)
