"""The trainable model: DeepSeek-V3's architecture, written for speed at this size.

All routed experts of a layer are computed for every token, as one wide MLP whose hidden columns are scaled by the
routing weights (zero for experts not chosen). With experts this narrow that is faster than gathering tokens, and it
is the same function. `checkpoint.py` translates the parameters to Hugging Face names.

    B batch  S sequence  T = B * S tokens  D hidden  H heads  L MoE layers  E routed experts  K experts per token
    I hidden columns of one expert  V vocabulary  R rope head dim  P = R / 2 rotated pairs  C compressed KV
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AbacusConfig:
    """Sizes, under the names of Hugging Face's DeepseekV3Config."""

    vocab_size: int = 262
    hidden_size: int = 128
    intermediate_size: int = 384
    moe_intermediate_size: int = 32
    num_hidden_layers: int = 5
    first_k_dense_replace: int = 1
    num_attention_heads: int = 8
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 16
    v_head_dim: int = 16
    n_routed_experts: int = 32
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 1024


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


def rotate_pairs(x_BHSR: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs (2i, 2i + 1), as DeepSeek-V3 has it (`rope_interleave`)."""
    pairs = x_BHSR.float().reshape(*x_BHSR.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = torch.stack((even * cos_SP - odd * sin_SP, even * sin_SP + odd * cos_SP), dim=-1)
    return rotated.flatten(-2).to(x_BHSR.dtype)


class Attention(nn.Module):
    """Multi-head latent attention, uncompressed for training."""

    def __init__(self, config: AbacusConfig) -> None:
        super().__init__()
        c, heads = config, config.num_attention_heads
        self.config = config
        self.q_proj = nn.Linear(c.hidden_size, heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        c, heads = self.config, self.config.num_attention_heads
        q_BHS = self.q_proj(x_BSD).unflatten(-1, (heads, -1)).transpose(1, 2)
        q_nope, q_rope = q_BHS.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        latent_BSC, k_rope = self.kv_a_proj_with_mqa(x_BSD).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        kv_BHS = self.kv_b_proj(self.kv_a_layernorm(latent_BSC)).unflatten(-1, (heads, -1)).transpose(1, 2)
        k_nope, v = kv_BHS.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        q = torch.cat((q_nope, rotate_pairs(q_rope, cos_SP, sin_SP)), dim=-1)
        k_rope = rotate_pairs(k_rope.unsqueeze(1), cos_SP, sin_SP).expand(-1, heads, -1, -1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        # Rows are padded at the end only, so the causal mask is all that answers need.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(-2))
        return projected


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))
        return out


class MoE(nn.Module):
    """Sigmoid routing with a correction bias that is no parameter: the trainer moves it to bound the loads."""

    correction_bias: Tensor

    def __init__(self, config: AbacusConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        self.router = nn.Linear(c.hidden_size, c.n_routed_experts, bias=False)
        self.register_buffer("correction_bias", torch.zeros(c.n_routed_experts))
        self.experts = GatedMLP(c.hidden_size, c.n_routed_experts * c.moe_intermediate_size)
        self.shared_experts = GatedMLP(c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)

    def forward(self, x_TD: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor]:
        """(output [T, D], load [E]: how many of the counted tokens chose each expert)."""
        c = self.config
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.float(), self.router.weight).sigmoid()
        chosen_TK = (scores_TE + self.correction_bias).topk(c.num_experts_per_tok, dim=-1).indices
        is_chosen_TE = torch.zeros_like(scores_TE).scatter(1, chosen_TK, 1.0)
        weights_TE = scores_TE * is_chosen_TE
        weights_TE = weights_TE / weights_TE.sum(-1, keepdim=True) * c.routed_scaling_factor
        e = self.experts
        hidden_TEI = (F.silu(e.gate_proj(x_TD)) * e.up_proj(x_TD)).unflatten(-1, (c.n_routed_experts, -1))
        scaled_TEI = hidden_TEI * weights_TE.to(hidden_TEI.dtype).unsqueeze(-1)
        load_E = (is_chosen_TE * counted_T.unsqueeze(-1)).sum(0)
        return e.down_proj(scaled_TEI.flatten(-2)) + self.shared_experts(x_TD), load_E


class Layer(nn.Module):
    def __init__(self, config: AbacusConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_dense = index < config.first_k_dense_replace
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if is_dense else MoE(config)

    def forward(self, x_BSD: Tensor, cos_SP: Tensor, sin_SP: Tensor, counted_T: Tensor) -> tuple[Tensor, Tensor | None]:
        """(output [B, S, D], load [E] or None for a dense layer)."""
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SP, sin_SP)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if not isinstance(self.mlp, MoE):
            return x_BSD + self.mlp(normed_BSD), None
        out_TD, load_E = self.mlp(normed_BSD.flatten(0, 1), counted_T)
        return x_BSD + out_TD.view_as(x_BSD), load_E


class AbacusModel(nn.Module):
    def __init__(self, config: AbacusConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = "o_proj" in name or "down_proj" in name
                std = 0.06 / math.sqrt(2 * config.num_hidden_layers) if into_residual else 0.06
                nn.init.normal_(parameter, std=std)

    def moe_layers(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(self, ids_BS: Tensor, counted_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [B, S, V], load [L, E] over the counted positions)."""
        c = self.config
        rope_dim = c.qk_rope_head_dim
        powers = torch.arange(0, rope_dim, 2, dtype=torch.float32, device=ids_BS.device) / rope_dim
        positions = torch.arange(ids_BS.shape[1], dtype=torch.float32, device=ids_BS.device)
        angles_SP = positions.unsqueeze(-1) * c.rope_theta**-powers
        cos_SP, sin_SP = angles_SP.cos(), angles_SP.sin()
        x_BSD, loads = self.embed_tokens(ids_BS), []
        for layer in self.layers:
            x_BSD, load_E = layer(x_BSD, cos_SP, sin_SP, counted_BS.flatten().float())
            if load_E is not None:
                loads.append(load_E)
        return self.lm_head(self.norm(x_BSD)), torch.stack(loads)


def bound_loads(model: AbacusModel, load_LE: Tensor, step_size: float, lowest: float, highest: float) -> None:
    """Moves the correction biases of experts whose load left [lowest, highest] times the mean.

    DeepSeek-V3 (section 2.1.2) moves every bias towards an equal load. Here most experts are left alone on purpose:
    each is used, and the loads stay as uneven as the tasks make them.
    """
    share_LE = load_LE / load_LE.mean(dim=-1, keepdim=True)
    change_LE = step_size * ((share_LE < lowest).float() - (share_LE > highest).float())
    for moe, change_E in zip(model.moe_layers(), change_LE, strict=True):
        moe.correction_bias += change_E
