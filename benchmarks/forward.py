"""One forward pass of the model in this process, all experts local: decode steps by number of rows, and long prompts.

    python -m benchmarks.forward [--model DIR] [--rows 1 8 32 64] [--context 150] [--prompt 1000] [--seconds 2]

One thread. Prints milliseconds, the fastest and the median, so that other work on the machine does not decide.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.load_generator import ROOT
from benchmarks.provenance import provenance
from common.model.checkpoint import Checkpoint
from common.model.experts import LocalExperts
from common.model.kv_cache import kv_cache_shape
from common.model.model import Batch, Model

_BLOCK = 16


def decode_step(model: Model, num_rows: int, context: int) -> Batch:
    """Each row a request of its own at position ``context``."""
    width = -(-(context + 1) // _BLOCK)
    index = np.arange(num_rows)
    tables = np.arange(num_rows * width, dtype=np.int64).reshape(num_rows, width)
    tokens = (index * 7 + 5) % model.config.vocab_size
    return Batch(tokens, np.full(num_rows, context, dtype=np.int64), index, tables, index)


def prompt_chunk(model: Model, start: int, stop: int) -> Batch:
    position = np.arange(start, stop)
    table = np.arange(-(-stop // _BLOCK), dtype=np.int64)[None]
    tokens = (position * 13 + 5) % model.config.vocab_size
    return Batch(tokens, position, np.zeros_like(position), table, np.array([stop - start - 1]))


def forward_of(model: Model, batch: Batch) -> Callable[[], None]:
    def work() -> None:
        model.forward(batch)

    return work


def milliseconds(work: Callable[[], None], seconds: float) -> dict[str, float]:
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return {"fastest_ms": round(min(times), 3), "median_ms": round(statistics.median(times), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "abacus")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=150)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(arguments.model)
    num_positions = max(max(arguments.rows) * (arguments.context + _BLOCK), arguments.prompt + _BLOCK)
    cache = torch.zeros(kv_cache_shape(checkpoint.config, -(-num_positions // _BLOCK), _BLOCK))
    model = Model(checkpoint, LocalExperts(checkpoint), cache)
    figures: dict[str, object] = dict(provenance())

    def prefill() -> None:
        for start in range(0, arguments.prompt, arguments.chunk):
            model.forward(prompt_chunk(model, start, min(start + arguments.chunk, arguments.prompt)))

    figures[f"prompt of {arguments.prompt} in chunks of {arguments.chunk}"] = milliseconds(prefill, arguments.seconds)
    for num_rows in arguments.rows:
        batch = decode_step(model, num_rows, arguments.context)
        figures[f"{num_rows} rows"] = milliseconds(forward_of(model, batch), arguments.seconds)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
