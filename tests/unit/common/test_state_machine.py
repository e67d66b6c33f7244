"""Moves of the table happen, all others raise and change nothing."""

import doctest
from enum import Enum
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.state_machine
from common.state_machine import HISTORY_LENGTH, IllegalTransition, StateMachine, transition_table


class Phase(Enum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"


MOVES = transition_table({Phase.QUEUED: {Phase.RUNNING}, Phase.RUNNING: {Phase.QUEUED, Phase.DONE}, Phase.DONE: set()})


def machine() -> StateMachine[Phase]:
    return StateMachine("request 7", MOVES, Phase.QUEUED, now=1.0)


def test_the_example_of_the_module() -> None:
    results = doctest.testmod(common.state_machine)
    assert results.attempted >= 5
    assert results.failed == 0


def test_story_tells_start_moves_and_causes() -> None:
    request = machine()
    request.move(Phase.RUNNING, now=1.25, cause="admitted")
    request.move(Phase.DONE, now=2.0)
    assert request.state is Phase.DONE
    assert request.story() == [
        "request 7: queued at 1.000",
        "request 7: queued -> running at 1.250 (admitted)",
        "request 7: running -> done at 2.000",
    ]


def test_an_illegal_move_raises_with_the_story_and_changes_nothing() -> None:
    request = machine()
    request.move(Phase.RUNNING, now=1.25, cause="admitted")
    before = request.story()
    with pytest.raises(IllegalTransition) as caught:
        request.move(Phase.RUNNING, now=1.5, cause="admitted twice")
    assert caught.value.story == before
    assert str(caught.value).startswith("request 7: running -> running (admitted twice) is no legal move; ")
    assert "queued -> running at 1.250 (admitted)" in str(caught.value)
    assert (request.state, request.story()) == (Phase.RUNNING, before)


@pytest.mark.parametrize(("source", "target"), list(product(Phase, Phase)))
def test_exactly_the_moves_of_the_table_are_legal(source: Phase, target: Phase) -> None:
    at = StateMachine("any", MOVES, source, now=0.0)
    if target in MOVES[source]:
        at.move(target, now=1.0)
        assert at.state is target
    else:
        with pytest.raises(IllegalTransition):
            at.move(target, now=1.0)
        assert at.state is source


def test_a_table_needs_a_row_for_every_state() -> None:
    with pytest.raises(ValueError, match="without a row for DONE, RUNNING"):
        transition_table({Phase.QUEUED: {Phase.RUNNING}})


@given(st.lists(st.sampled_from(Phase), max_size=3 * HISTORY_LENGTH))
def test_history_is_bounded_and_a_chain(targets: list[Phase]) -> None:
    request, accepted = machine(), 0
    for number, target in enumerate(targets):
        if request.may(target):
            request.move(target, now=float(number))
            accepted += 1
    story = request.story()
    assert len(story) == 1 + min(accepted, HISTORY_LENGTH)
    if accepted:
        assert f"-> {request.state.value} at" in story[-1]
