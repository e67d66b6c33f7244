"""The bits of a row's logits: the same alone, in any batch, in chunks, token by token, under any expert placement."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from common.model.checkpoint import Checkpoint
from common.model.experts import LocalExperts
from common.model.kv_cache import Int64Array
from common.model.model import Batch, Model
from tests.kernels.cpu_levels import HERE, at_level
from tests.unit.model.scattered_experts import ScatteredExperts
from tests.unit.model.tiny_models import TINY_RANDOM, feed, feed_together, int64, open_model, token_by_token

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


def test_bits_do_not_depend_on_the_instruction_set() -> None:
    ids = np.random.default_rng(9).integers(0, VOCAB, 90).tolist()
    expected = feed(open_model(), [(ids, 0, list(range(6)))])[0]
    for level in HERE:
        with at_level(level):
            assert torch.equal(feed(open_model(), [(ids, 0, list(range(6)))])[0], expected), level


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids_T": int64([0, VOCAB])}, "token id outside 0..259"),
        ({"token_ids_T": int64([-1, 0])}, "token id outside 0..259"),
        ({"position_T": int64([0, 1024])}, "position outside 0.."),
        ({"position_T": int64([0, -1])}, "position outside 0.."),
        ({"request_index_T": int64([0, 2])}, "request index outside 0..1"),
        ({"position_T": int64([0, 32])}, "block of a block table outside 0..63"),
        ({"block_table_RW": int64([[0, 1], [64, 1]])}, "block of a block table outside 0..63"),
        ({"block_table_RW": int64([[-1, 1], [2, 1]])}, "block of a block table outside 0..63"),
        ({"logit_index_S": int64([0, 2])}, "logit index outside 0..1"),
    ],
)
def test_what_is_out_of_range_is_refused_and_nothing_written(change: dict[str, Int64Array], message: str) -> None:
    model = open_model()
    good = Batch(int64([1, 2]), int64([0, 5]), int64([0, 1]), int64([[0, -1], [3, -1]]), int64([1]))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.forward(replace(good, **change))
    assert bool(model.kv_cache_LBPC.isnan().all())


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
