"""Logits agree with transformers to 1e-4, and have the same bits however they come about, in every model family."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.model.checkpoint import Checkpoint
from tests.unit.model.reference_models import VARIANTS, VOCAB, reference_logits, save_reference, transformers
from tests.unit.model.scattered_experts import ScatteredExperts
from tests.unit.model.tiny_models import TINY_RANDOM, feed, feed_together, open_model, token_by_token


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """(name, checkpoint directory, reference)."""
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, directory, save_reference(directory, request.param)


def test_prompts_and_decode_steps_agree_with_transformers(variant: tuple[str, Path, Any]) -> None:
    name, directory, reference = variant
    model = open_model(directory, num_blocks=40, block_size=24)
    rng = np.random.default_rng(3)
    worst = 0.0
    for prompt_size in (1, 17, 150):
        ids = rng.integers(0, VOCAB, prompt_size + 4).tolist()
        expected = reference_logits(reference, ids)
        table = rng.permutation(40).tolist()
        got = [feed(model, [(ids[:prompt_size], 0, table)])[0]]
        for position in range(prompt_size, len(ids)):
            got += feed(model, [([ids[position]], position, table)])
        worst = max(worst, float((torch.cat(got) - expected).abs().max()))
        assert float(expected.std()) > 0.3, "logits too flat to tell a difference"
    print(f"{name}: largest difference of logits {worst:.2e}")
    assert worst <= 1e-4


def test_bits_depend_neither_on_the_batch_nor_on_chunks(variant: tuple[str, Path, Any]) -> None:
    model = open_model(variant[1], num_blocks=40, block_size=16)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (1, 16, 70, 131)]
    alone = [token_by_token(model, ids) for ids in prompts]
    whole = [feed(model, [(ids, 0, list(range(9)))])[0] for ids in prompts]
    mixed = feed_together(model, rng, prompts, largest=50)
    for expected, *others in zip(alone, whole, mixed, strict=True):
        for other in others:
            assert torch.equal(expected, other)


def test_bits_do_not_depend_on_where_experts_live(variant: tuple[str, Path, Any]) -> None:
    directory = variant[1]
    ids = np.random.default_rng(5).integers(0, VOCAB, 40).tolist()
    expected = feed(open_model(directory), [(ids, 0, [0, 1, 2])])[0]
    scattered = open_model(directory, exchange=ScatteredExperts(Checkpoint.open(directory), num_ranks=3, seed=0))
    assert torch.equal(feed(scattered, [(ids, 0, [0, 1, 2])])[0], expected)


def test_the_committed_checkpoint_agrees_with_transformers() -> None:
    reference = transformers.DeepseekV3ForCausalLM.from_pretrained(TINY_RANDOM, dtype=torch.float32).eval()
    ids = list(np.random.default_rng(4).integers(0, Checkpoint.open(TINY_RANDOM).config.vocab_size, 100))
    got = feed(open_model(), [(ids, 0, list(range(10)))])[0]
    worst = float((got - reference_logits(reference, ids)).abs().max())
    print(f"tiny-random: largest difference of logits {worst:.2e}")
    assert worst <= 1e-4
