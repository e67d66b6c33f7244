"""Ranks taken out and put back by an operator: the last word holds, however the words before it ended."""

import pytest

from common.config import ClusterConfig, DecodeConfig
from common.ids import NO_RANK
from common.messages import Welcome
from tests.unit.monitor.driver import Driver, Puppet

# Six experts in slots of three: one rank has no room for all.
TIGHT = ClusterConfig(decode=DecodeConfig(num_ranks=3, max_ranks=5, num_redundant_experts=3, num_staging_experts=1))


@pytest.mark.parametrize(("back", "out"), [("unmask", "mask"), ("undrain", "drain")])
def test_putting_back_who_is_in_does_not_undo_a_later_mask(back: str, out: str) -> None:
    driver = Driver()
    driver.form()
    driver.fault("back", back, rank=1)
    assert driver.fault_status("back") == "done"
    driver.advance(60.0)
    driver.fault("out", out, rank=1)
    driver.advance(5.0)
    assert driver.ranks == [0, 2] and driver.fault_status("out") == "done"


@pytest.mark.parametrize("out", ["mask", "drain"])
def test_of_three_words_while_the_rank_still_leaves_the_last_one_holds(out: str) -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[1].follows = False
    for number, action in enumerate(("mask", "unmask", out)):
        driver.fault(str(number), action, rank=1)
        driver.advance(0.3)
    puppets[1].follows = True
    driver.leave(puppets[1], driver.epoch)
    driver.advance(5.0)
    assert driver.ranks == [0, 2] and driver.fault_status("2") == "done"


def test_a_drain_that_was_taken_back_leaves_nothing_behind() -> None:
    driver = Driver()
    driver.form()
    for puppet in driver.puppets.values():
        puppet.copies_experts = False
    driver.fault("first", "drain", rank=1)
    driver.fault("back", "undrain", rank=1)
    driver.advance(1.0)
    for puppet in driver.puppets.values():
        puppet.copies_experts = True
    driver.fault("again", "drain", rank=1)
    driver.advance(5.0)
    assert driver.ranks == [0, 2] and driver.fault_status("again") == "done"


def test_a_newcomer_is_told_of_its_mask_until_it_has_left_its_slot() -> None:
    """No view will tell it: it was never in one."""
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[1])
    newcomer = driver.enter("decode", "decode-1", "decode-1-b", follows=False)
    driver.advance(0.2)
    driver.take_slot(newcomer)
    driver.advance(0.3)
    driver.fault("out", "mask", rank=1)
    newcomer.received.clear()  # lost
    driver.advance(1.0)
    assert newcomer.got(Welcome)[-1].rank == NO_RANK and newcomer.got(Welcome)[-1].masked
    newcomer.rank, newcomer.state, newcomer.follows = NO_RANK, "standby", True
    driver.advance(0.5)
    num_welcomes = len(newcomer.got(Welcome))
    driver.advance(2.0)
    assert len(newcomer.got(Welcome)) == num_welcomes
    driver.fault("back", "unmask", rank=1)
    driver.advance(2.0)
    assert driver.ranks == [0, 1, 2] and driver.fault_status("back") == "done"


def _tight_group_that_copies_nothing() -> tuple[Driver, list[Puppet]]:
    """So that whoever is to leave is being emptied until a test lets it."""
    driver = Driver(TIGHT)
    puppets = driver.form()
    driver.advance(1.0)
    for puppet in puppets:
        puppet.copies_experts = False
    return driver, puppets


def test_a_drain_is_off_when_a_loss_takes_the_room_for_all_experts() -> None:
    """It would be refused now."""
    driver, puppets = _tight_group_that_copies_nothing()
    driver.fault("out", "drain", rank=1)
    driver.advance(1.0)
    assert driver.ranks == [0, 1, 2], "it is being emptied"
    driver.exited(puppets[0])
    assert driver.ranks == [1, 2] and "degraded" not in driver.kinds()
    driver.enter("decode", "decode-0", "decode-0-b")
    driver.advance(30.0)
    assert driver.ranks == [0, 1, 2] and driver.fault_status("out") == "failed"


def test_of_two_commands_that_together_leave_no_room_for_all_experts_the_drain_is_off() -> None:
    """There is room without either of the two ranks."""
    driver, puppets = _tight_group_that_copies_nothing()
    driver.fault("fewer", "scale", decode=2)
    driver.advance(0.5)
    assert driver.fault("out", "drain", rank=0) == "accepted"
    driver.advance(0.5)
    for puppet in puppets:
        puppet.copies_experts = True
    driver.advance(30.0)
    assert driver.ranks == [0, 1] and "degraded" not in driver.kinds()
    assert driver.fault_status("out") == "failed"
