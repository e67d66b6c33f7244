"""Grouped-query attention (arXiv:2305.13245): a token's cache row is [rotated keys | values] of all key heads.

Queries and keys are normed per head and then rotated (Qwen3, arXiv:2505.09388); the scale of the scores is merged into
the queries' norm. Each key head serves the query heads that follow each other.
"""

import torch
from torch import Tensor

from common.model.architecture import GroupedAttentionShape
from common.model.checkpoint import Checkpoint
from common.model.rotary import pair_order
from kernels.cpu.attention import AttentionKernel, AttentionShape, AttentionWeights
from kernels.cpu.linear import PackedWeight
from kernels.cpu.mlp import Norm


def grouped_attention(checkpoint: Checkpoint, layer: int, norm: Norm) -> AttentionKernel:
    """One layer's attention, behind ``norm``. Rotary pairs are neighbours in the weights and in the cache."""
    config, shape = checkpoint.config, checkpoint.config.attention
    assert isinstance(shape, GroupedAttentionShape)
    heads, key_heads, size = config.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    prefix = f"model.layers.{layer}.self_attn"
    pairs = pair_order(size, interleaved=False)

    def read(name: str, *sizes: int) -> Tensor:
        return checkpoint.tensor(f"{prefix}.{name}.weight", sizes)

    def read_heads(name: str, count: int) -> Tensor:
        return read(name, count * size, config.hidden_size).view(count, size, config.hidden_size)

    key_value = torch.cat((read_heads("k_proj", key_heads)[:, pairs], read_heads("v_proj", key_heads)))
    weights = AttentionWeights(
        norm=norm.weight_H,
        eps=norm.eps,
        key_value=PackedWeight(key_value.flatten(0, 1)),
        query=PackedWeight(read_heads("q_proj", heads)[:, pairs].flatten(0, 1)),
        output=PackedWeight(read("o_proj", config.hidden_size, heads * size)),
        key_norm=read("k_norm", size)[pairs].contiguous(),
        inner_eps=config.rms_norm_eps,
        query_norm=(read("q_norm", size)[pairs] * size**-0.5).contiguous(),
    )
    sizes = AttentionShape(
        num_heads=heads,
        num_key_heads=key_heads,
        key_size=size,
        value_size=size,
        value_at=key_heads * size,
        num_pairs=size // 2,
    )
    return AttentionKernel(sizes, weights)
