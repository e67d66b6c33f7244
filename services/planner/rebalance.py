"""From loads of experts to a placement: as even as can be, few slots loaded, every expert covered. Pure.

Without a present placement, or with an unlimited budget: numbers of copies, packing, some steps of local search, and
ranks relabelled to keep what lies there. With a budget: local search from the present placement only. Experts that come
in groups are first given to hosts by group, and then each host is planned as a cluster of its own.

Shapes: L mixture-of-experts layers, R ranks, S expert slots of the largest rank, E logical experts.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from common.placement import EMPTY, Move, repair
from services.planner.cluster_shape import (
    UNLIMITED,
    BoolArray,
    Budget,
    ClusterShape,
    FloatArray,
    IntArray,
    checked_loads,
)
from services.planner.host_groups import goes_by_groups, split_by_host
from services.planner.local_search import to_placement
from services.planner.placement_array import moves_between, num_copies, rank_loads, to_array, to_tuples
from services.planner.relabel import keep_slots, relabel
from services.planner.replica_counts import replica_counts
from services.planner.search import find_path, pack


@dataclass(frozen=True, slots=True)
class Settings:
    """What balance may cost in coverage, and how long is searched.

    ``coverage_price``: what an expert on one fault domain more is worth, as a change of (load / mean)^8 of one rank.
    ``share_limit``: copies are spent on coverage once no copy bears more than this part of a rank's mean load.
    With slots for two copies of each expert coverage comes first whatever these say.
    """

    coverage_price: float = 0.05
    share_limit: float = 0.5
    coverage_first: bool = False
    refine_steps: int = 16


DEFAULT = Settings()
BALANCE_ONLY = Settings(coverage_price=0.0, share_limit=0.0)
COVERAGE_FIRST = Settings(coverage_price=1e3, coverage_first=True)
# In the score of a layer a deficit is weighed against the largest load itself, not its eighth power.
_PER_LOAD = 1 / 8
# Of a rank's mean load: a layer that a new placement betters by less stays as it is.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True, slots=True)
class Plan:
    """``moves_N4``: layer, rank, local, logical expert of each slot to load; orphans first, then ascending."""

    placement_LRS: IntArray
    moves_N4: IntArray
    orphans: tuple[tuple[int, int], ...]

    def moves(self) -> list[Move]:
        return [Move(*row) for row in self.moves_N4.tolist()]


def rebalance(
    load_LE: npt.NDArray[np.floating] | npt.NDArray[np.integer],
    shape: ClusterShape,
    current_LRS: IntArray | None = None,
    budget: Budget = UNLIMITED,
    settings: Settings = DEFAULT,
) -> Plan:
    """The plan for loads [L, E] (tokens, any scale). Rows of ranks without slots stay as they are in ``current_LRS``.

    Experts without a copy on ranks with slots are placed first, outside the budget; with fewer slots than experts
    ``orphans`` names the (layer, logical expert) pairs that found none. Layers without load keep their placement.
    Raises ValueError for loads that are not finite or negative, and for a placement of another shape or model.
    """
    load = checked_loads(load_LE)
    num_layers, num_experts = load.shape
    num_ranks, width = len(shape.num_local_R), max(shape.num_local_R)
    if current_LRS is None:
        current_LRS = np.full((num_layers, num_ranks, width), EMPTY, dtype=np.int64)
        budget = UNLIMITED
    _check(current_LRS, num_layers, num_experts, num_ranks)
    rows_LRS = np.full((num_layers, num_ranks, max(width, current_LRS.shape[2])), EMPTY, dtype=np.int64)
    rows_LRS[:, :, : current_LRS.shape[2]] = current_LRS
    active, ranks = shape.active(), shape.active_ranks
    before = _fitted(rows_LRS[:, ranks, :width], active, num_experts)
    if goes_by_groups(active, num_experts):
        split = split_by_host(load, active, before, keep=not budget.is_unlimited)
        inner = split.loads(load)
        budget = replace(budget, per_layer=budget.per_layer and -(-budget.per_layer // len(split.rank_HR)))
        after = split.outside(_plan(inner, split.shape, split.inside(before), budget, settings))
    else:
        after = _plan(load, active, before, budget, settings)
    rows_LRS[:, ranks] = EMPTY
    rows_LRS[:, ranks, :width] = after
    absent = np.argwhere(num_copies(after, num_experts) == 0).tolist()
    orphans = tuple((layer, expert) for layer, expert in absent)
    return Plan(rows_LRS, _moves(before, after, ranks, num_experts), orphans)


def _check(current_LRS: IntArray, num_layers: int, num_experts: int, num_ranks: int) -> None:
    if current_LRS.ndim != 3 or current_LRS.shape[:2] != (num_layers, num_ranks):
        raise ValueError(f"placement of shape {current_LRS.shape} for {num_layers} layers and {num_ranks} ranks")
    if current_LRS.min() < EMPTY or current_LRS.max() >= num_experts:
        raise ValueError(f"placement names experts outside 0..{num_experts - 1}")


def _fitted(placement_LRS: IntArray, shape: ClusterShape, num_experts: int) -> IntArray:
    """Without what stands in slots that are no longer there, and without second copies on one rank."""
    fitted = np.where(shape.exists_RS(), placement_LRS, EMPTY)
    if fitted.max() == EMPTY:
        return fitted
    order = np.argsort(fitted, axis=2, kind="stable")
    ordered = np.take_along_axis(fitted, order, axis=2)
    is_second = np.zeros_like(ordered, dtype=np.bool_)
    is_second[:, :, 1:] = ordered[:, :, 1:] == ordered[:, :, :-1]
    np.put_along_axis(fitted, order, np.where(is_second, EMPTY, ordered), axis=2)
    return fitted


def _moves(before_LRS: IntArray, after_LRS: IntArray, ranks: IntArray, num_experts: int) -> IntArray:
    had_none_LE = num_copies(before_LRS, num_experts) == 0
    moves_N4 = moves_between(before_LRS, after_LRS)
    if had_none_LE.any() and not had_none_LE.all():
        moves_N4 = moves_N4[np.argsort(~had_none_LE[moves_N4[:, 0], moves_N4[:, 3]], kind="stable")]
    moves_N4[:, 1] = ranks[moves_N4[:, 1]]
    return moves_N4


def _plan(load_LE: FloatArray, shape: ClusterShape, before: IntArray, budget: Budget, settings: Settings) -> IntArray:
    num_experts = load_LE.shape[1]
    if shape.num_slots >= 2 * num_experts and len(shape.num_local_R) > 1:
        settings = replace(settings, coverage_price=COVERAGE_FIRST.coverage_price, coverage_first=True)
    has_load_L: BoolArray = np.asarray(load_LE.any(axis=1))
    is_new_L: BoolArray = np.asarray((before == EMPTY).all(axis=(1, 2)))
    even_LE = np.where(has_load_L[:, None], load_LE, 1.0)
    scaled_LE = even_LE * (len(shape.num_local_R) / even_LE.sum(axis=1, keepdims=True))
    if is_new_L.all():
        return _from_scratch(scaled_LE, shape, settings)
    repaired = _repaired(before, shape, num_experts)
    after = _bettered(scaled_LE, load_LE.sum(axis=1), shape, repaired, budget, settings)
    if budget.is_unlimited or is_new_L.any():
        fresh = relabel(_from_scratch(scaled_LE, shape, settings), before, shape, scaled_LE)
        take_L = _is_worth_it(scaled_LE, fresh, after) if budget.is_unlimited else is_new_L
        after = np.where(take_L[:, None, None], fresh, after)
    after = np.where((has_load_L | is_new_L)[:, None, None], after, repaired)
    return keep_slots(after, before, num_experts)


def _repaired(before: IntArray, shape: ClusterShape, num_experts: int) -> IntArray:
    """Orphans placed as the monitor would place them, in layers that are not new."""
    is_hurt_L = (num_copies(before, num_experts) == 0).any(axis=1) & (before != EMPTY).any(axis=(1, 2))
    if not is_hurt_L.any():
        return before
    repaired = before.copy()
    hurt = to_tuples(before[is_hurt_L], shape)
    repaired[is_hurt_L] = to_array(repair(hurt, range(before.shape[1]), num_experts).physical_to_logical, shape)
    return repaired


def _from_scratch(scaled_LE: FloatArray, given: ClusterShape, settings: Settings) -> IntArray:
    # Ranks are equal before the first copy is placed: which comes first must not depend on how they are numbered.
    order, hosts = given.canonical_order(), given.host_R or (0,) * len(given.num_local_R)
    shape = ClusterShape(tuple(given.num_local_R[rank] for rank in order), tuple(hosts[rank] for rank in order))
    counts_LE = replica_counts(
        scaled_LE,
        shape.num_slots,
        len(shape.num_local_R),
        settings.share_limit,
        coverage_first=settings.coverage_first,
    )
    packed, most_L = pack(scaled_LE, counts_LE, shape), np.full(len(scaled_LE), shape.num_slots)
    path = find_path(scaled_LE, packed, shape, settings.coverage_price, settings.refine_steps, most_L)
    best_LP = path.best(np.ones(len(scaled_LE)), settings.coverage_price * _PER_LOAD, shape.num_slots**2)
    placement_LRS = to_placement(best_LP, len(order), scaled_LE.shape[1])
    return placement_LRS[:, np.argsort(order)]


def _bettered(
    scaled_LE: FloatArray,
    weight_L: FloatArray,
    shape: ClusterShape,
    start: IntArray,
    budget: Budget,
    settings: Settings,
) -> IntArray:
    """Local search within the budget; an unlimited one is left to the plan from scratch."""
    if budget.is_unlimited:
        return start
    num_layers = len(scaled_LE)
    total = shape.num_slots * num_layers if budget.total is None else budget.total
    # Layers differ in what they need, so each may take up to three times its part of the whole.
    most = min(-(-3 * total // num_layers), shape.num_slots if budget.per_layer is None else budget.per_layer)
    # A layer that needs twice its part is the exception; a step loads one slot or two.
    max_steps, most_L = min(-(-5 * total // (4 * num_layers)), most), np.full(num_layers, most)
    path = find_path(scaled_LE, start, shape, settings.coverage_price, max_steps, most_L)
    best_LP = path.best(weight_L, settings.coverage_price * _PER_LOAD, total)
    return to_placement(best_LP, len(shape.num_local_R), scaled_LE.shape[1])


def _is_worth_it(scaled_LE: FloatArray, fresh: IntArray, present: IntArray) -> BoolArray:
    """[L]: layers that a new placement makes more even, or better covered, than the present one."""
    num_experts = scaled_LE.shape[1]
    gain_L = rank_loads(scaled_LE, present).max(axis=1) - rank_loads(scaled_LE, fresh).max(axis=1)
    covered_L = (num_copies(fresh, num_experts) > 1).sum(axis=1) - (num_copies(present, num_experts) > 1).sum(axis=1)
    is_incomplete_L = (present == EMPTY).sum(axis=(1, 2)) > (fresh == EMPTY).sum(axis=(1, 2))
    return np.asarray((gain_L > _LEAST_GAIN) | (covered_L > 0) | is_incomplete_L)
