"""The bits of a row's logits: the same alone, in any batch, in chunks, token by token, under any expert placement."""

import numpy as np
import pytest
import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from common.model.experts import LocalExperts
from common.model.model import Batch, Model
from common.model.row_blocks import ROW_BLOCK, linear, sigmoid, silu
from tests.unit.model.scattered_experts import ScatteredExperts
from tests.unit.model.tiny_models import TINY_RANDOM, feed, feed_together, open_model, token_by_token

VOCAB = 260
NUM_BLOCKS = 96


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(num_blocks=NUM_BLOCKS, block_size=16)


@pytest.mark.parametrize("seed", range(3))
def test_bits_depend_neither_on_the_batch_nor_on_chunks(model: Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (1, 16, 63, 64, 65, 130, 200)]
    alone = [token_by_token(model, ids) for ids in prompts]
    whole = [feed(model, [(ids, 0, list(range(20)))])[0] for ids in prompts]
    mixed = feed_together(model, rng, prompts, largest=50)
    stepwise = feed_together(model, rng, prompts, largest=1)
    for expected, *others in zip(alone, whole, mixed, stepwise, strict=True):
        for other in others:
            assert torch.equal(expected, other)


def test_a_decode_step_has_the_same_bits_at_every_batch_size_and_place(model: Model) -> None:
    rng = np.random.default_rng(7)
    prompt = rng.integers(0, VOCAB, 40).tolist()
    table = list(range(4))
    feed(model, [(prompt[:-1], 0, table)])
    expected = feed(model, [([prompt[-1]], 39, table)])[0]
    for num_others in (1, 7, 15, 16, 31, 40):
        others = [([int(rng.integers(VOCAB))], 0, [10 + i]) for i in range(num_others)]
        place = int(rng.integers(num_others + 1))
        work = [*others[:place], ([prompt[-1]], 39, table), *others[place:]]
        assert torch.equal(feed(model, work)[place], expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_bits_do_not_depend_on_where_experts_live(num_ranks: int) -> None:
    checkpoint = Checkpoint.open(TINY_RANDOM)
    ids = np.random.default_rng(5).integers(0, VOCAB, 90).tolist()
    expected = feed(open_model(exchange=LocalExperts(checkpoint)), [(ids, 0, list(range(6)))])[0]
    scattered = open_model(exchange=ScatteredExperts(checkpoint, num_ranks, seed=num_ranks))
    assert torch.equal(feed(scattered, [(ids, 0, list(range(6)))])[0], expected)
    assert torch.equal(token_by_token(scattered, ids), expected)


def test_a_lost_expert_row_changes_the_logits() -> None:
    checkpoint = Checkpoint.open(TINY_RANDOM)

    class OneRowLess(LocalExperts):
        def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
            weight_TK = topk_weight_TK.clone()
            weight_TK[-1, -1] = 0.0
            return super().run(layer, x_TH, topk_expert_TK, weight_TK)

    ids = list(range(30))
    whole = feed(open_model(), [(ids, 0, [0, 1])])[0]
    damaged = feed(open_model(exchange=OneRowLess(checkpoint)), [(ids, 0, [0, 1])])[0]
    assert torch.equal(whole[:-1], damaged[:-1])
    assert float((whole[-1] - damaged[-1]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("inner", "outer"), [(64, 260), (128, 416), (32, 128), (128, 64), (256, 128), (7, 33), (512, 96)]
)
def test_a_row_of_a_block_does_not_see_its_neighbours(inner: int, outer: int) -> None:
    torch.manual_seed(inner + outer)
    weight = torch.randn(inner, outer)
    rows = torch.randn(ROW_BLOCK, inner)
    expected = linear(rows, weight)
    for _ in range(50):
        block = torch.randn(4 * ROW_BLOCK, inner) * 10.0 ** float(torch.randint(-3, 4, ()))
        place = torch.randperm(4 * ROW_BLOCK)[:ROW_BLOCK]
        block[place] = rows
        assert torch.equal(linear(block, weight)[place], expected)


def test_activations_have_the_same_bits_at_every_place_and_length() -> None:
    torch.manual_seed(0)
    x = torch.randn(5000) * 8
    for activation in (sigmoid, silu, torch.exp):
        expected = activation(x)
        for start, size in [(0, 1), (3, 1), (1, 31), (5, 33), (7, 100), (17, 4097), (4999, 1)]:
            assert torch.equal(activation(x[start : start + size].clone()), expected[start : start + size])


def test_an_empty_batch_still_takes_part_in_every_exchange() -> None:
    class Counting:
        def __init__(self) -> None:
            self.layers: list[int] = []

        def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
            assert x_TH.shape == (0, 64) and topk_expert_TK.shape == topk_weight_TK.shape == (0, 4)
            self.layers.append(layer)
            return x_TH

    exchange = Counting()
    assert open_model(exchange=exchange).forward(Batch.empty()).shape == (0, VOCAB)
    assert exchange.layers == [1, 2]
