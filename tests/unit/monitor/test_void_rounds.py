"""Void rounds, roll calls, broken paths, and ranks that stand still."""

import pytest

from common.config import ClusterConfig, DecodeConfig
from common.ids import ProcessId, Rank
from common.messages import Hello, RollCall, Signal
from tests.unit.monitor.driver import CONFIG, Driver


def test_every_void_ends_in_a_new_view_with_the_same_members() -> None:
    driver = Driver()
    puppets = driver.form()
    epoch = driver.epoch
    driver.void(puppets[1])
    assert driver.ranks == [0, 1, 2] and driver.epoch > epoch
    assert all(puppet.got(RollCall) for puppet in (puppets[0], puppets[2]))
    assert "removed" not in driver.kinds()


def test_a_lost_void_report_costs_one_heartbeat() -> None:
    driver = Driver()
    puppets = driver.form()
    epoch = driver.epoch
    puppets[1].state = "void"
    driver.advance(0.2)
    assert driver.epoch > epoch and driver.ranks == [0, 1, 2]


def test_a_void_of_an_old_epoch_changes_nothing() -> None:
    driver = Driver()
    puppets = driver.form()
    old = puppets[1].view
    driver.void(puppets[0])
    driver.advance(0.5)
    epoch = driver.epoch
    puppets[1].follows = False
    puppets[1].view, current = old, puppets[1].view
    driver.void(puppets[1])
    puppets[1].view, puppets[1].state = current, "serving"
    driver.advance(1.0)
    assert driver.epoch == epoch


def test_who_does_not_answer_the_roll_call_is_removed_whoever_was_accused() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[2].answers_roll_calls = False
    driver.void(puppets[0], accused=(1,))
    driver.advance(CONFIG.monitor.roll_call_s - 0.2)
    assert driver.ranks == [0, 1, 2]
    assert len(puppets[2].got(RollCall)) >= 3, "a lost roll call must not remove anybody"
    driver.advance(0.4)
    assert driver.ranks == [0, 1]
    assert "no answer to the roll call" in driver.last_event("removed")["evidence"]


def test_a_heartbeat_that_says_void_is_no_answer() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in puppets:
        puppet.answers_roll_calls = False
    puppets[2].state = "void"
    driver.advance(0.2)
    driver.answer(puppets[0])
    driver.answer(puppets[1])
    driver.advance(CONFIG.monitor.roll_call_s + 0.2)
    assert driver.ranks == [0, 1]


def test_the_same_pair_four_times_is_a_broken_path() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in puppets:
        puppet.answers_roll_calls = False
    for number in range(4):
        assert driver.ranks == [0, 1, 2]
        puppets[1].counters["group_rounds"] = 10 * number
        driver.advance(0.3)
        driver.void(puppets[0], accused=(2,))
        driver.answer(puppets[1], accused=(2,))
        driver.answer(puppets[2])
    assert driver.ranks == [0, 1]
    assert driver.last_event("removed")["evidence"] == "the path to it is broken"


@pytest.mark.parametrize("accusations", [{1: (0, 2)}, {0: (1,), 2: (1,)}, {0: (1,), 1: (0, 2)}])
def test_one_that_is_cut_off_from_all_others_goes_the_second_time(accusations: dict[int, tuple[int, ...]]) -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in puppets:
        puppet.answers_roll_calls = False
    for _ in range(2):
        assert driver.ranks == [0, 1, 2]
        driver.void(puppets[0], accusations.get(0, ()))
        for rank in (1, 2):
            driver.answer(puppets[rank], accusations.get(rank, ()))
        driver.advance(0.3)
    assert driver.ranks == [0, 2]
    driver.leave(puppets[1], driver.epoch)
    driver.advance(5.0)
    assert driver.ranks == [0, 2], "it is ended, and gets no slot although it has left the one it had"


def test_the_same_in_a_group_that_goes_on_is_a_busy_machine() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in puppets:
        puppet.answers_roll_calls = False
    for number in range(3):
        puppets[0].counters["group_rounds"] = 10 * number
        driver.advance(0.3)
        driver.void(puppets[0], accused=(1,))
        driver.answer(puppets[1])
        driver.answer(puppets[2], accused=(1,))
    assert driver.ranks == [0, 1, 2]


def test_the_same_pair_now_and_then_is_a_busy_machine() -> None:
    driver = Driver(ClusterConfig(decode=DecodeConfig(num_ranks=2, max_ranks=5)))
    puppets = driver.form(2)
    for puppet in puppets:
        puppet.answers_roll_calls = False
    for _ in range(8):
        driver.void(puppets[0], accused=(1,))
        driver.answer(puppets[1], accused=(0,))
        driver.advance(8.0)
    assert driver.ranks == [0, 1]


def test_an_accusation_of_a_rank_that_is_in_no_view_is_heard_and_means_nothing() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in puppets:
        puppet.answers_roll_calls = False
    for number in range(4):
        puppets[1].counters["group_rounds"] = 10 * number
        driver.advance(0.3)
        driver.void(puppets[0], accused=(2, 4))
        driver.answer(puppets[1], accused=(2, 4))
        driver.answer(puppets[2])
        driver.advance(0.3)
    assert driver.ranks == [0, 1]


def test_a_rank_number_that_cannot_be_changes_nothing() -> None:
    driver = Driver()
    driver.form()
    stranger = driver.enter("decode", "decode-9")
    for rank in (-100, -5, 99):
        hello = Hello(stranger.process, "decode", "decode-9", "h", 7, "tcp://x", "agent-0", "x.0", Rank(rank))
        driver.say(stranger, hello)
    assert driver.ranks == [0, 1, 2]
    assert driver.puppets[ProcessId("agent-0-a")].got(Signal) == [], "somebody was fenced"


def test_other_pairs_each_time_are_no_broken_path() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in puppets:
        puppet.answers_roll_calls = False
    for number in range(9):
        driver.void(puppets[number % 3], accused=((number + 1) % 3,))
        for puppet in puppets:
            driver.answer(puppet) if puppet is not puppets[number % 3] else None
        driver.advance(0.3)
    assert driver.ranks == [0, 1, 2]


def test_no_progress_while_others_wait_starts_a_roll_call() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[0].waits_for = puppets[1].waits_for = (2,)
    driver.advance(CONFIG.monitor.heartbeat_timeout_s - 0.3)
    assert "roll_call" not in driver.kinds()
    driver.advance(0.8)
    assert "rank 2: no progress while ranks [0, 1] wait" in driver.last_event("roll_call")["cause"]
    assert driver.ranks == [0, 1, 2], "it answered"


def test_slow_progress_is_progress() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[0].waits_for = (2,)
    for _ in range(5):
        driver.advance(2.0)
        puppets[2].progress += 1
    assert "roll_call" not in driver.kinds()


def test_an_idle_group_is_left_alone() -> None:
    driver = Driver()
    driver.form()
    epoch = driver.epoch
    driver.advance(60.0)
    assert driver.epoch == epoch
