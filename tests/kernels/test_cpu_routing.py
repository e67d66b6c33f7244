"""Compiled routing against its meaning, and its ties.

Legend: T tokens, E routed experts, K experts per token, G groups, H hidden.
"""

import pytest
import torch
from torch import Tensor

from kernels.cpu.linear import PackedWeight
from kernels.cpu.mlp import Choice, MlpWeights, MoeKernel, Norm, add_experts

HIDDEN, NUM_EXPERTS = 24, 20


def plain_choice(logits_TE: Tensor, choice: Choice) -> tuple[list[list[int]], Tensor]:
    """What routing means, in float64; ties go to the lower expert."""
    score_TE = logits_TE.sigmoid() if choice.is_sigmoid else logits_TE.softmax(-1)
    chosen_TE = score_TE if choice.bias_E is None else score_TE + choice.bias_E
    experts = []
    for chosen_E in chosen_TE.tolist():
        size = len(chosen_E) // choice.num_groups
        groups = [chosen_E[start : start + size] for start in range(0, len(chosen_E), size)]
        quality = [sum(sorted(group, reverse=True)[: choice.num_scored]) for group in groups]
        kept = sorted(range(len(groups)), key=lambda g: (-quality[g], g))[: choice.num_kept_groups]
        allowed = [e for e in range(len(chosen_E)) if e // size in kept]
        experts.append(sorted(allowed, key=lambda e: (-chosen_E[e], e))[: choice.top_k])
    weight_TK = score_TE.gather(1, torch.tensor(experts))
    if choice.is_normalised:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return experts, weight_TK * choice.scaling


@pytest.mark.parametrize(
    "choice",
    [
        Choice(4, True, True, 2.5, torch.randn(NUM_EXPERTS, generator=torch.Generator().manual_seed(1)) * 0.1),
        Choice(3, True, False, 1.0, torch.zeros(NUM_EXPERTS), num_groups=4, num_kept_groups=2, num_scored=2),
        Choice(5, False, True, 1.0),
        Choice(4, False, False, 16.0, num_groups=5, num_kept_groups=3),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_experts_and_weights(choice: Choice, num_tokens: int) -> None:
    torch.manual_seed(num_tokens)
    gate, x = torch.randn(NUM_EXPERTS, HIDDEN), torch.randn(num_tokens, HIDDEN)
    norm = Norm(torch.rand(HIDDEN) + 0.5, 1e-6)
    shared = MlpWeights(PackedWeight(torch.randn(2 * 9, HIDDEN)), PackedWeight(torch.randn(HIDDEN, 9)))
    before = x.clone()
    routed = MoeKernel(norm, PackedWeight(gate), choice, shared).route(x)
    assert torch.equal(x, before)

    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight_H
    assert torch.allclose(routed.normed_TH.double(), normed, atol=1e-5)
    experts, weight_TK = plain_choice(normed @ gate.double().T, choice)
    assert routed.expert_TK.tolist() == experts
    assert torch.allclose(routed.weight_TK.double(), weight_TK, rtol=1e-4, atol=1e-6)
    assert routed.shared_TH is not None
    x_after = x.clone()
    add_experts(x_after, routed.shared_TH, routed.normed_TH)
    assert torch.equal(x_after, x + (routed.shared_TH + routed.normed_TH))


@pytest.mark.parametrize("is_sigmoid", [True, False])
def test_equal_scores_go_to_the_lower_expert(is_sigmoid: bool) -> None:
    gate = torch.zeros(NUM_EXPERTS, HIDDEN)
    gate[[7, 3, 15]] = 1.0
    kernel = MoeKernel(Norm(torch.ones(HIDDEN), 1e-6), PackedWeight(gate), Choice(6, is_sigmoid, True, 1.0), None)
    routed = kernel.route(torch.ones(2, HIDDEN))
    assert routed.expert_TK.tolist() == [[3, 7, 15, 0, 1, 2]] * 2
    assert routed.shared_TH is None


def test_what_is_not_a_number_still_names_experts() -> None:
    """A spoiled row must not make anybody read outside its memory."""
    choice = Choice(4, True, True, 1.0, torch.zeros(NUM_EXPERTS), num_groups=4, num_kept_groups=2, num_scored=2)
    kernel = MoeKernel(Norm(torch.ones(HIDDEN), 1e-6), PackedWeight(torch.ones(NUM_EXPERTS, HIDDEN)), choice, None)
    routed = kernel.route(torch.full((1, HIDDEN), float("nan")))
    assert sorted(set(routed.expert_TK[0].tolist())) == [0, 1, 2, 3]
    assert bool(routed.weight_TK.isnan().all())
