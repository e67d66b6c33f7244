"""Prefill: a long prompt with and without its beginning in the cache, the handoff of its KV, a short prompt behind it.

    python -m benchmarks.prefill [--model DIR] [--tokens 4000] [--runs 3] [--parts engine,http] [--output FILE.md]

``engine``: the shipped queue and engine in one process, one thread of torch; KV goes over a TCP socket of this host.
``http``: a cluster, see `benchmarks.prefill_http`. The model is given 16,384 positions: what it would say at them does
not matter here.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zmq.asyncio
from msgspec.structs import replace

from benchmarks.load_generator import ROOT
from benchmarks.prefill_http import measure_http
from benchmarks.provenance import provenance
from common.config import PrefillConfig
from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.messages import KvHandoff, KvPart, Prefill, Sampling
from common.transport import Endpoint, Link
from services.prefill.prefill_engine import Piece, PrefillEngine
from services.prefill.prefill_queue import PrefillQueue

BLOCK = 16
CONFIG = PrefillConfig(chunk_tokens=256, num_kv_blocks=2048, prefix_cache_bytes=64 << 20)
Push = Callable[[Piece], None]


class ArrivalOrder(PrefillQueue):
    """For comparison: whoever came first has the whole batch."""

    def _turn(self, work: object) -> int:
        return 0


def long_model(model: Path, directory: Path) -> Path:
    for file in model.iterdir():
        (directory / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 16384}
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def prefill(name: str, num_tokens: int, first: int = 5, outputs: tuple[int, ...] = ()) -> Prefill:
    prompt = tuple((first + 13 * position) % 200 + 5 for position in range(num_tokens))
    sampling = Sampling(0.0, 1.0, 0, 1, 100)
    return Prefill(RequestId(name), 1, ProcessId("r"), prompt, outputs, sampling, Rank(0), Incarnation(1), "")


def seconds_to(name: str, queue: PrefillQueue, engine: PrefillEngine, push: Push = lambda piece: None) -> float:
    """Until the request has its first token."""
    start = time.perf_counter()
    while batch := queue.next_batch():
        engine.compute(batch, push)
        if any(chunk.prefill.request == name for chunk in queue.on_computed(batch)):
            break
    return time.perf_counter() - start


def first_token(engine: PrefillEngine, num_tokens: int, run: int) -> dict[str, float]:
    """A prompt that nobody has sent before; one that ends otherwise; the first again, with 60 outputs."""
    queue, rows = PrefillQueue.of(CONFIG, BLOCK, engine.limits, 1.0), {}
    first = prefill("new", num_tokens, first=run)
    requests = {
        "new": first,
        "shares all but 100 tokens": replace(first, prompt=first.prompt[:-100] + (7,) * 100),
        "placed again after 60 outputs": replace(first, outputs=(9,) * 60),
    }
    for name, request in requests.items():
        queue.on_prefill(replace(request, request=RequestId(name)))
        rows[name] = seconds_to(name, queue, engine)
    return rows


def behind(kind: type[PrefillQueue], engine: PrefillEngine, num_tokens: int, num_long: int) -> float:
    """Seconds to the first token of 20, sent after the first batch of long prompts."""
    queue = kind.of(replace(CONFIG, prefix_cache_bytes=0), BLOCK, engine.limits, 1.0)
    for number in range(num_long):
        queue.on_prefill(prefill(f"long-{number}", num_tokens, first=number))
    batch = queue.next_batch()
    engine.compute(batch, lambda piece: None)
    queue.on_computed(batch)
    queue.on_prefill(prefill("short", 20))
    return seconds_to("short", queue, engine)


async def handoff(engine: PrefillEngine, num_tokens: int, in_pieces: bool) -> float:
    """From the end of the computation until the other side has all KV."""
    context = zmq.asyncio.Context()
    endpoint = Endpoint(context)
    link = Link(context, ProcessId("prefill"), endpoint.address("127.0.0.1"))
    queue = PrefillQueue.of(replace(CONFIG, prefix_cache_bytes=0), BLOCK, engine.limits, 1.0)
    queue.on_prefill(prefill("a", num_tokens))
    receiving = asyncio.create_task(_receive_all(endpoint))
    end = 0.0
    while batch := queue.next_batch():
        pieces: list[Piece] = []
        engine.compute(batch, pieces.append)
        end = time.perf_counter()
        (chunk,) = batch
        if not in_pieces:
            num_layers = engine._model.config.num_hidden_layers
            pieces = [engine._piece(chunk, 0, num_layers, 0, chunk.stop)] if chunk.is_last else []
        for piece in pieces:
            part = KvPart(
                RequestId("a"),
                1,
                Rank(0),
                Incarnation(1),
                piece.first_layer,
                piece.num_layers,
                piece.start,
                piece.num_tokens,
            )
            link.send(part, [piece.kv])
        queue.on_computed(batch)
        if not chunk.is_last:
            await asyncio.sleep(0.02)  # what was sent arrives while the next chunk is computed, in another thread
    link.send(KvHandoff(RequestId("a"), 1, Rank(0), Incarnation(1), num_tokens, 0, 0.0))
    seconds = await receiving - end
    context.destroy(linger=0)
    return seconds


async def _receive_all(endpoint: Endpoint) -> float:
    while not isinstance((await endpoint.receive()).message, KvHandoff):
        pass
    return time.perf_counter()


def measure(engine: PrefillEngine, num_tokens: int, runs: int) -> list[tuple[str, list[float]]]:
    rows: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        rows.setdefault(name, []).append(1000 * seconds)

    for run in range(runs):
        for name, seconds in first_token(engine, num_tokens, run).items():
            note(f"first token, {name}", seconds)
        note("handoff after the last layer, whole KV", asyncio.run(handoff(engine, num_tokens, in_pieces=False)))
        note("handoff after the last layer, in pieces", asyncio.run(handoff(engine, num_tokens, in_pieces=True)))
        for num_long in (1, 4):
            note(
                f"20 tokens behind {num_long} long, in order of arrival",
                behind(ArrivalOrder, engine, num_tokens, num_long),
            )
            note(f"20 tokens behind {num_long} long, as shipped", behind(PrefillQueue, engine, num_tokens, num_long))
    return list(rows.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "abacus")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--parts", default="engine,http", help="which of engine,http")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/depth_cpu.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    with tempfile.TemporaryDirectory(prefix="regrow-prefill-") as directory:
        (Path(directory) / "model").mkdir()
        model, rows = long_model(arguments.model, Path(directory) / "model"), []
        if "engine" in arguments.parts:
            rows += measure(PrefillEngine(model, CONFIG, BLOCK), arguments.tokens, arguments.runs)
        if "http" in arguments.parts:
            rows += list(measure_http(model, Path(directory), arguments.tokens, arguments.runs).items())
    lines = ["# Prefill", "", *(f"- {key.replace('_', ' ')}: {value}" for key, value in origin.items())]
    lines += [f"- prompts of {arguments.tokens} tokens, chunks of {CONFIG.chunk_tokens}, {arguments.runs} runs", ""]
    lines += ["| what | median | lowest, highest |", "|---|---|---|"]
    lines += [f"| {n} | {statistics.median(ms):.1f} ms | {min(ms):.1f}, {max(ms):.1f} ms |" for n, ms in rows]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
