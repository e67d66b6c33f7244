"""Exact-match accuracy of greedy answers, and the load of each expert, on unseen problems.

The whole answer is fed at once and the most likely token compared at every position. That decides the same thing as
generating: greedy decoding yields the right answer exactly if each of its tokens is the most likely one after the
right tokens before it. `regrow eval` measures the same by real generation, through a running server.

    python -m training.abacus.evaluate models/abacus --count 1000
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from common.abacus_tasks import KINDS, Problem, unseen_problems
from training.abacus.batches import encode_answer, encode_prompt
from training.abacus.checkpoint import load_checkpoint
from training.abacus.model import AbacusModel
from training.abacus.tokenizer import BOS, PAD

# Rows of one forward pass times their length; bounds memory.
_TOKENS_PER_PASS = 1 << 16


@dataclass
class Report:
    """Accuracy per kind, some failures per kind, and how often each expert was chosen [L, E]."""

    accuracy: dict[str, float] = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)
    num_answer_tokens: int = 0
    load_LE: list[list[float]] = field(default_factory=list)

    def load_summary(self) -> list[dict[str, float]]:
        """Per MoE layer, the lowest and highest load relative to the mean of the layer."""
        load_LE = torch.tensor(self.load_LE)
        share_LE = load_LE / load_LE.mean(dim=-1, keepdim=True)
        return [{"min_over_mean": float(s.min()), "max_over_mean": float(s.max())} for s in share_LE]


def _encode(problems: list[Problem], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows = [([BOS, *encode_prompt(p.prompt)], encode_answer(p.answer)) for p in problems]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids_BS = torch.full((len(rows), length), PAD)
    is_answer_BS = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids_BS[row, :end] = torch.tensor(prompt + answer)
        is_answer_BS[row, len(prompt) : end] = True
    return ids_BS.to(device), is_answer_BS.to(device), (ids_BS != PAD).to(device)


@torch.no_grad()
def evaluate(model: AbacusModel, count: int, seed: int, device: torch.device) -> Report:
    """Judges `count` unseen problems of each kind in fp32."""
    report, load_LE = Report(), torch.zeros((), device=device)
    for kind in KINDS:
        problems = sorted(unseen_problems(kind, count, seed), key=lambda p: len(p.prompt) + len(p.answer))
        num_right, failures = 0, []
        while problems:
            longest = len(problems[-1].prompt) + len(problems[-1].answer) + 5
            rows = max(1, _TOKENS_PER_PASS // longest)
            problems, batch = problems[:-rows], problems[-rows:]
            ids_BS, is_answer_BS, counted_BS = _encode(batch, device)
            logits_BSV, batch_load_LE = model(ids_BS, counted_BS)
            load_LE = load_LE + batch_load_LE
            report.num_answer_tokens += int(is_answer_BS.sum())
            best_BS = logits_BSV[:, :-1].argmax(-1)
            is_right_BS = (best_BS == ids_BS[:, 1:]) | ~is_answer_BS[:, 1:]
            is_right_B = is_right_BS.all(-1).cpu()
            num_right += int(is_right_B.sum())
            failures += [f"{p.prompt} -> {p.answer}" for p, right in zip(batch, is_right_B, strict=True) if not right]
        report.accuracy[kind] = num_right / count
        report.failures[kind] = failures[:8]
    report.load_LE = load_LE.tolist()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="unseen problems per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    report = evaluate(load_checkpoint(args.checkpoint).to(device).eval(), args.count, args.seed, device)
    print(
        json.dumps({"accuracy": report.accuracy, "failures": report.failures, "load": report.load_summary()}, indent=2)
    )


if __name__ == "__main__":
    main()
