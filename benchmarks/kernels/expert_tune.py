"""Which block shapes stream the weights of the expert MLP fastest: ``python -m benchmarks.kernels.expert_tune``.

Compiles in many processes, times each product alone, then the whole with the best of each.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.expert_mlp import SHAPES
from benchmarks.kernels.expert_rig import ExpertSet, Shape, bandwidths, capture, repeated, time_graph
from kernels.expert_mlp import ExpertMlp
from kernels.expert_plan import ROW_BLOCK, ExpertPlan, ProductPlan, plan_experts

TOKENS = (1, 16, 128)
SHARED_MEMORY_BYTES = 226 * 1024
MIN_BYTES_IN_FLIGHT = 20 * 1024
NUM_REPLAYS = 3
NUM_FINALISTS = 3
_BLOCKS = (16, 32, 64, 128)
_DEPTHS = ((64, 3), (64, 4), (64, 6), (64, 8), (128, 3), (128, 4), (256, 3))
_AHEAD = (0, 256, 512, 1024)
_compiled: dict[str, ExpertSet] = {}


def product_plans(rows: int, columns: int, num_weights: int) -> Iterator[ProductPlan]:
    """Plans for a product with ``num_weights`` weights of [rows, columns] each, that fit and keep enough in flight."""
    for block, (block_k, num_stages), tma in itertools.product(_BLOCKS, _DEPTHS, (False, True)):
        if rows % block or columns % block_k:
            continue
        weight_bytes = num_weights * block * block_k * 2
        program_bytes = num_stages * (weight_bytes + ROW_BLOCK * block_k * 2) + 1024
        for programs in (1, 2, 3, 4):
            in_flight = programs * (num_stages - 1) * weight_bytes
            if programs * program_bytes <= SHARED_MEMORY_BYTES and in_flight >= MIN_BYTES_IN_FLIGHT:
                yield ProductPlan(block, block_k, num_stages, programs, tma=tma)


def plans_of_products(shape: Shape) -> dict[str, list[ProductPlan]]:
    hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size
    return {
        "gate_up": list(product_plans(intermediate_size, hidden_size, 2)),
        "down": list(product_plans(hidden_size, intermediate_size, 1)),
    }


def compile_plan(job: tuple[Shape, ExpertPlan]) -> str:
    """In a process of a pool: launch once, with no rows. What went wrong, or nothing."""
    shape, plan = job
    if shape.name not in _compiled:
        _compiled.clear()
        torch.cuda.empty_cache()
        _compiled[shape.name] = ExpertSet(shape, 1)
    rig = _compiled[shape.name]
    try:
        rig.experts(plan).run(rig.rows_WMKH)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{plan}: {error}"[:300]
    return ""


def compile_all(shapes: list[Shape]) -> None:
    jobs = []
    for shape in shapes:
        base = plan_experts(shape.hidden_size, shape.intermediate_size, on_gpu=True)
        plans = plans_of_products(shape)
        compiled = {
            name: list({(p.block, p.block_k, p.num_stages, p.tma): p for p in plans[name]}.values()) for name in plans
        }
        for gate_up, down in itertools.zip_longest(compiled["gate_up"], compiled["down"]):
            jobs.append((shape, replace(base, gate_up=gate_up or base.gate_up, down=down or base.down)))
    num_processes = max(1, min(12, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        for error in pool.imap(compile_plan, jobs, chunksize=max(1, len(jobs) // (2 * num_processes))):
            if error:
                print("cannot be built:", error, flush=True)


class Tuner:
    def __init__(self, shape: Shape, bandwidth: float) -> None:
        self.shape, self.bandwidth = shape, bandwidth
        self.rigs = [ExpertSet(shape, seed) for seed in range(shape.num_sets)]
        self.experts: list[ExpertMlp] = [rig.experts() for rig in self.rigs]
        self.base = self.experts[0].plan

    def leave_rows(self, num_tokens: int) -> None:
        for rig, experts in zip(self.rigs, self.experts, strict=True):
            rig.leave_rows(num_tokens)
            experts.launch_list()

    def share(self, plan: ExpertPlan, launch: Callable[[ExpertMlp, ExpertSet], None], part: float) -> float:
        """Of the bound; ``part`` of an expert's bytes is read. 0 if it cannot run."""
        for experts in self.experts:
            experts.plan = plan
        pairs = list(zip(self.experts, self.rigs, strict=True))
        launches = repeated([partial(launch, *pair) for pair in pairs])
        try:
            us = statistics.median(time_graph(capture(launches), len(launches), NUM_REPLAYS))
        except Exception as error:
            print(plan, str(error)[:200], flush=True)
            return 0.0
        nbytes = statistics.mean(rig.num_active() for rig in self.rigs) * self.shape.expert_bytes * part
        return nbytes / self.bandwidth / (us * 1e-6)

    def products(self) -> dict[str, dict[ProductPlan, list[float]]]:
        """Share of each product plan at each number of tokens."""
        found: dict[str, dict[ProductPlan, list[float]]] = {"gate_up": {}, "down": {}}
        plans = plans_of_products(self.shape)
        for num_tokens in TOKENS:
            self.leave_rows(num_tokens)
            for product in plans["gate_up"]:
                plan = replace(self.base, gate_up=product)
                share = self.share(plan, lambda experts, rig: experts.launch_gate_up(), 2 / 3)
                found["gate_up"].setdefault(product, []).append(share)
            for product in plans["down"]:
                plan = replace(self.base, down=product, ahead=0)
                share = self.share(plan, lambda experts, rig: experts.launch_down(rig.rows_WMKH), 1 / 3)
                found["down"].setdefault(product, []).append(share)
        return found

    def wholes(self, best: dict[str, list[ProductPlan]]) -> dict[ExpertPlan, list[float]]:
        plans = [
            ExpertPlan(gate_up, down, overlap, ahead)
            for gate_up, down in itertools.product(best["gate_up"], best["down"])
            for overlap, ahead in [(False, 0)] + [(True, a) for a in _AHEAD if a <= self.shape.intermediate_size]
        ]
        found: dict[ExpertPlan, list[float]] = {}
        for num_tokens in TOKENS:
            self.leave_rows(num_tokens)
            for plan in plans:
                share = self.share(plan, lambda experts, rig: experts.run(rig.rows_WMKH), 1.0)
                found.setdefault(plan, []).append(share)
        return found


