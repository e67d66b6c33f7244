"""Joins and formations, as a monitor carries them through: two phases, drops, lost words."""

from common.ids import ProcessId
from common.messages import Prepare, Signal, View, Welcome
from tests.unit.monitor.driver import CONFIG, Driver, Puppet


def test_a_join_needs_the_report_of_every_member() -> None:
    driver = Driver()
    puppets = driver.form(2 + 1)
    driver.exited(puppets[2])
    driver.advance(0.3)
    puppets[0].follows = False
    newcomer = driver.enter("decode", "decode-2", "decode-2-b")
    driver.advance(1.0)
    (prepare, *repeats) = [prepare for prepare in puppets[0].got(Prepare) if prepare.base_epoch]
    assert prepare.base_epoch == driver.epoch and repeats, "a lost Prepare must be repeated"
    assert driver.ranks == [0, 1] and newcomer.epoch == prepare.view.epoch
    puppets[0].view = prepare.view
    driver.advance(0.2)
    assert driver.ranks == [0, 1, 2] and driver.epoch == prepare.view.epoch
    assert driver.last_event("joined")["rank"] == 2


def test_nobody_hears_of_a_newcomer_before_it_is_in_force() -> None:
    driver = Driver()
    puppets = driver.form()
    router = driver.enter("router", "router-0")
    driver.exited(puppets[2])
    puppets[0].follows = False
    driver.enter("decode", "decode-2", "decode-2-b")
    driver.advance(1.0)
    assert [len(view.members) for view in router.got(View)] == [2]


def test_a_removal_beats_a_join_under_a_new_number() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[2])
    driver.advance(0.3)
    puppets[0].follows = False
    newcomer = driver.enter("decode", "decode-2", "decode-2-b", follows=False)
    driver.advance(0.2)
    (prepared,) = [prepare.view for prepare in puppets[0].got(Prepare) if prepare.base_epoch]
    driver.exited(puppets[1])
    assert driver.ranks == [0] and driver.epoch > prepared.epoch
    assert driver.monitor.group.prepared is None
    puppets[0].follows = newcomer.follows = True
    driver.take_slot(newcomer)
    newcomer.out_of = prepared.epoch
    driver.receive(puppets[0], driver.view or prepared)
    driver.advance(0.5)
    assert driver.ranks == [0, 2] and driver.epoch > prepared.epoch


def test_a_dropped_newcomer_prepares_again_only_when_it_is_out() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[2])
    driver.advance(0.3)
    puppets[0].follows = False
    newcomer = driver.enter("decode", "decode-2", "decode-2-b")
    driver.advance(0.3)
    prepared = newcomer.view
    assert prepared is not None, "it was let in by itself"
    newcomer.follows = False
    driver.void(puppets[1])
    driver.answer(puppets[0])
    puppets[0].follows = True
    driver.receive(puppets[0], driver.view or prepared)
    driver.advance(1.5)
    assert driver.monitor.group.prepared is None and driver.ranks == [0, 1]
    driver.leave(newcomer, driver.epoch)
    newcomer.follows = True
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2]


def test_a_newcomer_that_dies_is_dropped_by_a_higher_number() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[2])
    driver.advance(0.3)
    newcomer = driver.enter("decode", "decode-2", "decode-2-b")
    puppets[0].follows = False
    driver.advance(0.3)
    assert newcomer.view is not None
    prepared = newcomer.view.epoch
    driver.exited(newcomer)
    assert driver.epoch > prepared and driver.ranks == [0, 1]


def test_a_newcomer_that_dies_during_a_roll_call_does_not_end_it() -> None:
    """A view made for it would keep the silent one until its adoption is overdue (simulation, seed 2052)."""
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[2])
    driver.advance(0.3)
    puppets[0].follows = puppets[1].follows = puppets[1].answers_roll_calls = False
    newcomer = driver.enter("decode", "decode-2", "decode-2-b")
    driver.advance(0.3)
    assert newcomer.view is not None
    epoch, prepared = driver.epoch, newcomer.view.epoch
    driver.void(puppets[0])
    driver.exited(newcomer)
    assert driver.epoch == epoch
    driver.advance(CONFIG.monitor.roll_call_s + 0.2)
    assert driver.ranks == [0] and driver.epoch > prepared


