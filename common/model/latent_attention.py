"""Multi-head latent attention: the cache keeps per token one row [latent | rotated key] (arXiv:2405.04434).

Queries are taken into the latent space and outputs come from it ("absorbed" form), so keys and values are the cached
rows themselves and all heads read the same row; weights are merged once at load, in fp64.
"""

import torch
from torch import Tensor

from common.model.architecture import LatentAttentionShape
from common.model.checkpoint import Checkpoint
from common.model.rotary import pair_order
from kernels.cpu.attention import AttentionKernel, AttentionShape, AttentionWeights
from kernels.cpu.linear import PackedWeight
from kernels.cpu.mlp import Norm

# The published models norm the latents with this, whatever rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6


def latent_attention(checkpoint: Checkpoint, layer: int, norm: Norm) -> AttentionKernel:
    """One layer's attention, behind ``norm``. Weights are merged for the absorbed form."""
    config, shape = checkpoint.config, checkpoint.config.attention
    assert isinstance(shape, LatentAttentionShape)
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
    merged_output = torch.einsum("xhv,hvd->xhd", output, kv_b[:, nope:])
    query_a = query_a_norm = None
    if shape.q_lora_rank is not None:
        query_a = PackedWeight(read("q_a_proj", shape.q_lora_rank, hidden))
        query_a_norm = read("q_a_layernorm", shape.q_lora_rank)
    weights = AttentionWeights(
        norm=norm.weight_H,
        eps=norm.eps,
        key_value=PackedWeight(torch.cat((kv_a[:latent], kv_a[latent:][pairs]))),
        query=PackedWeight(merged.reshape(heads * (latent + rope), query_input)),
        output=PackedWeight(merged_output.reshape(hidden, heads * latent)),
        key_norm=read("kv_a_layernorm", latent),
        inner_eps=_LATENT_NORM_EPS,
        query_a=query_a,
        query_a_norm=query_a_norm,
    )
    sizes = AttentionShape(
        num_heads=heads, num_key_heads=1, key_size=latent + rope, value_size=latent, value_at=0, num_pairs=rope // 2
    )
    return AttentionKernel(sizes, weights)
