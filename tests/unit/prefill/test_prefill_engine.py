"""The prefill worker's bits: the same KV and token for a prompt alone, in chunks, and among others."""

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from common.config import PrefillConfig
from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import Prefill, Sampling
from services.prefill.prefill_engine import Prefilled, PrefillEngine
from services.prefill.prefill_queue import Attempt, PrefillQueue

TINY = Path(__file__).parents[2] / "fixtures" / "tiny-random"


def prefill(number: int, num_tokens: int) -> Prefill:
    prompt = tuple((number + 5 * i) % 250 for i in range(num_tokens))
    sampling = Sampling(1.0, 1.0, 0, number, 10)
    outputs = (3,) * (number % 3)
    name, rank = RequestId(str(number)), Rank(0)
    return Prefill(name, 1, ProcessId("r"), prompt, outputs, sampling, rank, Incarnation(1), "")


def compute(requests: list[Prefill], chunk_tokens: int) -> dict[Attempt, Prefilled]:
    torch.set_num_threads(1)
    engine = PrefillEngine(TINY, PrefillConfig(num_kv_blocks=64), 16)
    blocks: BlockAllocator[Attempt] = BlockAllocator(64, 16)
    queue = PrefillQueue(blocks, chunk_tokens, engine.limits)
    for request in requests:
        assert queue.on_prefill(request) is None
    results: dict[Attempt, Prefilled] = {}
    while batch := queue.next_batch():
        computed = engine.compute(batch)
        results |= {chunk.attempt: computed[chunk.attempt] for chunk in queue.on_computed(batch)}
    return results


def test_bits_do_not_depend_on_chunks_or_neighbours() -> None:
    requests = [prefill(number, 1 + 17 * number) for number in range(5)]
    alone = {attempt: result for request in requests for attempt, result in compute([request], 4096).items()}
    assert compute(requests, 4096) == alone
    assert compute(requests, 24) == alone


def test_cached_kv_is_computed_kv_to_the_last_bit() -> None:
    """Prompts that begin alike, one after the other through one worker; each again alone, without a cache."""
    torch.set_num_threads(1)
    config = PrefillConfig(chunk_tokens=40, num_kv_blocks=16, prefix_cache_bytes=1 << 20)
    engine = PrefillEngine(TINY, config, 16)
    queue = PrefillQueue.of(config, 16, engine.limits)
    shared = prefill(1, 100)
    requests = [
        replace(
            shared,
            request=RequestId(f"{size}+{extra}{outputs}"),
            prompt=shared.prompt[:size] + (7,) * extra,
            outputs=outputs,
        )
        for size, extra, outputs in ((100, 0, ()), (100, 0, (3, 4, 5)), (70, 60, ()), (96, 1, ()), (33, 5, (9,)))
    ]
    for request, num_saved in zip(requests, (0, 96, 160, 256, 288), strict=True):
        assert queue.on_prefill(request) is None
        results: dict[Attempt, Prefilled] = {}
        while batch := queue.next_batch():
            computed = engine.compute(batch)
            results |= {chunk.attempt: computed[chunk.attempt] for chunk in queue.on_computed(batch)}
        assert results == compute([request], 4096)
        assert queue.prefixes.num_tokens_saved == num_saved


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        PrefillEngine(tmp_path, PrefillConfig(), 16)