def test_a_newcomer_that_never_gets_ready_is_fenced() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[2])
    driver.advance(0.3)
    puppets[0].follows = puppets[1].follows = False
    newcomer = driver.enter("decode", "decode-2", "decode-2-b", follows=False)
    driver.advance(1.0)
    driver.take_slot(newcomer)
    driver.advance(CONFIG.monitor.prepare_timeout_s + 1)
    signals = driver.puppets[ProcessId("agent-0-a")].got(Signal)
    assert {signal.process for signal in signals} >= {newcomer.process}


def _half_entered(driver: Driver) -> tuple[list[Puppet], Puppet, View]:
    """The first member has entered the view that the newcomer was to join; the others wait for a header."""
    puppets = driver.form()
    driver.exited(puppets[2])
    driver.advance(0.3)
    puppets[1].follows = False
    newcomer = driver.enter("decode", "decode-2", "decode-2-b", follows=False)
    driver.advance(1.0)
    driver.take_slot(newcomer)
    prepared = puppets[0].got(Prepare)[-1].view
    assert puppets[0].epoch == prepared.epoch > driver.epoch
    return puppets, newcomer, prepared


def test_a_newcomer_that_does_not_follow_into_its_view_holds_the_members_up_for_a_moment_only() -> None:
    driver = Driver()
    puppets, newcomer, prepared = _half_entered(driver)
    driver.advance(CONFIG.monitor.adopt_timeout_s - 1.5)
    puppets[1].view, newcomer.progress = prepared, 1
    driver.advance(CONFIG.monitor.adopt_timeout_s - 0.3)
    assert driver.ranks == [0, 1] and driver.epoch < prepared.epoch, "somebody has followed, and it makes progress"
    driver.advance(0.6)
    removed = driver.last_event("removed")
    assert (removed["process"], driver.ranks) == (newcomer.process, [0, 1]) and driver.epoch > prepared.epoch
    assert "entered by others only" in removed["evidence"]


def test_a_member_that_does_not_follow_costs_no_member_its_place() -> None:
    driver = Driver()
    _, newcomer, prepared = _half_entered(driver)
    newcomer.view, newcomer.follows = prepared, True
    driver.advance(CONFIG.monitor.adopt_timeout_s + 0.5)
    assert driver.last_event("view")["reason"] == f"view {prepared.epoch} was entered by others only"
    assert driver.ranks == [0, 1] and driver.last_event("removed")["rank"] == 2


def test_a_joiner_may_be_slow_but_the_group_does_not_wait_for_the_dead() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[2])
    driver.advance(0.3)
    puppets[0].follows = puppets[1].follows = False  # they lack its first header
    newcomer = driver.enter("decode", "decode-2", "decode-2-b", follows=False)
    newcomer.is_beating = False
    driver.advance(2 * CONFIG.monitor.heartbeat_timeout_s)
    assert driver.monitor.joining.joiners() == [newcomer.process]
    driver.advance(1.5 * CONFIG.monitor.heartbeat_timeout_s)
    assert driver.monitor.joining.joiners() == [] and driver.ranks == [0, 1]


def test_a_lost_welcome_is_repeated() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[2])
    newcomer = driver.enter("decode", "decode-2", "decode-2-b", follows=False)
    driver.advance(2.0)
    slots = [(welcome.rank, welcome.incarnation) for welcome in newcomer.got(Welcome)]
    assert len(slots) >= 3 and len(set(slots)) == 1


def test_a_formation_that_loses_a_rank_starts_again_with_the_others() -> None:
    driver = Driver()
    driver.enter("agent", "agent-0")
    puppets = driver.enter_ranks(3)
    for puppet in puppets[:2]:
        puppet.follows = False
    driver.advance(1.2)
    prepared = puppets[0].got(Prepare)[0].view
    driver.exited(puppets[2])
    for puppet in puppets[:2]:
        again = puppet.got(Prepare)[-1]
        assert again.base_epoch == 0 and again.view.epoch > prepared.epoch and len(again.view.members) == 2
        driver.take_slot(puppet)
        puppet.view = again.view
    driver.advance(0.2)
    assert driver.ranks == [0, 1]


def test_a_void_during_formation_starts_it_again() -> None:
    driver = Driver()
    puppets = driver.enter_ranks(3)
    puppets[2].follows = False
    driver.advance(1.2)
    prepared = puppets[0].view
    assert prepared is not None and driver.view is None
    driver.void(puppets[0])
    assert puppets[1].epoch > prepared.epoch
    assert puppets[2].got(Prepare)[-1].base_epoch == 0
