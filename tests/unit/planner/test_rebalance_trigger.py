"""When the planner moves experts, and above all when it does not."""

from dataclasses import replace

import pytest

from services.planner.rebalance_trigger import Prospect, RebalanceTrigger, TriggerSettings, Verdict

_SETTINGS = TriggerSettings(step_interval=100, bandwidth_bytes_per_s=1e9)
# A quarter of 20 s is saved for 1 s of transfer.
_GOOD = Prospect(100, 5e6, balancedness_now=0.72, balancedness_planned=0.96, bytes_to_move=10**9, moe_s=20.0)


def test_a_gain_is_taken_when_it_was_there_twice() -> None:
    trigger = RebalanceTrigger(_SETTINGS)
    assert trigger.on_prospect(_GOOD) is Verdict.WAITING_FOR_A_SECOND_WINDOW
    assert trigger.on_prospect(replace(_GOOD, num_passes=200)) is Verdict.REBALANCE


def test_one_odd_window_moves_nothing() -> None:
    trigger = RebalanceTrigger(_SETTINGS)
    trigger.on_prospect(_GOOD)
    assert trigger.on_prospect(replace(_GOOD, num_passes=200, balancedness_now=0.95)) is Verdict.EVEN_ENOUGH
    assert trigger.on_prospect(replace(_GOOD, num_passes=300)) is Verdict.WAITING_FOR_A_SECOND_WINDOW


@pytest.mark.parametrize(
    ("prospect", "verdict"),
    [
        (replace(_GOOD, num_passes=99), Verdict.TOO_EARLY),
        (replace(_GOOD, num_tokens=0), Verdict.IDLE),
        (replace(_GOOD, balancedness_now=0.92), Verdict.EVEN_ENOUGH),
        (replace(_GOOD, balancedness_planned=0.7), Verdict.EVEN_ENOUGH),
        (replace(_GOOD, bytes_to_move=5 * 10**9), Verdict.NOT_WORTH_ITS_BYTES),
        (replace(_GOOD, bytes_to_move=4_990_000_000), Verdict.REBALANCE),
        (replace(_GOOD, moe_s=0.0), Verdict.NOT_WORTH_ITS_BYTES),
    ],
)
def test_verdicts(prospect: Prospect, verdict: Verdict) -> None:
    assert RebalanceTrigger(replace(_SETTINGS, confirmations=1)).on_prospect(prospect) is verdict


def test_drift_from_what_was_reached_counts_though_the_gain_is_small() -> None:
    trigger = RebalanceTrigger(replace(_SETTINGS, confirmations=1))
    small = replace(_GOOD, balancedness_now=0.90, balancedness_planned=0.94)
    assert trigger.on_prospect(small) is Verdict.EVEN_ENOUGH
    trigger.on_carried_out(0.97)
    assert trigger.on_prospect(replace(small, num_passes=200, bytes_to_move=0)) is Verdict.REBALANCE
    trigger.on_carried_out(0.94)
    assert trigger.on_prospect(replace(small, num_passes=300, bytes_to_move=0)) is Verdict.EVEN_ENOUGH


def test_a_carried_out_plan_starts_the_count_anew() -> None:
    trigger = RebalanceTrigger(_SETTINGS)
    trigger.on_prospect(_GOOD)
    trigger.on_carried_out(0.96)
    assert trigger.on_prospect(replace(_GOOD, num_passes=200)) is Verdict.WAITING_FOR_A_SECOND_WINDOW


def test_questions_are_due_every_interval() -> None:
    trigger = RebalanceTrigger(_SETTINGS)
    assert (trigger.is_due(99), trigger.is_due(100)) == (False, True)
    trigger.on_prospect(_GOOD)
    assert (trigger.is_due(199), trigger.is_due(200)) == (False, True)


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        TriggerSettings(step_interval=0)
