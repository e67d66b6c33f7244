"""Log-probabilities of a prompt: those of a generation that is made to write it, however the prompt is cut."""

from pathlib import Path

import msgspec
import pytest
import torch

from common.config import PrefillConfig
from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import Prefill, Sampling
from services.prefill.prefill_engine import Prefilled, PrefillEngine
from services.prefill.prefill_queue import PrefillQueue

TINY = Path(__file__).parents[2] / "fixtures" / "tiny-random"
SAMPLING = Sampling(1.0, 1.0, 0, 3, 10, logprobs=True, num_top_logprobs=4, prompt_logprobs=True)
PROMPT = tuple((3 + 7 * position) % 250 for position in range(45))


@pytest.fixture(scope="module")
def engine() -> PrefillEngine:
    torch.set_num_threads(1)
    return PrefillEngine(TINY, PrefillConfig(num_kv_blocks=64), 16)


def _prefill(
    name: str, prompt: tuple[int, ...], outputs: tuple[int, ...] = (), sampling: Sampling = SAMPLING
) -> Prefill:
    return Prefill(RequestId(name), 0, ProcessId("r"), prompt, outputs, sampling, Rank(0), Incarnation(1), "")


def _compute(engine: PrefillEngine, chunk_tokens: int, *prefills: Prefill) -> dict[str, Prefilled]:
    queue = PrefillQueue(BlockAllocator(64, 16), chunk_tokens, engine.limits)
    for prefill in prefills:
        assert queue.on_prefill(prefill) is None
    results: dict[str, Prefilled] = {}
    while batch := queue.next_batch():
        computed = engine.compute(batch, lambda piece: None)
        results |= {chunk.attempt[0]: computed[chunk.attempt] for chunk in queue.on_computed(batch)}
    return results


def test_they_do_not_depend_on_chunks_or_neighbours(engine: PrefillEngine) -> None:
    whole = _compute(engine, 256, _prefill("a", PROMPT))["a"]
    assert len(whole.prompt_logprobs) == len(PROMPT) - 1
    plain = msgspec.structs.replace(SAMPLING, prompt_logprobs=False)
    for chunk_tokens in (7, 16):
        results = _compute(engine, chunk_tokens, _prefill("b", PROMPT[:5], (), plain), _prefill("a", PROMPT))
        assert (results["a"].choice, results["a"].prompt_logprobs) == (whole.choice, whole.prompt_logprobs)
        assert results["b"].prompt_logprobs == ()


def test_they_are_what_the_model_says_of_each_next_token(engine: PrefillEngine) -> None:
    judged = _compute(engine, 256, _prefill("a", PROMPT))["a"].prompt_logprobs
    for size in (1, 17, len(PROMPT) - 1):
        forced = msgspec.structs.replace(SAMPLING, temperature=0.0, logit_bias=((PROMPT[size], 100.0),))
        choice = _compute(engine, 256, _prefill("a", PROMPT[:size], (), forced))["a"].choice
        assert (choice.token, (choice.logprob, choice.top)) == (PROMPT[size], judged[size - 1])


def test_a_client_that_has_output_0_has_them(engine: PrefillEngine) -> None:
    assert _compute(engine, 256, _prefill("a", PROMPT, (5,)))["a"].prompt_logprobs == ()
    assert _compute(engine, 256, _prefill("a", PROMPT[:1]))["a"].prompt_logprobs == ()
