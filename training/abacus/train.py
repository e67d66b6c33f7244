"""Trains abacus for a given time on one GPU, and writes its checkpoint.

    python -m training.abacus.train --seconds 330 --out models/abacus

The learning rate follows the clock, not the step number, so that a run always ends with a finished schedule, on any
GPU. The checkpoint is written every minute; `--init` goes on from one.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from training.abacus.batches import BLOCKS, BlockShape, TrainingBatches
from training.abacus.checkpoint import load_checkpoint, save_checkpoint
from training.abacus.evaluate import Report, evaluate
from training.abacus.model import AbacusConfig, AbacusModel, bound_loads
from training.abacus.tokenizer import PAD

# Of the three blocks of a batch, in the order of BLOCKS.
BLOCK_LOSS_WEIGHTS = (0.3, 0.4, 0.3)
WARMUP = 0.03
MAX_GRADIENT_NORM = 1.0
# Loads outside this range, relative to the mean, are pushed back; inside they stay uneven.
LOWEST_LOAD, HIGHEST_LOAD = 0.25, 3.0
BIAS_STEP = 3e-3
WATCH_EVERY_S = 60.0
WATCH_COUNT = 300
WATCH_SEED, FINAL_SEED = 1, 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the embedded model abacus.")
    parser.add_argument("--seconds", type=float, required=True, help="time to train, without start and evaluation")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--init", type=Path, help="checkpoint to go on from")
    parser.add_argument("--results", type=Path, help="file for the final measurements (JSON)")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=14, help="processes that generate data")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--rows-divisor", type=int, default=1, help="smaller batches, to try the script out")
    parser.add_argument("--final-count", type=int, default=1000, help="unseen problems per kind at the end")
    return parser.parse_args()


def block_loss(model: AbacusModel, ids_BS: Tensor, learned_BS: Tensor) -> tuple[Tensor, Tensor]:
    """(mean cross-entropy over the learned tokens, load [L, E])."""
    logits_BSV, load_LE = model(ids_BS, ids_BS != PAD)
    losses = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), ids_BS[:, 1:].flatten(), reduction="none")
    learned = learned_BS[:, 1:].flatten().float()
    return (losses * learned).sum() / learned.sum(), load_LE


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up, then a cosine to 1% of the peak; `progress` runs from 0 to 1."""
    if progress < WARMUP:
        return peak * progress / WARMUP
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def shrink(blocks: tuple[BlockShape, ...], divisor: int) -> tuple[BlockShape, ...]:
    return tuple(replace(block, rows=max(1, block.rows // divisor)) for block in blocks)


class Trainer:
    """One run: the model, its optimizer, and the stream of batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        self.device = torch.device(args.device)
        model = load_checkpoint(args.init) if args.init else AbacusModel(AbacusConfig())
        self.model = model.to(self.device)
        is_cuda = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=is_cuda
        )
        self.loss = block_loss if args.no_compile else torch.compile(block_loss, dynamic=False)
        batches = TrainingBatches(args.seed, shrink(BLOCKS, args.rows_divisor))
        self.batches = iter(
            DataLoader(batches, batch_size=None, num_workers=args.workers, pin_memory=is_cuda and args.workers > 0)
        )
        self.num_steps = 0

    def step(self, progress: float) -> Tensor:
        """One update; returns the losses of the three blocks, still on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.args.learning_rate, progress)
        losses, load_LE = [], torch.zeros((), device=self.device)
        for (ids_BS, learned_BS), weight in zip(next(self.batches), BLOCK_LOSS_WEIGHTS, strict=True):
            ids_BS = ids_BS.to(self.device, non_blocking=True).long()
            learned_BS = learned_BS.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss, block_load_LE = self.loss(self.model, ids_BS, learned_BS)
            torch.autograd.backward(weight * loss)
            losses.append(loss.detach())
            load_LE = load_LE + block_load_LE.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            bound_loads(self.model, load_LE, BIAS_STEP * (1 - progress), LOWEST_LOAD, HIGHEST_LOAD)
        self.num_steps += 1
        return torch.stack(losses)

    def watch(self, elapsed_s: float, losses: Tensor) -> None:
        save_checkpoint(self.model, self.args.out)
        report = evaluate(self.model.eval(), WATCH_COUNT, WATCH_SEED, self.device)
        self.model.train()
        accuracy = " ".join(f"{kind} {value:.3f}" for kind, value in report.accuracy.items())
        rounded = " ".join(f"{loss:.5f}" for loss in losses.tolist())
        print(f"{elapsed_s:.0f} s, step {self.num_steps}, losses {rounded}, {accuracy}", flush=True)
        print(
            "   loads",
            [f"{s['min_over_mean']:.2f}..{s['max_over_mean']:.2f}" for s in report.load_summary()],
            flush=True,
        )

    def run(self) -> float:
        """Trains until the time is over; returns the seconds spent in steps after the first, which compiles."""
        begin = time.perf_counter()
        losses = self.step(0.0)
        print(f"first step after {time.perf_counter() - begin:.1f} s, losses {losses.tolist()}", flush=True)
        begin, next_watch_s = time.perf_counter(), WATCH_EVERY_S / 3
        while (elapsed_s := time.perf_counter() - begin) < self.args.seconds:
            losses = self.step(elapsed_s / self.args.seconds)
            if self.num_steps % 50 == 0:
                losses.tolist()  # Bounds how far the host runs ahead of the device.
            if elapsed_s >= next_watch_s:
                self.watch(elapsed_s, losses)
                next_watch_s += WATCH_EVERY_S
        return elapsed_s


def results(trainer: Trainer, report: Report, trained_s: float) -> dict[str, object]:
    is_cuda = trainer.device.type == "cuda"
    tokens_per_step = sum(block.rows * block.length for block in shrink(BLOCKS, trainer.args.rows_divisor))
    return {
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "torch": torch.__version__,
        "trained_s": trained_s,
        "num_steps": trainer.num_steps,
        "tokens_per_step": tokens_per_step,
        "learning_rate": trainer.args.learning_rate,
        "count_per_kind": trainer.args.final_count,
        "accuracy": report.accuracy,
        "failures": report.failures,
        "num_answer_tokens": report.num_answer_tokens,
        "load": report.load_summary(),
        "load_LE": report.load_LE,
        "config": asdict(trainer.model.config),
    }


def main() -> None:
    args = parse_args()
    trainer = Trainer(args)
    trained_s = trainer.run()
    save_checkpoint(trainer.model, args.out)
    report = evaluate(trainer.model.eval(), args.final_count, FINAL_SEED, trainer.device)
    summary = results(trainer, report, trained_s)
    if args.results:
        args.results.write_text(json.dumps(summary, indent=2) + "\n")
    print({key: summary[key] for key in ("num_steps", "accuracy", "failures", "load")}, flush=True)


if __name__ == "__main__":
    main()
