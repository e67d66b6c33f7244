"""What the same model code reaches in one process: one batch, all experts local, no sockets, no HTTP.

    python -m benchmarks.one_process_baseline MODEL --streams 32 --threads 1 --seconds 5

Prints decode tokens per second: every step computes one token for each stream and samples it greedily; streams start
with a prompt of 32 tokens and begin anew after 240 outputs, as those of the load generator do.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from common.model.checkpoint import Checkpoint
from common.model.experts import LocalExperts
from common.model.kv_cache import kv_cache_shape
from common.model.model import Batch, Model
from common.model.sampling import sample

_PROMPT, _LIMIT, _BLOCK = 32, 272, 16


@torch.inference_mode()
def tokens_per_s(model_dir: Path, num_streams: int, seconds: float) -> float:
    checkpoint = Checkpoint.open(str(model_dir))
    width = -(-_LIMIT // _BLOCK)
    cache = torch.zeros(kv_cache_shape(checkpoint.config, num_streams * width, _BLOCK))
    model = Model(checkpoint, LocalExperts(checkpoint), cache)
    tables = np.arange(num_streams * width, dtype=np.int64).reshape(num_streams, width)
    index = np.arange(num_streams)
    tokens = np.full(num_streams, 5, dtype=np.int64)

    def step(position: int) -> None:
        positions = np.full(num_streams, position, dtype=np.int64)
        logits = model.forward(Batch(tokens, positions, index, tables, index)).numpy()
        for stream in range(num_streams):
            tokens[stream], _ = sample(logits[stream], temperature=0.0)

    for position in range(_PROMPT):
        step(position)
    num_steps, start, position = 0, time.perf_counter(), _PROMPT
    while time.perf_counter() - start < seconds:
        step(position)
        num_steps += 1
        position = position + 1 if position + 1 < _LIMIT else _PROMPT
    return num_streams * num_steps / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(tokens_per_s(arguments.model, arguments.streams, arguments.seconds)))


if __name__ == "__main__":
    main()
