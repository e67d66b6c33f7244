"""Loads fade with the window; the first plan is one that the monitor takes; figures are told when they change."""

import math

import numpy as np
import pytest

from common.config import DecodeConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import Member, Placement, View
from common.placement import num_local_experts
from services.planner.expert_load import ExpertLoad
from services.planner.plan import Assessor, first_plan

PLANNER = ProcessId("planner-1")


def view(version: int, rows: tuple[tuple[int, ...], ...]) -> View:
    members = tuple(
        Member(Rank(rank), Incarnation(1), ProcessId(f"d{rank}"), "h", "e", "x") for rank in range(len(rows))
    )
    return View(ProcessId("m"), 1, Epoch(2), members, Placement(version, (rows,)))


def test_tokens_add_up_and_fade_to_one_over_e_after_the_window() -> None:
    load = ExpertLoad(1, 2, window_s=60.0, now=100.0)
    assert load.on_report(((8, 0),), 100.0)
    assert load.on_report(((2, 4),), 100.0)
    assert load.at(100.0).tolist() == [[10.0, 4.0]]
    assert load.at(160.0)[0, 0] == pytest.approx(10.0 / math.e)
    assert load.at(160.0)[0, 0] == pytest.approx(10.0 / math.e), "asking twice must not fade twice"
    load.on_report(((1, 1),), 160.0)
    assert load.at(160.0)[0, 1] == pytest.approx(4.0 / math.e + 1.0)


def test_time_that_goes_back_fades_nothing_and_adds_nothing() -> None:
    load = ExpertLoad(1, 1, window_s=10.0, now=50.0)
    load.on_report(((5,),), 50.0)
    assert load.at(40.0).tolist() == [[5.0]]
    assert load.at(60.0)[0, 0] == pytest.approx(5.0 / math.e)


def test_the_answer_is_a_copy() -> None:
    load = ExpertLoad(1, 1, window_s=10.0, now=0.0)
    load.at(0.0)[0, 0] = 99.0
    assert load.at(0.0).tolist() == [[0.0]]


@pytest.mark.parametrize("tokens", [((1, 2, 3),), ((1, 2), (1, 2)), (), ((1,),)])
def test_a_report_of_another_shape_is_refused(tokens: tuple[tuple[int, ...], ...]) -> None:
    load = ExpertLoad(1, 2, window_s=10.0, now=0.0)
    assert not load.on_report(tokens, 0.0)
    assert load.at(0.0).tolist() == [[0.0, 0.0]]


def test_first_plan_fits_the_group() -> None:
    decode = DecodeConfig(num_ranks=4, max_ranks=6)
    plan = first_plan(PLANNER, decode, num_layers=3, num_logical_experts=32)
    assert plan.base_version == 0
    placement = plan.physical_to_logical
    assert [len(rows) for rows in placement] == [6] * 3
    assert {len(row) for rows in placement for row in rows} == {num_local_experts(decode, 32)}


def test_balancedness_is_told_when_it_or_the_placement_changes() -> None:
    assessor, even = Assessor(), np.array([[5.0, 5.0]])
    assert assessor.on_tick(view(1, ((0,), (1,))), np.zeros((1, 2))) is None
    assert assessor.on_tick(view(1, ((0,), (1,))), even) == {
        "placement_version": 1,
        "balancedness": 1.0,
        "window_tokens": 10,
    }
    assert assessor.on_tick(view(1, ((0,), (1,))), even * 2) is None
    told = assessor.on_tick(view(1, ((0,), (1,))), np.array([[30.0, 10.0]]))
    assert told is not None and told["balancedness"] == pytest.approx(0.6667)
    assert assessor.on_tick(view(2, ((0,), (1,))), np.array([[30.0, 10.0]])) is not None
