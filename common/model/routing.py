"""Which experts a token goes to, and with what weight.

Legend: T tokens, H hidden, E routed experts, K experts per token, G groups.
"""

import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from common.model.row_blocks import input_major, linear, sigmoid, softmax


class Router:
    """The gate of one layer (DeepSeek-V3, arXiv:2412.19437, section 2.1.2; DeepSeek-V2, arXiv:2405.04434, 2.2)."""

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        config = checkpoint.config
        self._routing, self._num_experts = config.routing, config.n_routed_experts
        self._top_k = config.num_experts_per_tok
        self._gate = input_major(checkpoint.tensor(f"{prefix}.weight", (config.n_routed_experts, config.hidden_size)))
        self._bias_E: Tensor | None = None
        if self._routing.scoring == "sigmoid":
            self._bias_E = checkpoint.tensor(f"{prefix}.e_score_correction_bias", (config.n_routed_experts,))

    def run(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """(logical experts int64, weights fp32), both [T, K], best first; x_TH padded to row blocks.

        The correction bias takes part in the choice, not in the weight. With groups, experts of the best ones stay.
        """
        routing = self._routing
        logits_TE = linear(x_TH, self._gate)
        score_TE = sigmoid(logits_TE) if routing.scoring == "sigmoid" else softmax(logits_TE)
        choice_TE = score_TE if self._bias_E is None else score_TE + self._bias_E
        if routing.n_group > 1:
            choice_TE = self._without_weak_groups(choice_TE)
        expert_TK = choice_TE.topk(self._top_k, dim=-1).indices
        weight_TK = score_TE.gather(1, expert_TK)
        if routing.norm_topk_prob:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).add_(1e-20)
        return expert_TK, weight_TK * routing.routed_scaling_factor

    def _without_weak_groups(self, choice_TE: Tensor) -> Tensor:
        routing = self._routing
        by_group = choice_TE.view(-1, routing.n_group, self._num_experts // routing.n_group)
        group_score_TG = by_group.topk(routing.num_scored_per_group, dim=-1).values.sum(-1)
        kept = group_score_TG.topk(routing.topk_group, dim=-1).indices
        dropped = torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(1, kept, False)
        return by_group.masked_fill(dropped[:, :, None], float("-inf")).view_as(choice_TE)