def ranked(found: dict[Any, list[float]]) -> list[tuple[Any, list[float]]]:
    """Best first: by the harmonic mean of the shares."""
    return sorted(found.items(), key=lambda item: sum(1 / max(share, 1e-9) for share in item[1]))


def show(title: str, items: list[tuple[Any, list[float]]]) -> None:
    for plan, shares in items:
        print(title, [round(share, 3) for share in shares], json.dumps(asdict(plan)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("expert_tune.json"))
    options = parser.parse_args()
    began = time.monotonic()
    shapes = [shape for shape in SHAPES if shape.tuned]
    compile_all(shapes)
    bandwidth = bandwidths()["copy"]
    print(f"compiled after {time.monotonic() - began:.0f} s; copy bandwidth {bandwidth / 1e12:.3f} TB/s", flush=True)
    kept: dict[str, Any] = {}
    for shape in shapes:
        tuner = Tuner(shape, bandwidth)
        products = tuner.products()
        best = {name: [plan for plan, _ in ranked(found)[:NUM_FINALISTS]] for name, found in products.items()}
        for name, found in products.items():
            show(f"{shape.name} {name}", ranked(found)[:6])
        wholes = ranked(tuner.wholes(best))
        show(f"{shape.name} whole", wholes[:5])
        kept[shape.name] = {
            name: [(asdict(plan), shares) for plan, shares in ranked(found)]
            for name, found in {**products, "whole": dict(wholes)}.items()
        }
        options.json.write_text(json.dumps(kept))
        print(f"{shape.name} after {time.monotonic() - began:.0f} s", flush=True)
        del tuner
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
