"""The prefill worker's bits: the same KV and token for a prompt alone, in chunks, and among others."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from common.config import PrefillConfig
from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import Prefill, Sampling
from services.prefill.prefill_engine import Piece, Prefilled, PrefillEngine
from services.prefill.prefill_queue import NUM_ATTEMPTS_IN_PIECES, Attempt, Chunk, PrefillQueue

TINY = Path(__file__).parents[2] / "fixtures" / "tiny-random"


def prefill(number: int, num_tokens: int) -> Prefill:
    prompt = tuple((number + 5 * i) % 250 for i in range(num_tokens))
    sampling = Sampling(1.0, 1.0, 0, number, 10)
    outputs = (3,) * (number % 3)
    name, rank = RequestId(str(number)), Rank(0)
    return Prefill(name, 1, ProcessId("r"), prompt, outputs, sampling, rank, Incarnation(1), "")


class Receiver:
    """Puts KV together as it arrives. float32 [layers, tokens, row]."""

    def __init__(self, engine: PrefillEngine) -> None:
        self._model = engine._model.config
        self._kv: dict[Attempt, npt.NDArray[np.float32]] = {}
        self.num_pieces = 0

    def push(self, piece: Piece) -> None:
        self.num_pieces += 1
        prefill, config = piece.chunk.prefill, self._model
        shape = (config.num_hidden_layers, len(prefill.prompt + prefill.outputs), config.kv_row_size)
        kv = self._kv.setdefault(piece.chunk.attempt, np.full(shape, np.nan, dtype=np.float32))
        layers = slice(piece.first_layer, piece.first_layer + piece.num_layers)
        rows = np.frombuffer(piece.kv, dtype=np.float32).reshape(piece.num_layers, piece.num_tokens, -1)
        kv[layers, piece.start : piece.start + piece.num_tokens] = rows

    def whole(self, chunk: Chunk, result: Prefilled) -> Prefilled:
        return result if result.kv else replace(result, kv=self._kv[chunk.attempt].tobytes())


def finish(engine: PrefillEngine, queue: PrefillQueue, receiver: Receiver | None = None) -> dict[Attempt, Prefilled]:
    """All that is queued, with its KV in one piece."""
    results: dict[Attempt, Prefilled] = {}
    receiver = receiver or Receiver(engine)
    while batch := queue.next_batch():
        computed = engine.compute(batch, receiver.push)
        for chunk in queue.on_computed(batch):
            results[chunk.attempt] = receiver.whole(chunk, computed[chunk.attempt])
    return results


def compute(requests: list[Prefill], chunk_tokens: int) -> dict[Attempt, Prefilled]:
    torch.set_num_threads(1)
    engine = PrefillEngine(TINY, PrefillConfig(num_kv_blocks=64), 16)
    queue = PrefillQueue(BlockAllocator(64, 16), chunk_tokens, engine.limits)
    for request in requests:
        assert queue.on_prefill(request) is None
    return finish(engine, queue)


def test_bits_do_not_depend_on_chunks_or_neighbours() -> None:
    requests = [prefill(number, 1 + 17 * number) for number in range(5)]
    alone = {attempt: result for request in requests for attempt, result in compute([request], 4096).items()}
    assert compute(requests, 4096) == alone
    assert compute(requests, 24) == alone


def test_kv_is_pushed_before_the_model_is_done_with_it() -> None:
    """All but the last layer's piece of the last chunk has left before the experts of the last layer are computed."""
    torch.set_num_threads(1)
    config = PrefillConfig(chunk_tokens=16, num_kv_blocks=64)
    engine = PrefillEngine(TINY, config, 16)
    queue = PrefillQueue.of(config, 16, engine.limits)
    queue.on_prefill(prefill(0, 40))
    story: list[str] = []
    experts = engine._model._layers[2].mlp
    run = experts.run
    experts.run = lambda *args: story.append("experts") or run(*args)  # type: ignore[method-assign, func-returns-value]
    while batch := queue.next_batch():
        engine.compute(batch, lambda piece: story.append(f"{piece.start} {piece.first_layer}"))
        queue.on_computed(batch)
    assert story == [f"{start} {layer}" if layer < 3 else "experts" for start in (0, 16, 32) for layer in range(4)]


def test_who_has_lost_its_place_often_gets_its_kv_in_one_message() -> None:
    torch.set_num_threads(1)
    config = PrefillConfig(chunk_tokens=16, num_kv_blocks=64)
    engine = PrefillEngine(TINY, config, 16)
    num_layers = engine._model.config.num_hidden_layers
    num_pieces = []
    results: list[Prefilled] = []
    for attempt in (0, NUM_ATTEMPTS_IN_PIECES - 1, NUM_ATTEMPTS_IN_PIECES):
        queue, receiver = PrefillQueue.of(config, 16, engine.limits), Receiver(engine)
        queue.on_prefill(msgspec.structs.replace(prefill(0, 40), attempt=attempt))
        results += finish(engine, queue, receiver).values()
        num_pieces.append(receiver.num_pieces)
    assert num_pieces == [3 * num_layers, 3 * num_layers, 0]
    assert results[0].kv and results == [results[0]] * 3


def test_cached_kv_is_computed_kv_to_the_last_bit() -> None:
    """Prompts that begin alike, one after the other through one worker; each again alone, without a cache."""
    torch.set_num_threads(1)
    config = PrefillConfig(chunk_tokens=40, num_kv_blocks=16, prefix_cache_bytes=1 << 20)
    engine = PrefillEngine(TINY, config, 16)
    queue = PrefillQueue.of(config, 16, engine.limits)
    shared = prefill(1, 100)
    requests = [
        msgspec.structs.replace(
            shared,
            request=RequestId(f"{size}+{extra}{outputs}"),
            prompt=shared.prompt[:size] + (7,) * extra,
            outputs=outputs,
        )
        for size, extra, outputs in ((100, 0, ()), (100, 0, (3, 4, 5)), (70, 60, ()), (96, 1, ()), (33, 5, (9,)))
    ]
    for request, num_saved in zip(requests, (0, 96, 160, 256, 288), strict=True):
        assert queue.on_prefill(request) is None
        assert finish(engine, queue) == compute([request], 4096)
        assert queue.prefixes.num_tokens_saved == num_saved


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        PrefillEngine(tmp_path, PrefillConfig(), 16)
