"""Steps towards a placement: each can be served, each fits into the memory of every rank, and they arrive."""

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from common.placement import EMPTY, PhysicalToLogical
from common.placement_steps import moves_to, next_step

NUM_RANKS, NUM_LOCAL, NUM_EXPERTS = 3, 3, 6


def test_a_rank_that_only_changes_slots_loads_nothing() -> None:
    before, after = (((0, 1), (2, 3)),), (((1, 0), (3, 4)),)
    assert [(move.rank, move.logical_expert) for move in moves_to(before, after, (0, 1))] == [(1, 4)]
    assert next_step(before, before, (0, 1), 1) is None


def test_the_only_copies_of_two_experts_change_places_in_one_step() -> None:
    before, after = (((0,), (1,)),), (((1,), (0,)),)
    assert next_step(before, after, (0, 1), 1) == after


def test_layers_are_taken_whole_while_they_fit() -> None:
    before = (((0, 1), (2, 3)), ((0, 1), (2, 3)))
    after = (((2, 3), (0, 1)), ((2, 1), (0, 3)))
    assert next_step(before, after, (0, 1), 2) == (after[0], before[1])
    assert next_step((after[0], before[1]), after, (0, 1), 2) == after


def some_placement(random: Random) -> PhysicalToLogical:
    def row() -> tuple[int, ...]:
        return tuple(random.choice((e, e, EMPTY)) for e in random.sample(range(NUM_EXPERTS), NUM_LOCAL))

    return tuple(tuple(row() for _ in range(NUM_RANKS)) for _ in range(2))


def held(placement: PhysicalToLogical) -> set[tuple[int, int]]:
    return {(layer, e) for layer, rows in enumerate(placement) for row in rows for e in row if e != EMPTY}


@given(st.integers(), st.integers(NUM_LOCAL, 2 * NUM_LOCAL))
def test_steps_arrive_and_lose_nothing(seed: int, room: int) -> None:
    random = Random(seed)
    before, after = some_placement(random), some_placement(random)
    members, present, lasting = range(NUM_RANKS), before, held(before) & held(after)
    for _ in range(20):
        step = next_step(present, after, members, room)
        if step is None:
            break
        moves = moves_to(present, step, members)
        assert all(sum(move.rank == rank for move in moves) <= room for rank in members)
        assert lasting <= held(step), "an expert of both placements has lost its last copy on the way"
        present = step
    assert present == after
