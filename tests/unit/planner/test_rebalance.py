"""Plans for expert placement: what every plan keeps to, over random clusters, and how good plans are on known loads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.planner.greedy import greedy_placement
from common.placement import EMPTY
from services.planner.cluster_shape import UNLIMITED, Budget, ClusterShape, FloatArray, IntArray
from services.planner.placement_array import (
    balancedness,
    held_by,
    moves_between,
    num_copies,
    num_gained,
    num_orphans_of_single_losses,
)
from services.planner.rebalance import BALANCE_ONLY, COVERAGE_FIRST, DEFAULT, Plan, Settings, rebalance


def lognormal(seed: int, num_layers: int, num_experts: int, sigma: float = 1.0) -> FloatArray:
    return np.random.default_rng(seed).lognormal(0.0, sigma, (num_layers, num_experts))


@st.composite
def cases(draw: st.DrawFn) -> tuple[FloatArray, ClusterShape, IntArray | None, Budget, Settings]:
    """Loads with zeros and outliers, uneven ranks on some hosts, any present placement with holes and doubles."""
    num_layers, num_experts, num_ranks = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 7))
    num_local = tuple(draw(st.integers(0, 6)) for _ in range(num_ranks))
    if not any(num_local):
        num_local = (*num_local[:-1], 3)
    hosts = tuple(draw(st.integers(0, 2)) for _ in range(num_ranks))
    shape = ClusterShape(num_local, hosts, draw(st.sampled_from([1, 2, 4])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = 10.0 ** draw(st.integers(-300, 300))
    loads = rng.lognormal(0.0, 2.0, (num_layers, num_experts)) * rng.integers(0, 2, (num_layers, num_experts)) * scale
    current = None
    if draw(st.booleans()):
        current = rng.integers(EMPTY, num_experts, (num_layers, num_ranks, draw(st.integers(1, 7))))
    limits = st.none() | st.integers(0, 20)
    budget = Budget(draw(limits), draw(limits))
    return loads, shape, current, budget, draw(st.sampled_from([DEFAULT, BALANCE_ONLY, COVERAGE_FIRST]))


def slots_of_active(plan: Plan, shape: ClusterShape) -> IntArray:
    return plan.placement_LRS[:, shape.active_ranks, : max(shape.num_local_R)]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_rules_that_every_plan_keeps(case: tuple[FloatArray, ClusterShape, IntArray | None, Budget, Settings]) -> None:
    loads, shape, current, budget, chosen = case
    plan = rebalance(loads, shape, current, budget, chosen)
    num_experts = loads.shape[1]
    active = slots_of_active(plan, shape)
    counts = num_copies(active, num_experts)
    # Every expert has a copy; where slots are fewer than experts, every slot is used and the rest is named.
    missing = {(int(layer), int(expert)) for layer, expert in np.argwhere(counts == 0)}
    assert set(plan.orphans) == missing
    num_places = sum(min(num_local, num_experts) for num_local in shape.num_local_R)
    assert not missing or shape.num_slots < num_experts
    assert (counts.sum(axis=1) <= num_places).all()
    if missing:
        assert (counts.sum(axis=1) == shape.num_slots).all()
    # Rows hold no more than their slots, and no expert twice.
    exists = shape.active().exists_RS()
    assert (active[:, ~exists] == EMPTY).all()
    assert (held_by(active, num_experts).sum(axis=2) == (active != EMPTY).sum(axis=2)).all()
    # Rows of ranks that take no experts are left alone.
    if current is not None:
        idle = [rank for rank, num_local in enumerate(shape.num_local_R) if num_local == 0]
        assert (plan.placement_LRS[:, idle, : current.shape[2]] == current[:, idle]).all()
    again = rebalance(loads, shape, current, budget, chosen)
    assert (again.placement_LRS == plan.placement_LRS).all() and (again.moves_N4 == plan.moves_N4).all()


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 30), st.integers(0, 12))
def test_budget_is_kept_where_nothing_was_orphaned(
    case: tuple[FloatArray, ClusterShape, IntArray | None, Budget, Settings], total: int, per_layer: int
) -> None:
    loads, shape, _, _, chosen = case
    if shape.num_slots < loads.shape[1]:
        return
    start = rebalance(loads[:, ::-1], shape, None, UNLIMITED, chosen).placement_LRS
    plan = rebalance(loads, shape, start, Budget(total, per_layer), chosen)
    assert len(plan.moves_N4) <= total
    assert np.bincount(plan.moves_N4[:, 0], minlength=1).max() <= per_layer
    before, after = start[:, shape.active_ranks], plan.placement_LRS[:, shape.active_ranks]
    assert num_gained(before, after, loads.shape[1]) == len(plan.moves_N4) == len(moves_between(before, after))


def test_moves_turn_the_present_placement_into_the_planned_one() -> None:
    shape = ClusterShape((9, 7, 0, 9, 9), (0, 0, 1, 1, 1))
    start = rebalance(lognormal(1, 3, 24), shape).placement_LRS
    plan = rebalance(lognormal(2, 3, 24), shape, start, Budget(total=30))
    moved = start.copy()
    for move in plan.moves():
        moved[move.layer, move.rank, move.local] = move.logical_expert
    assert (moved == plan.placement_LRS).all()
    assert len(plan.moves_N4) > 0


@pytest.mark.parametrize("seed", range(3))
def test_permuted_ranks_and_experts_give_as_good_a_plan(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = ClusterShape((9,) * 8, (0, 0, 1, 1, 2, 2, 3, 3))
    loads, drifted = lognormal(seed, 4, 64), lognormal(seed, 4, 64) * lognormal(seed + 9, 4, 64, 0.3)
    start = rebalance(loads, shape).placement_LRS
    experts, ranks = rng.permutation(64), rng.permutation(8)
    renamed = np.argsort(experts)
    other_shape = ClusterShape((9,) * 8, tuple(shape.host_R[rank] for rank in ranks))
    fresh = rebalance(loads[:, experts], other_shape).placement_LRS
    assert balancedness(loads[:, experts], fresh) == pytest.approx(balancedness(loads, start), abs=1e-9)
    for budget in (Budget(total=20), Budget(per_layer=8), UNLIMITED):
        plan = rebalance(drifted, shape, start, budget)
        other = rebalance(drifted[:, experts], other_shape, renamed[start[:, ranks]], budget)
        assert len(other.moves_N4) == len(plan.moves_N4)
        even = balancedness(drifted, plan.placement_LRS)
        assert balancedness(drifted[:, experts], other.placement_LRS) == pytest.approx(even, abs=1e-9)


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "num_slots", "num_ranks", "num_hosts", "num_groups"),
    [
        (8, 256, 288, 32, 4, 1),
        (8, 256, 288, 32, 4, 8),
        (8, 256, 320, 64, 8, 1),
        (8, 128, 144, 8, 1, 1),
        (8, 64, 72, 8, 1, 1),
        (8, 64, 64, 8, 1, 1),
    ],
)
def test_at_least_as_even_as_greedy(
    num_layers: int, num_experts: int, num_slots: int, num_ranks: int, num_hosts: int, num_groups: int
) -> None:
    hosts = tuple(rank * num_hosts // num_ranks for rank in range(num_ranks))
    shape = ClusterShape((num_slots // num_ranks,) * num_ranks, hosts, num_groups)
    loads = lognormal(5, num_layers, num_experts)
    greedy_hosts = num_hosts if num_groups > 1 else 1
    greedy = greedy_placement(loads, num_slots, num_ranks, num_groups, greedy_hosts)
    assert balancedness(loads, rebalance(loads, shape).placement_LRS) >= balancedness(loads, greedy)


def test_five_percent_of_slots_after_drift() -> None:
    loads = lognormal(6, 58, 256)
    shape = ClusterShape((9,) * 32)
    start = rebalance(loads, shape).placement_LRS
    drifted = loads * lognormal(7, 58, 256, 0.3)
    plan = rebalance(drifted, shape, start, Budget(total=58 * 288 // 20))
    assert balancedness(drifted, start) < 0.8
    assert balancedness(drifted, plan.placement_LRS) >= 0.95
    assert len(plan.moves_N4) <= 58 * 288 // 20


@pytest.mark.parametrize("hosts", [(0,) * 8, (0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3)])
def test_no_single_loss_orphans_anything_when_slots_suffice(hosts: tuple[int, ...]) -> None:
    shape = ClusterShape((5,) * 8, hosts)
    domains = hosts if len(set(hosts)) > 1 else tuple(range(8))
    loads = lognormal(3, 4, 20, 2.0)
    start = rebalance(loads, shape).placement_LRS
    later = rebalance(lognormal(4, 4, 20, 2.0), shape, start, Budget(per_layer=10)).placement_LRS
    for placement in (start, later):
        assert num_orphans_of_single_losses(placement, 20, domains).tolist() == [0] * len(set(domains))


def test_fewest_orphans_when_slots_do_not_suffice() -> None:
    shape = ClusterShape((5,) * 6)
    plan = rebalance(lognormal(3, 4, 20, 2.0), shape, settings=COVERAGE_FIRST)
    assert (num_copies(plan.placement_LRS, 20).max(axis=1) == 2).all()
    assert num_orphans_of_single_losses(plan.placement_LRS, 20, tuple(range(6))).sum() == 4 * 10


def test_coverage_price_buys_coverage() -> None:
    loads, shape = lognormal(8, 8, 128), ClusterShape((18,) * 8)
    single = {
        name: int((num_copies(rebalance(loads, shape, settings=chosen).placement_LRS, 128) == 1).sum())
        for name, chosen in (("none", BALANCE_ONLY), ("default", DEFAULT), ("first", COVERAGE_FIRST))
    }
    assert single["first"] == 8 * (128 - 16)
    assert single["first"] <= single["default"] < single["none"]


def test_one_hot_expert_gets_a_copy_on_every_rank() -> None:
    loads = np.zeros((1, 8))
    loads[0, 3] = 1e308
    placement = rebalance(loads, ClusterShape((4,) * 4)).placement_LRS
    assert num_copies(placement, 8)[0, 3] == 2  # slots for two copies of each: coverage first
    placement = rebalance(loads, ClusterShape((3,) * 4)).placement_LRS
    assert num_copies(placement, 8)[0, 3] == 4
    assert balancedness(loads / 1e308, placement) == 1.0


def test_nothing_moves_without_load_nor_at_the_same_load() -> None:
    shape = ClusterShape((9,) * 8)
    loads = lognormal(2, 3, 64)
    start = rebalance(loads, shape).placement_LRS
    for budget in (UNLIMITED, Budget(total=50)):
        assert len(rebalance(np.zeros((3, 64)), shape, start, budget).moves_N4) == 0
    assert len(rebalance(loads * 7, shape, start).moves_N4) == 0
    idle_layer = lognormal(4, 3, 64)
    idle_layer[1] = 0.0
    assert set(rebalance(idle_layer, shape, start).moves_N4[:, 0].tolist()) == {0, 2}


def test_scale_up_and_down() -> None:
    loads = lognormal(2, 3, 64)
    three = ClusterShape((24, 24, 24, 0))
    start = rebalance(loads, three).placement_LRS
    start[:, 3] = EMPTY
    four = ClusterShape((24, 24, 24, 24))
    up = rebalance(loads, four, start, Budget(per_layer=24))
    assert balancedness(loads, up.placement_LRS) > 0.95
    assert set(up.moves_N4[:, 1].tolist()) >= {3}
    leaving = ClusterShape((24, 0, 24, 24))
    down = rebalance(loads, leaving, up.placement_LRS, Budget(per_layer=24))
    left = down.placement_LRS[:, [0, 2, 3]]
    assert (num_copies(left, 64) > 0).all() and down.orphans == ()
    # What only the leaving rank held is loaded first.
    only_there = num_copies(up.placement_LRS[:, [0, 2, 3]], 64) == 0
    first = down.moves_N4[: int(only_there.sum())]
    assert only_there[first[:, 0], first[:, 3]].all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_loads_are_named(bad: float) -> None:
    loads = np.ones((2, 4))
    loads[1, 2] = bad
    with pytest.raises(ValueError, match=r"load of expert 2 in layer 1 is .*, not a number of tokens"):
        rebalance(loads, ClusterShape((4,)))


def test_bad_placements_are_named() -> None:
    loads, shape = np.ones((2, 4)), ClusterShape((4, 4))
    with pytest.raises(ValueError, match="2 layers and 2 ranks"):
        rebalance(loads, shape, np.zeros((2, 3, 4), dtype=np.int64))
    with pytest.raises(ValueError, match=r"experts outside 0\.\.3"):
        rebalance(loads, shape, np.full((2, 2, 4), 4))
    with pytest.raises(ValueError, match="no rank has expert slots"):
        ClusterShape((0, 0))
