"""Newcomers that cannot reach everybody: put out by a deadline of their own, and not let try again at once."""

import pytest

from common.messages import Prepare, View
from tests.unit.monitor.driver import CONFIG, Driver, Puppet

DEADLINE_S = CONFIG.monitor.adopt_timeout_s


def _prepared(driver: Driver) -> View:
    assert driver.monitor.group.prepared is not None
    return driver.monitor.group.prepared.view


def _newcomer(driver: Driver, name: str, process: str) -> Puppet:
    newcomer = driver.enter("decode", name, process, follows=False)
    driver.advance(0.2)
    if newcomer.received:
        driver.take_slot(newcomer)
    return newcomer


def _broken(driver: Driver, puppets: list[Puppet], newcomer: Puppet) -> None:
    """The newcomer has said to all that it is ready; the first of ``puppets`` has not heard it."""
    puppets[0].misses = (newcomer.rank,)
    newcomer.misses = tuple(puppet.rank for puppet in puppets)


def _one_dead(driver: Driver) -> list[Puppet]:
    puppets = driver.form(3)
    driver.exited(puppets[2])
    driver.advance(0.3)
    for puppet in puppets[:2]:
        puppet.follows = False
    return puppets[:2]


def test_a_newcomer_whose_first_header_is_lost_is_put_out_after_its_own_deadline() -> None:
    driver = Driver()
    members = _one_dead(driver)
    newcomer = _newcomer(driver, "decode-2", "decode-2-b")
    epoch = _prepared(driver).epoch
    _broken(driver, members, newcomer)
    driver.advance(DEADLINE_S - 0.3)
    assert _prepared(driver).epoch == epoch
    driver.advance(0.6)
    removed = driver.last_event("removed")
    assert (removed["process"], driver.ranks) == (newcomer.process, [0, 1])
    assert removed["evidence"] == "the path between it and ranks [0] is broken"


def test_a_newcomer_that_still_loads_has_the_whole_time() -> None:
    """It misses its own first header as well: it has not said that it is ready."""
    driver = Driver()
    members = _one_dead(driver)
    newcomer = _newcomer(driver, "decode-2", "decode-2-b")
    epoch = _prepared(driver).epoch
    members[0].misses = members[1].misses = (newcomer.rank,)
    newcomer.misses = (*(member.rank for member in members), newcomer.rank)
    driver.advance(CONFIG.monitor.prepare_timeout_s - 1.0)
    assert _prepared(driver).epoch == epoch and driver.last_event("removed")["process"] != newcomer.process


def test_others_that_join_beside_it_do_not_wait_for_it_again() -> None:
    """Its successor gets no slot for a while, longer after each failure; a standby of another name does at once."""
    driver = Driver()
    members = _one_dead(driver)
    pauses = []
    for life in "bcd":
        newcomer = _newcomer(driver, "decode-2", f"decode-2-{life}")
        _broken(driver, members, newcomer)
        driver.advance(DEADLINE_S + 0.5)
        paused = driver.last_event("join_paused")
        assert (paused["process"], paused["name"]) == (newcomer.process, "decode-2")
        pauses.append(paused["pause_s"])
        driver.exited(newcomer)
        members[0].misses = ()
        for member in members:
            member.view = driver.view
        waiting = driver.enter("decode", "decode-2", f"decode-2-{life}-waits", follows=False)
        driver.advance(paused["pause_s"] - 2.0)
        assert driver.monitor.joining.joiners() == [], "it tries again too soon"
        driver.exited(waiting)
        driver.advance(2.5)
    assert pauses == [2 * DEADLINE_S, 4 * DEADLINE_S, 8 * DEADLINE_S]
    for member in members:
        member.follows = True
    other = driver.enter("decode", "decode-3", "decode-3-a")
    driver.advance(1.0)
    assert driver.ranks == [0, 1, 2] and other.view is not None


def test_one_that_has_failed_before_joins_alone() -> None:
    driver = Driver()
    members = _one_dead(driver)
    newcomer = _newcomer(driver, "decode-2", "decode-2-b")
    _broken(driver, members, newcomer)
    driver.advance(DEADLINE_S + 0.5)
    pause_s = driver.last_event("join_paused")["pause_s"]
    driver.exited(newcomer)
    members[0].misses, members[0].view, members[1].view = (), driver.view, driver.view
    driver.enter("decode", "decode-2", "decode-2-c", follows=False)
    driver.advance(pause_s - 1.0)
    driver.exited(members[1])  # two are missing now, and no join starts before the other has the view without it
    other = driver.enter("decode", "decode-3", "decode-3-a", follows=False)
    driver.advance(1.5)
    assert len(driver.monitor.joining.joiners()) == 2
    members[0].view = driver.view
    driver.advance(0.2)
    assert {member.process for member in _prepared(driver).members} == {members[0].process, other.process}


def test_once_it_is_in_its_failures_are_forgotten() -> None:
    driver = Driver()
    members = _one_dead(driver)
    pauses = []
    for life in "bc":
        newcomer = _newcomer(driver, "decode-2", f"decode-2-{life}")
        _broken(driver, members, newcomer)
        driver.advance(DEADLINE_S + 0.5)
        pauses.append(driver.last_event("join_paused")["pause_s"])
        driver.exited(newcomer)
        members[0].misses = ()
        for member in members:
            member.view, member.follows = driver.view, True
        again = driver.enter("decode", "decode-2", f"decode-2-{life}-again")
        driver.advance(pauses[-1] + 1.0)
        assert driver.ranks == [0, 1, 2]
        driver.exited(again)
        driver.advance(0.3)
        for member in members:
            member.follows = False
    assert pauses == [2 * DEADLINE_S, 2 * DEADLINE_S]


def test_a_formation_goes_on_without_the_rank_that_others_do_not_hear() -> None:
    driver = Driver()
    driver.enter("agent", "agent-0")
    puppets = driver.enter_ranks(3)
    for puppet in puppets:
        puppet.follows = False
    driver.advance(1.2)
    for puppet in puppets:
        driver.take_slot(puppet)
    first = puppets[0].got(Prepare)[0].view
    puppets[0].misses = puppets[1].misses = (2,)
    puppets[2].misses = (0, 1)
    driver.advance(DEADLINE_S + 0.5)
    assert driver.last_event("removed")["process"] == puppets[2].process
    again = puppets[0].got(Prepare)[-1]
    assert again.base_epoch == 0 and again.view.epoch > first.epoch
    assert [member.process for member in again.view.members] == [puppet.process for puppet in puppets[:2]]


@pytest.mark.parametrize("is_silent", [True, False])
def test_who_enters_late_is_let_in_again_at_once_if_it_was_silent(is_silent: bool) -> None:
    """Stopped is no broken path; one that beats and does not follow the others in lacks somebody's header."""
    driver = Driver()
    members = _one_dead(driver)
    newcomer = _newcomer(driver, "decode-2", "decode-2-b")
    members[0].view = _prepared(driver)
    newcomer.is_beating = not is_silent
    driver.advance(DEADLINE_S + 0.5)
    assert driver.last_event("removed")["process"] == newcomer.process
    assert ("join_paused" in driver.kinds()) is not is_silent
