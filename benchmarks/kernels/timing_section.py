"""Times of the operations beside NCCL's, and what fault tolerance costs."""

import statistics
from typing import Any

from benchmarks.kernels.bench_group import LARGE, SHAPES, BenchGroup, show
from benchmarks.kernels.rank_pool import RankProcess, call_all

TOKENS = (1, 16, 64, 128)
GOALS = {
    "dispatch": (7.0, 7.5, 9.0, 12.0),
    "reduced": (8.0, 9.0, 11.0, 13.5),
    "ordered": (12.0, 14.0, 20.0, 33.0),
}
VARIANTS = ["views", "bare", "fp8"]
ROUNDS = 7
NCCL_PORT = 29517
Todo = list[tuple[str, str, int, Any]]


def run_timing(group: BenchGroup) -> None:
    todo: Todo = [(op, variant, n, None) for op in GOALS for variant in VARIANTS[:2] for n in TOKENS]
    todo += [("dispatch", "fp8", n, None) for n in TOKENS]
    for shape in SHAPES:
        precompile(group, shape, VARIANTS, todo)
        group.form(shape, VARIANTS)
        for operation, goals in GOALS.items():
            for num_tokens, goal in zip(TOKENS, goals, strict=True):
                time_one(group, shape, operation, num_tokens, goal)
        for num_tokens in TOKENS:
            us, spread = slowest(group, "time_pair", num_tokens=num_tokens, ordered=True)
            show("timing", shape=shape, operation="dispatch + ordered", tokens=num_tokens, us=us, range=spread)
    group.form(LARGE, ["views"])
    for num_tokens in TOKENS:
        found = call_all(group.ranks, "slowest_single", num_tokens=num_tokens, number=1000)
        rounded = [[round(us, 1) for us in pair] for pair in found]
        show("single replays, dispatch + reduced", tokens=num_tokens, median_max_us=rounded)
    for num_tokens in TOKENS:
        us, spread = slowest(group, "time_nccl", port=NCCL_PORT, num_tokens=num_tokens)
        show("nccl all_to_all_single", tokens=num_tokens, us=us, range=spread)


def time_one(group: BenchGroup, shape: str, operation: str, num_tokens: int, goal: float) -> None:
    """The variants in turn, several times, so that what drifts drifts for all: medians over rounds of medians over
    replays of the slower rank."""
    variants = [v for v in VARIANTS if v != "fp8" or operation == "dispatch"]
    times: dict[str, list[list[float]]] = {variant: [] for variant in variants}
    for _ in range(ROUNDS):
        for variant in variants:
            found = call_all(
                group.ranks, "time_operation", operation=operation, variant=variant, num_tokens=num_tokens, plan=None
            )
            times[variant].append(max(found, key=statistics.median))
    medians = {variant: [statistics.median(run) for run in runs] for variant, runs in times.items()}
    us = {variant: statistics.median(rounds) for variant, rounds in medians.items()}
    costs = [100 * (views / bare - 1) for views, bare in zip(medians["views"], medians["bare"], strict=True)]
    facts: dict[str, Any] = {
        "us": round(us["views"], 2),
        "range": [round(least, 2) for least in extent(medians["views"])],
    }
    facts |= {"bare_us": round(us["bare"], 2), "cost_percent": round(statistics.median(costs), 1)}
    facts["cost_range"] = [round(percent, 1) for percent in extent(costs)]
    if "fp8" in us:
        facts["fp8_us"] = round(us["fp8"], 2)
    if shape == LARGE:
        facts |= {"goal": goal, "met": us["views"] <= goal}
    show("timing", shape=shape, operation=operation, tokens=num_tokens, **facts)


def extent(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def slowest(group: BenchGroup, name: str, /, **arguments: Any) -> tuple[float, list[float]]:
    """Median over replays, of the slowest rank; and that rank's least and most."""
    found = call_all(group.ranks, name, **arguments)
    times = max(found, key=statistics.median)
    return round(statistics.median(times), 2), [round(min(times), 2), round(max(times), 2)]


def run_tune(group: BenchGroup, plans: dict[str, Any]) -> None:
    """plans: operation, variant -> tokens -> list of (part, programs, warps, overlap)."""
    todo: Todo = [
        (operation, variant, int(tokens), tuple(plan))
        for operation, by_variant in plans.items()
        for variant, by_tokens in by_variant.items()
        for tokens, several in by_tokens.items()
        for plan in several
    ]
    precompile(group, LARGE, VARIANTS, todo)
    group.form(LARGE, VARIANTS)
    for operation, variant, num_tokens, plan in todo:
        facts = {"operation": operation, "variant": variant, "tokens": num_tokens, "plan": plan}
        arguments = {"operation": operation, "variant": variant, "num_tokens": num_tokens, "plan": plan}
        try:
            us, spread = slowest(group, "time_operation", **arguments)
        except RuntimeError as error:
            show("tune", **facts, error=str(error)[:200])
            group.form(LARGE, VARIANTS)
            continue
        show("tune", **facts, us=us, range=spread)


def precompile(group: BenchGroup, shape: str, variants: list[str], todo: Todo) -> None:
    """By helpers, all at once; the ranks then find the kernels in the disk cache."""
    distinct = list({(op, v, t if plan is None else 0, plan and (plan[0], *plan[2:])): (op, v, t, plan)
                     for op, v, t, plan in todo}.values())  # fmt: skip
    helpers = [RankProcess(i % group.num_devices) for i in range(min(16, len(distinct)))]
    for i, helper in enumerate(helpers):
        rank = i % group.num_ranks
        helper.start("open_provider", **group.memory("", rank) | {"kind": "vmm"})
        settings = group.settings(shape, rank, variants)
        helper.start("make", **settings | {"name": f"helper{group.num_made}-{i}-"})
        helper.start("compile_plans", plans=distinct[i :: len(helpers)])
    for helper in helpers:
        for _ in range(3):
            helper.finish()
        helper.kill()
