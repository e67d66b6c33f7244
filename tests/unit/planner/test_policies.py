"""Policies by name, and the bound that no policy exceeds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.planner.bounds import balancedness_bound
from services.planner.cluster_shape import UNLIMITED, Budget, ClusterShape
from services.planner.placement_array import balancedness, num_copies, to_array, to_tuples
from services.planner.policies import POLICIES, policy_named


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(sorted(POLICIES)), st.integers(1, 6), st.integers(1, 6))
def test_no_plan_exceeds_the_bound(seed: int, name: str, num_ranks: int, num_local: int) -> None:
    loads = np.random.default_rng(seed).lognormal(0.0, 2.0, (2, num_ranks * num_local))
    shape = ClusterShape((num_local + seed % 3,) * num_ranks)
    placement = policy_named(name)(loads, shape, None, UNLIMITED).placement_LRS
    assert balancedness(loads, placement) <= balancedness_bound(loads, shape) + 1e-9


def test_bound_by_hand() -> None:
    # Mean rank load 3; the hot expert's two copies bear 3.5 each.
    assert balancedness_bound(np.array([[7.0, 1.0, 0.5, 0.5]]), ClusterShape((2, 2, 1))) == pytest.approx(3 / 3.5)
    assert balancedness_bound(np.zeros((1, 4)), ClusterShape((2, 2))) == 1.0


def test_keep_places_orphans_only() -> None:
    current = np.array([[[0, 1], [1, 2]]])
    plan = POLICIES["keep"](np.array([[1.0, 9.0, 1.0, 1.0]]), ClusterShape((2, 2)), current, Budget(total=9))
    assert len(plan.moves_N4) == 1 and plan.moves()[0].logical_expert == 3
    assert (num_copies(plan.placement_LRS, 4) == 1).all()


def test_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no policy 'best'; there are balance_only, balanced, coverage_first, keep"):
        policy_named("best")


def test_arrays_and_tuples_are_the_same_placement() -> None:
    shape = ClusterShape((2, 0, 1))
    placement = (((3, 1), (), (0,)), ((0, 2), (), (1,)))
    array = to_array(placement, shape)
    assert array.tolist() == [[[3, 1], [-1, -1], [0, -1]], [[0, 2], [-1, -1], [1, -1]]]
    assert to_tuples(array, shape) == placement
