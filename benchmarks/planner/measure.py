"""What is measured of plans: balance on the loads planned for and on the next window, moves, coverage, time."""

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

from benchmarks.planner.cases import CASES, DSV3, LOADS, Case, drifted, lognormal, trace
from benchmarks.planner.greedy import greedy_placement, naive_repair
from common.placement import repair
from services.planner.bounds import balancedness_bound
from services.planner.cluster_shape import Budget, ClusterShape, FloatArray, IntArray
from services.planner.placement_array import (
    balancedness,
    num_gained,
    num_orphans_of_single_losses,
    to_array,
    to_tuples,
)
from services.planner.policies import POLICIES
from services.planner.rebalance import rebalance

P = ParamSpec("P")
T = TypeVar("T")
Row = dict[str, float | str]
_DRIFT, _NEXT_DRIFT, _BUDGET = 0.3, 0.1, 0.05


def timed(repeats: int, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, Row]:
    """What make(...) returns, and the least CPU and wall time of ``repeats`` calls in ms. One call more warms up."""
    result = make(*args, **kwargs)
    cpu, wall = [], []
    for _ in range(repeats):
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        make(*args, **kwargs)
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    return result, {"cpu_ms": 1e3 * min(cpu), "wall_ms": 1e3 * min(wall)}


def _scored(case: Case, placement: IntArray, load_LE: FloatArray) -> Row:
    by_rank = num_orphans_of_single_losses(placement, case.num_experts, tuple(range(case.num_ranks)))
    by_host = num_orphans_of_single_losses(placement, case.num_experts, case.shape.host_R)
    return {
        "balancedness": balancedness(load_LE, placement),
        "orphans_per_rank_loss": float(by_rank.mean()),
        "orphans_per_host_loss": float(by_host.mean()) if case.num_hosts > 1 else float("nan"),
    }


def _greedy(case: Case, load_LE: FloatArray) -> IntArray:
    return greedy_placement(load_LE, case.num_slots, case.num_ranks, case.num_groups, case.greedy_hosts)


def fresh_plans(seed: int, repeats: int) -> list[Row]:
    """Plans from nothing, scored on the loads planned for."""
    rows: list[Row] = []
    for case in CASES:
        for name, make_load in LOADS.items():
            load = make_load(case, np.random.default_rng(seed))
            head: Row = {"case": case.name, "loads": name, "bound": balancedness_bound(load, case.shape)}
            placement, times = timed(repeats, _greedy, case, load)
            rows.append({**head, "policy": "greedy", **_scored(case, placement, load), **times})
            for policy in ("balanced", "balance_only", "coverage_first"):
                plan, times = timed(repeats, POLICIES[policy], load, case.shape, None, Budget())
                rows.append({**head, "policy": policy, **_scored(case, plan.placement_LRS, load), **times})
    return rows


def drifting(seed: int, repeats: int) -> list[Row]:
    """Loads drift by 0.3; who may move 5% of the slots starts from the placement that it planned before."""
    rows: list[Row] = []
    for case in CASES:
        for name, make_load in LOADS.items():
            rng = np.random.default_rng(seed)
            before = make_load(case, rng)
            load = drifted(before, _DRIFT, rng)
            after = drifted(load, _NEXT_DRIFT, rng)
            num_slots = case.num_layers * case.num_slots
            old_greedy, ours = _greedy(case, before), rebalance(before, case.shape).placement_LRS
            budget = Budget(total=int(_BUDGET * num_slots))
            greedy, greedy_times = timed(repeats, _greedy, case, load)
            plan, times = timed(repeats, rebalance, load, case.shape, ours, budget)
            known = rebalance(after, case.shape, ours, budget).placement_LRS
            for policy, old, new, spent in (
                ("keep", ours, ours, {}),
                ("greedy, all anew", old_greedy, greedy, greedy_times),
                ("balanced, 5%", ours, plan.placement_LRS, times),
                ("balanced, 5%, had it known the next window", ours, known, {}),
            ):
                rows.append(
                    {
                        "case": case.name,
                        "loads": name,
                        "policy": policy,
                        "balancedness": balancedness(load, new),
                        "next_window": balancedness(after, new),
                        "moved": num_gained(old, new, case.num_experts) / num_slots,
                        **spent,
                    }
                )
    return rows


