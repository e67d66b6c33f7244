"""The rules of common/placement.py, as examples and as properties over random clusters."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import DecodeConfig
from common.placement import (
    Move,
    PhysicalToLogical,
    initial_placement,
    num_local_experts,
    repair,
)
from common.replica_choice import ReplicaChoice, balancedness


def copies_of(placement: PhysicalToLogical, layer: int, expert: int) -> list[int]:
    return [rank for rank, row in enumerate(placement[layer]) for held in row if held == expert]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """(num_layers, num_logical_experts, max_ranks, num_ranks, num_local) with room for all experts."""
    max_ranks = draw(st.integers(1, 8))
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = draw(st.integers(1, 24))
    num_local = draw(st.integers(-(-num_experts // num_ranks), num_experts))
    return draw(st.integers(1, 3)), num_experts, max_ranks, num_ranks, num_local


@st.composite
def damaged(draw: st.DrawFn) -> tuple[PhysicalToLogical, list[int], int]:
    """(any map whatever, with empty slots and doubles; members; num_logical_experts)."""
    max_ranks, num_experts = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    num_local = draw(st.integers(1, 8))
    row = st.tuples(*[st.integers(-1, num_experts - 1)] * num_local)
    placement = draw(st.tuples(*[st.tuples(*[row] * max_ranks)] * draw(st.integers(1, 2))))
    return placement, sorted(draw(st.sets(st.integers(0, max_ranks - 1)))), num_experts


@pytest.mark.parametrize(
    ("num_ranks", "redundant", "num_experts", "expected"),
    [
        (4, -1, 32, 24),  # three copies of each on four ranks
        (2, -1, 32, 32),  # two ranks: everything on both
        (1, -1, 32, 32),
        (4, 0, 32, 8),
        (4, 0, 30, 8),
        (4, 2, 32, 9),
        (4, 1000, 32, 32),
        (8, -1, 32, 12),
    ],
)
def test_number_of_expert_slots(num_ranks: int, redundant: int, num_experts: int, expected: int) -> None:
    decode = DecodeConfig(num_ranks=num_ranks, num_redundant_experts=redundant)
    assert num_local_experts(decode, num_experts) == expected


@given(clusters())
def test_initial_copies_lie_on_distinct_ranks_and_are_even(cluster: tuple[int, int, int, int, int]) -> None:
    num_layers, num_experts, max_ranks, num_ranks, num_local = cluster
    placement = initial_placement(*cluster)
    assert len(placement) == num_layers
    for layer, rows in enumerate(placement):
        assert [len(row) for row in rows] == [num_local] * max_ranks
        assert all(len(set(row)) == num_local for row in rows)
        counts = [sum(rank < num_ranks for rank in copies_of(placement, layer, e)) for e in range(num_experts)]
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1


@given(st.integers(4, 8), st.integers(1, 64))
def test_any_two_ranks_may_be_lost(num_ranks: int, num_experts: int) -> None:
    decode = DecodeConfig(num_ranks=num_ranks)
    num_local = num_local_experts(decode, num_experts)
    placement = initial_placement(2, num_experts, decode.max_ranks, num_ranks, num_local)
    for lost in itertools.combinations(range(num_ranks), 2):
        members = [rank for rank in range(num_ranks) if rank not in lost]
        assert repair(placement, members, num_experts).moved == ()
        assert repair(placement, members, num_experts).orphans == ()


def test_layers_differ() -> None:
    placement = initial_placement(4, 32, 8, 4, 24)
    assert len({tuple(sorted(rows[0])) for rows in placement}) == 4


def test_too_little_room_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="2 ranks of 3 expert slots cannot hold 8 experts"):
        initial_placement(1, 8, 2, 2, 3)


def test_repair_example() -> None:
    # Expert 3 was on rank 2 only; 0 has three live copies, so one of those makes room.
    before: PhysicalToLogical = (((0, 1), (0, 2), (3, 1), (0, 4)),)
    result = repair(before, [0, 1, 3], 5)
    assert result.moved == (Move(0, 0, 0, 3),)
    assert result.physical_to_logical == (((3, 1), (0, 2), (3, 1), (0, 4)),)
    assert result.orphans == ()


def test_repair_prefers_empty_slots_then_doubles() -> None:
    assert repair((((0, -1), (0, 1), (2, 2)),), [0, 1], 3).moved == (Move(0, 0, 1, 2),)
    assert repair((((0, 1), (1, 1), (0, 2)),), [0, 1], 3).moved == (Move(0, 1, 0, 2),)


def test_repair_spreads_orphans_over_ranks() -> None:
    before: PhysicalToLogical = (((0, 1, 2), (0, 1, 2), (0, 1, 2), (3, 4, 5)),)
    result = repair(before, [0, 1, 2], 6)
    assert sorted(move.rank for move in result.moved) == [0, 1, 2]


def test_repair_without_members_or_room_names_what_is_missing() -> None:
    assert repair((((0, 1), (2, 3)),), [], 2).orphans == ((0, 0), (0, 1))
    assert repair((((0, 1), (2, 3)),), [1], 4).orphans == ((0, 0), (0, 1))


@given(damaged())
@settings(max_examples=300)
def test_repair_moves_only_what_is_needed(case: tuple[PhysicalToLogical, list[int], int]) -> None:
    before, members, num_experts = case
    result = repair(before, members, num_experts)
    after = result.physical_to_logical
    changed = [
        Move(layer, rank, local, after[layer][rank][local])
        for layer, rows in enumerate(before)
        for rank, row in enumerate(rows)
        for local, expert in enumerate(row)
        if after[layer][rank][local] != expert
    ]
    assert sorted(changed, key=repr) == sorted(result.moved, key=repr)
    assert all(move.rank in members for move in result.moved)
    for layer in range(len(before)):
        live_before = {e for rank in members for e in before[layer][rank]} - {-1}
        live_after = {e for rank in members for e in after[layer][rank]} - {-1}
        moved_in = [move.logical_expert for move in result.moved if move.layer == layer]
        left = {expert for at, expert in result.orphans if at == layer}
        assert live_before <= live_after
        assert set(moved_in) == live_after - live_before and len(set(moved_in)) == len(moved_in)
        assert left == set(range(num_experts)) - live_after
        # An orphan is left only where the room is used up: no empty slot, no expert with two copies.
        slots = [e for rank in members for e in after[layer][rank]]
        assert not left or (len(set(slots)) == len(slots) and -1 not in slots)
    assert repair(after, members, num_experts).moved == ()
    assert repair(before, list(reversed(members)), num_experts) == result


def test_repair_of_a_large_model_takes_milliseconds() -> None:
    placement = initial_placement(58, 256, 16, 16, 20)
    started = time.perf_counter()
    result = repair(placement, [rank for rank in range(16) if rank not in (3, 4, 5)], 256)
    took_s = time.perf_counter() - started
    assert result.moved and not result.orphans
    assert took_s < 0.5, took_s


@given(clusters(), st.data())
def test_choice_is_a_live_copy_and_local_when_there_is_one(
    cluster: tuple[int, int, int, int, int], data: st.DataObject
) -> None:
    num_layers, num_experts, max_ranks, _, _ = cluster
    placement = initial_placement(*cluster)
    members = sorted(data.draw(st.sets(st.integers(0, max_ranks - 1), min_size=1)))
    own = data.draw(st.sampled_from(members))
    layer = data.draw(st.integers(0, num_layers - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    logical_TK = rng.integers(0, num_experts, (7, 3))
    rank_TK, local_TK = ReplicaChoice(placement, members, num_experts, own).choose(
        layer, logical_TK, rng.integers(0, 1 << 40, 7)
    )
    for expert, rank, local in zip(logical_TK.ravel(), rank_TK.ravel(), local_TK.ravel(), strict=True):
        live = {at for at in copies_of(placement, layer, int(expert)) if at in members}
        if not live:
            assert rank == -1 and local == -1
            continue
        assert rank in live and placement[layer][rank][local] == expert
        assert rank == own or own not in live


def test_choice_spreads_tokens_over_copies() -> None:
    placement: PhysicalToLogical = (((9,), (0,), (0,), (0,)),)
    choice = ReplicaChoice(placement, [0, 1, 2, 3], 10, own_rank=0)
    rank_TK, _ = choice.choose(0, np.zeros((640, 1), dtype=np.int64), np.arange(640))
    counts = np.bincount(rank_TK.ravel(), minlength=4)
    assert counts[0] == 0 and counts[1:].min() >= 200


def test_choice_is_fast() -> None:
    placement = initial_placement(4, 32, 8, 4, 24)
    choice = ReplicaChoice(placement, [0, 1, 2, 3], 32, own_rank=1)
    rng = np.random.default_rng(0)
    logical_TK, hash_T = rng.integers(0, 32, (32, 4)), np.arange(32)
    best_s = 1.0
    for _ in range(200):
        started = time.perf_counter()
        choice.choose(2, logical_TK, hash_T)
        best_s = min(best_s, time.perf_counter() - started)
    assert best_s < 30e-6


def test_balancedness() -> None:
    even: PhysicalToLogical = (((0,), (1,)), ((0,), (1,)))
    assert balancedness(np.array([[5.0, 5.0], [1.0, 1.0]]), even, [0, 1]) == 1.0
    # Means 5 and 2, largest 10 and 3.
    assert balancedness(np.array([[10.0, 0.0], [1.0, 3.0]]), even, [0, 1]) == pytest.approx(7 / 13)
    assert balancedness(np.zeros((2, 2)), even, [0, 1]) == 1.0
    assert balancedness(np.ones((2, 2)), even, []) == 1.0
    # Two copies share a load.
    assert balancedness(np.array([[6.0, 0.0]]), (((0,), (0,), (1,)),), [0, 1]) == 1.0
