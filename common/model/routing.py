"""Which experts a token goes to, and with what weight: a layer's gate (DeepSeek-V3, arXiv:2412.19437, section 2.1.2;
DeepSeek-V2, arXiv:2405.04434, 2.2) and its shared experts.
"""

import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from kernels.cpu.linear import PackedWeight
from kernels.cpu.mlp import Choice, MlpWeights, MoeKernel, Norm


def routing(checkpoint: Checkpoint, layer: int, norm: Norm) -> MoeKernel:
    """Behind ``norm``. The correction bias takes part in the choice, not in the weight."""
    config, routing = checkpoint.config, checkpoint.config.routing
    prefix = f"model.layers.{layer}.mlp"
    num_experts = config.n_routed_experts
    gate = checkpoint.tensor(f"{prefix}.gate.weight", (num_experts, config.hidden_size))
    bias_E: Tensor | None = None
    if routing.scoring == "sigmoid":
        bias_E = checkpoint.tensor(f"{prefix}.gate.e_score_correction_bias", (num_experts,))
    choice = Choice(
        top_k=config.num_experts_per_tok,
        is_sigmoid=routing.scoring == "sigmoid",
        is_normalised=routing.norm_topk_prob,
        scaling=routing.routed_scaling_factor,
        bias_E=bias_E,
        num_groups=routing.n_group,
        num_kept_groups=routing.topk_group,
        num_scored=routing.num_scored_per_group,
    )
    shared = None
    if config.n_shared_experts:
        inner_size = config.moe_intermediate_size * config.n_shared_experts
        shared = mlp_weights(checkpoint, f"{prefix}.shared_experts", inner_size)
    return MoeKernel(norm, PackedWeight(gate), choice, shared)


def mlp_weights(checkpoint: Checkpoint, prefix: str, inner_size: int) -> MlpWeights:
    """A dense layer's MLP, or the shared experts', which are one."""
    hidden = checkpoint.config.hidden_size
    gate = checkpoint.tensor(f"{prefix}.gate_proj.weight", (inner_size, hidden))
    up = checkpoint.tensor(f"{prefix}.up_proj.weight", (inner_size, hidden))
    down = checkpoint.tensor(f"{prefix}.down_proj.weight", (hidden, inner_size))
    return MlpWeights(PackedWeight(torch.cat((gate, up))), PackedWeight(down))
