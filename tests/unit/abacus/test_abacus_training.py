"""The training code: what is learned, the wide expert MLP, the bound on loads, and that a step helps."""

from argparse import Namespace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F

from training.abacus.batches import BLOCKS, BlockShape, make_block
from training.abacus.model import AbacusConfig, AbacusModel, MoE, bound_loads
from training.abacus.tokenizer import ASSISTANT, BOS, END, PAD, USER
from training.abacus.train import Trainer, learning_rate, shrink

SMALL = shrink(BLOCKS, 64)


@pytest.mark.parametrize("shape", SMALL, ids=["arithmetic", "lists", "conversations"])
def test_exactly_the_answers_are_learned(shape: BlockShape) -> None:
    ids_BS, learned_BS = make_block(shape, Random(1))
    assert ids_BS.shape == learned_BS.shape == (shape.rows, shape.length)
    for ids, learned in zip(ids_BS.tolist(), learned_BS.tolist(), strict=True):
        assert ids[0] == BOS
        expected, in_answer = [], False
        for token in ids:
            expected.append(in_answer)
            in_answer = token == ASSISTANT or (in_answer and token != END)
        assert learned == expected
        assert ids.count(USER) == ids.count(ASSISTANT) >= 1
    assert (ids_BS[learned_BS] != PAD).all()


def test_equal_seeds_make_equal_batches() -> None:
    first, second = make_block(SMALL[1], Random("x")), make_block(SMALL[1], Random("x"))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_wide_expert_mlp_is_the_sum_of_the_chosen_experts() -> None:
    torch.manual_seed(0)
    config = AbacusConfig()
    moe = MoE(config)
    moe.correction_bias.normal_(std=0.5)
    x_TD = torch.randn(10, config.hidden_size)
    counted_T = torch.tensor([True] * 7 + [False] * 3)
    with torch.no_grad():
        out_TD, load_E = moe(x_TD, counted_T)
        expected_load_E = torch.zeros(config.n_routed_experts)
        for token, x_D in enumerate(x_TD):
            scores = torch.sigmoid(moe.router.weight @ x_D)
            chosen = (scores + moe.correction_bias).argsort(descending=True)[:4].tolist()
            expected_D = moe.shared_experts(x_D)
            for expert in chosen:
                rows = slice(32 * expert, 32 * expert + 32)
                gate, up = moe.experts.gate_proj.weight[rows] @ x_D, moe.experts.up_proj.weight[rows] @ x_D
                weight = 2.5 * scores[expert] / scores[chosen].sum()
                expected_D = expected_D + weight * (moe.experts.down_proj.weight[:, rows] @ (F.silu(gate) * up))
                expected_load_E[expert] += counted_T[token]
            torch.testing.assert_close(out_TD[token], expected_D)
    assert torch.equal(load_E, expected_load_E)


def test_only_loads_out_of_range_are_pushed_back() -> None:
    model = AbacusModel(AbacusConfig(num_hidden_layers=3, n_routed_experts=4, num_experts_per_tok=1))
    load_LE = torch.tensor([[100.0, 100.0, 100.0, 100.0], [4.0, 60.0, 36.0, 300.0]])
    bound_loads(model, load_LE, step_size=0.5, lowest=0.25, highest=2.0)
    first, second = model.moe_layers()
    assert first.correction_bias.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert second.correction_bias.tolist() == [0.5, 0.0, 0.0, -0.5]


def test_the_learning_rate_warms_up_and_ends_low() -> None:
    rates = [learning_rate(1.0, progress / 100) for progress in range(101)]
    assert rates[0] == 0.0 and max(rates) > 0.99 and rates[-1] == pytest.approx(0.01)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_a_few_steps_lower_the_loss(tmp_path: Path) -> None:
    args = Namespace(
        seed=0, device="cpu", init=None, out=tmp_path, learning_rate=3e-3, no_compile=True, rows_divisor=128, workers=0
    )
    trainer = Trainer(args)
    losses = [trainer.step(0.03) for _ in range(4)]
    assert trainer.num_steps == 4
    assert (losses[-1] < losses[0] - 0.3).all(), losses
