"""The compiled loops of the planner against their specifications in numpy: the same placements, to the bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cpu import placement_search
from kernels.cpu.library import KernelsNotBuilt
from services.planner import replica_counts, search
from services.planner.cluster_shape import ClusterShape, FloatArray
from services.planner.local_search import LocalSearch
from services.planner.packing import largest_first, place
from services.planner.rebalance import rebalance

NUM_LAYERS = 3


@st.composite
def shapes(draw: st.DrawFn) -> ClusterShape:
    num_local = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    hosts = draw(st.sampled_from([(), tuple(rank % 2 for rank in range(len(num_local)))]))
    return ClusterShape(tuple(num_local), hosts)


def loads(num_experts: int, seed: int, has_ties: bool) -> FloatArray:
    """Whole numbers, zeros among them, or numbers of which no two are equal."""
    rng = np.random.default_rng(seed)
    drawn = (
        rng.integers(0, 4, (NUM_LAYERS, num_experts)) if has_ties else rng.lognormal(0, 1, (NUM_LAYERS, num_experts))
    )
    return drawn.astype(np.float64)


@settings(max_examples=200)
@given(shapes(), st.integers(1, 40), st.integers(0, 999), st.booleans(), st.sampled_from([0.0, 0.05, 1e3]), st.data())
def test_search_takes_the_steps_of_its_specification(
    shape: ClusterShape, num_experts: int, seed: int, has_ties: bool, price: float, data: st.DataObject
) -> None:
    load_LE = loads(num_experts, seed, has_ties)
    load_LE *= len(shape.num_local_R) / np.maximum(load_LE.sum(axis=1, keepdims=True), 1.0)
    rng = np.random.default_rng(seed)
    width = max(shape.num_local_R)
    placement_LRS = np.full((NUM_LAYERS, len(shape.num_local_R), width), -1)
    for layer, rank in np.ndindex(placement_LRS.shape[:2]):
        held = rng.permutation(np.arange(-2, num_experts))[: shape.num_local_R[rank]]
        placement_LRS[layer, rank, : len(held)] = np.maximum(held, -1)
    most_L, max_steps = rng.integers(0, 9, NUM_LAYERS), data.draw(st.integers(0, 12))
    path = search.find_path(load_LE, placement_LRS, shape, price, max_steps, most_L)
    expected = LocalSearch(load_LE, placement_LRS, shape, price).run(max_steps, most_L)
    for name in ("start_LP", "changed_LN4", "cost_NL", "largest_NL", "deficit_NL"):
        assert np.array_equal(getattr(path, name), getattr(expected, name)), name


@given(shapes(), st.integers(1, 12), st.integers(0, 999), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_copies_and_their_places_are_those_of_their_specification(
    shape: ClusterShape, num_experts: int, seed: int, has_ties: bool, coverage_first: bool, share_limit: float
) -> None:
    load_LE, num_ranks = loads(num_experts, seed, has_ties), len(shape.num_local_R)
    if shape.num_slots < num_experts:
        return
    num_more = min(shape.num_slots, num_experts * num_ranks) - num_experts
    compiled, expected = (np.ones((NUM_LAYERS, num_experts), dtype=np.int64) for _ in range(2))
    placement_search.replica_counts(load_LE, compiled, num_more, num_ranks, share_limit, coverage_first)
    replica_counts.add_copies(load_LE, expected, num_more, num_ranks, share_limit, coverage_first)
    assert np.array_equal(compiled, expected)
    packed = search.pack(load_LE, compiled, shape)
    expected_LRS = np.full_like(packed, -1)
    place(*largest_first(load_LE, compiled), shape, expected_LRS)
    assert np.array_equal(packed, expected_LRS)


def test_without_compiled_kernels_plans_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, load_LE = ClusterShape((3, 3, 3, 3), (0, 0, 1, 1)), loads(8, 3, has_ties=False)
    compiled = rebalance(load_LE, shape)

    def missing(*_: object) -> None:
        raise KernelsNotBuilt("not built")

    for name in ("search", "pack", "replica_counts"):
        monkeypatch.setattr(placement_search, name, missing)
    assert np.array_equal(rebalance(load_LE, shape).placement_LRS, compiled.placement_LRS)


def test_what_does_not_fit_is_refused() -> None:
    limits = placement_search.SearchLimits(1, 1, 1, 1, 0.0)
    exists = np.ones(2, dtype=np.bool_)
    with pytest.raises(ValueError, match="do not fit"):
        placement_search.search(
            np.ones((1, 2)), np.array([[0, 5]]), np.zeros(2, np.int64), exists, np.ones(1, np.int64), limits
        )
    with pytest.raises(ValueError, match="do not fit"):
        placement_search.replica_counts(np.ones((1, 2)), np.ones((1, 3), dtype=np.int64), 1, 1, 0.5, False)
