"""Records what the embedded model's experts do under changing traffic: `python -m benchmarks.planner.record_trace`.

Each window is a number of problems of some mix of kinds; prompt and right answer are fed at once through the model code
that serves (`common/model`, all experts in the process), and the tokens routed to each expert are counted. The file
holds the counts [windows, layers, experts] as JSON.
"""

import argparse
import json
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from benchmarks.provenance import provenance
from common.abacus_tasks import KINDS, unseen_problems
from common.model.checkpoint import Checkpoint
from common.model.experts import LocalExperts
from common.model.kv_cache import kv_cache_shape
from common.model.model import Batch, Model
from common.model.tokenizer import Tokenizer

_BLOCK_SIZE = 16
_PROBLEMS_PER_WINDOW = 48
_MOST_TOKENS = 1024


class CountingExperts:
    """`LocalExperts` that counts: counts[layer][expert] since it was last taken."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.config
        self._inner = LocalExperts(checkpoint)
        self._moe_layer = {layer: number for number, layer in enumerate(config.moe_layers)}
        self._shape = config.num_moe_layers, config.n_routed_experts
        self._counts = np.zeros(self._shape, dtype=np.int64)

    def run(self, layer: int, x_TH: Tensor, topk_expert_TK: Tensor, topk_weight_TK: Tensor) -> Tensor:
        self._counts[self._moe_layer[layer]] += np.bincount(topk_expert_TK.numpy().ravel(), minlength=self._shape[1])
        return self._inner.run(layer, x_TH, topk_expert_TK, topk_weight_TK)

    def take(self) -> list[list[int]]:
        counts: list[list[int]] = self._counts.tolist()
        self._counts = np.zeros(self._shape, dtype=np.int64)
        return counts


def schedule() -> list[tuple[str, dict[str, float]]]:
    """(phase, share of each kind) of every window."""
    even = {kind: 1.0 for kind in KINDS}
    windows: list[tuple[str, dict[str, float]]] = [("mixed", even)] * 4
    for kind in KINDS:
        windows += [(f"only {kind}", {kind: 1.0})] * 3
    for number in range(8):
        windows.append(("counting gives way to copying", {"counting": 7.0 - number, "copying": float(number)}))
    for number in range(6):
        windows.append(("sorting and addition in turn", {("sorting", "addition")[number % 2]: 1.0}))
    return windows


def record(model_directory: Path, seed: int) -> dict[str, object]:
    checkpoint = Checkpoint.open(model_directory)
    tokenizer = Tokenizer.load(model_directory)
    experts = CountingExperts(checkpoint)
    num_blocks = _MOST_TOKENS // _BLOCK_SIZE
    model = Model(checkpoint, experts, torch.zeros(kv_cache_shape(checkpoint.config, num_blocks, _BLOCK_SIZE)))
    rng = Random(seed)
    problems = {kind: unseen_problems(kind, 400, seed) for kind in KINDS}
    phases, windows = [], []
    for phase, mix in schedule():
        for kind in rng.choices(list(mix), list(mix.values()), k=_PROBLEMS_PER_WINDOW):
            problem = rng.choice(problems[kind])
            prompt = tokenizer.encode_chat([{"role": "user", "content": problem.prompt}])
            ids = np.array([*prompt, *tokenizer.encode(problem.answer)], dtype=np.int64)
            model.forward(_whole(ids, num_blocks))
        phases.append(phase)
        windows.append(experts.take())
    return {"problems_per_window": _PROBLEMS_PER_WINDOW, "phase": phases, "tokens": windows}


def _whole(ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]], num_blocks: int) -> Batch:
    none = np.zeros(len(ids), dtype=np.int64)
    blocks = np.arange(num_blocks, dtype=np.int64)[None, :]
    return Batch(ids, np.arange(len(ids), dtype=np.int64), none, blocks, none[:0])


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the expert loads of the embedded model.")
    parser.add_argument("--model", type=Path, default=Path("models/abacus"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/planner/traces/abacus_mixes.json"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {"model": args.model.name, "seed": args.seed, **provenance(), **record(args.model, args.seed)}
    args.out.write_text(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