def frontier(seed: int, repeats: int) -> list[Row]:
    """Balancedness against the part of slots that may move, DSV3 on 32 ranks, drift 0.3, mean over three seeds."""
    rows: list[Row] = []
    num_slots = DSV3.num_layers * DSV3.num_slots
    for part in (0.0, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3):
        scores, moved, cpu = [], [], []
        for number in range(3):
            rng = np.random.default_rng(seed + number)
            before = lognormal(DSV3, rng)
            load = drifted(before, _DRIFT, rng)
            old = rebalance(before, DSV3.shape).placement_LRS
            budget = Budget(total=int(part * num_slots))
            plan, times = timed(repeats, rebalance, load, DSV3.shape, old, budget)
            scores.append(balancedness(load, plan.placement_LRS))
            moved.append(len(plan.moves_N4) / num_slots)
            cpu.append(float(times["cpu_ms"]))
        rows.append(
            {
                "budget": part,
                "moved": float(np.mean(moved)),
                "balancedness": float(np.mean(scores)),
                "least": min(scores),
                "largest": max(scores),
                "cpu_ms": float(np.mean(cpu)),
            }
        )
    return rows


def losses(seed: int, repeats: int) -> list[Row]:
    """Each single rank lost: time of the repair, moves, and balance afterwards, worst of all losses."""
    rows: list[Row] = []
    for case in CASES:
        load = lognormal(case, np.random.default_rng(seed))
        start = rebalance(load, case.shape).placement_LRS
        tuples = to_tuples(start, case.shape)
        ours, naive, moves, cpu, wall, orphans = [], [], [], [], [], 0
        for lost in range(case.num_ranks):
            members = [rank for rank in range(case.num_ranks) if rank != lost]
            repaired, times = timed(repeats, repair, tuples, members, case.num_experts)
            cpu.append(float(times["cpu_ms"]))
            wall.append(float(times["wall_ms"]))
            moves.append(len(repaired.moved))
            orphans += len(repaired.orphans)
            left = to_array(repaired.physical_to_logical, case.shape)[:, members]
            ours.append(balancedness(load, left))
            naive.append(balancedness(load, naive_repair(start, lost, case.num_experts)[0]))
        rows.append(
            {
                "case": case.name,
                "moves": max(moves),
                "without_slot": orphans,
                "balancedness": min(ours),
                "naive_balancedness": min(naive),
                "cpu_ms": max(cpu),
                "wall_ms": max(wall),
            }
        )
    return rows


def recorded() -> list[Row]:
    """The embedded model on 8 ranks of 5 slots: a plan after every window, judged on it and on the next one."""
    _, window_WLE = trace()
    num_windows, num_layers, num_experts = window_WLE.shape
    shape = ClusterShape((5,) * 8)
    num_slots = num_layers * shape.num_slots
    rows: list[Row] = []
    budgets: dict[str, Budget | None] = {
        "keep the first plan": Budget(total=0),
        "balanced, 5%": Budget(total=num_slots // 20),
        "balanced, 20%": Budget(total=num_slots // 5),
        "balanced, any number": Budget(),
        "greedy, all anew": None,
    }
    for name, budget in budgets.items():
        placement = rebalance(window_WLE[0], shape).placement_LRS
        now, following, moved = [], [], []
        for number in range(1, num_windows - 1):
            load = window_WLE[number]
            if budget is None:
                new = greedy_placement(load, shape.num_slots, 8)
            else:
                new = rebalance(load, shape, placement, budget).placement_LRS
            moved.append(num_gained(placement, new, num_experts) / num_slots)
            now.append(balancedness(load, new))
            following.append(balancedness(window_WLE[number + 1], new))
            placement = new
        rows.append(
            {
                "policy": name,
                "balancedness": float(np.mean(now)),
                "next_window": float(np.mean(following)),
                "moved": float(np.mean(moved)),
            }
        )
    return rows
