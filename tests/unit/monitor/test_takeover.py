"""A monitor starts beside a group that lives: it learns, and changes nothing before it is sure."""

import msgspec
import pytest

from common.config import DecodeConfig
from common.ids import NO_RANK, ProcessId
from common.messages import Directory, Exited, Signal, SignalDone, Welcome
from services.monitor.slots import SlotState
from services.monitor.takeover import Phase
from tests.unit.monitor.driver import CONFIG, NUM_EXPERTS, Driver, Puppet


def _restart(driver: Driver, num_experts: int = NUM_EXPERTS) -> None:
    """The processes live on; each greets when it hears of the new term, as `common.monitor_client` does."""
    driver.replace_monitor("monitor-2", num_experts)
    for puppet in driver.puppets.values():
        puppet.received.clear()
        driver.open_lifeline(puppet)


def _greet_new_term(driver: Driver, puppets: list[Puppet], seconds: float = 1.2) -> None:
    driver.advance(seconds)
    for puppet in puppets:
        puppet.term = driver.monitor.counter.term
        driver.hello(puppet)


def test_the_group_goes_on_under_a_new_term_with_a_fresh_view() -> None:
    driver = Driver()
    puppets = driver.form()
    before = driver.view
    assert before is not None
    _restart(driver)
    _greet_new_term(driver, list(driver.puppets.values()))
    driver.advance(0.6)
    after = driver.view
    assert after is not None and after.members == before.members
    assert after.term == 2048 and after.epoch > after.term > before.epoch
    assert after.placement == before.placement
    assert all(puppet.epoch == after.epoch for puppet in puppets)


def test_it_waits_for_a_silent_member_for_a_heartbeat_timeout_and_no_longer() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[2].is_beating = puppets[2].follows = False
    _restart(driver)
    _greet_new_term(driver, [*puppets[:2], driver.puppets[ProcessId("agent-0-a")]])
    driver.advance(CONFIG.monitor.heartbeat_timeout_s - 0.5)
    assert driver.monitor.phase is Phase.GATHERING
    assert driver.monitor.group.current is None
    driver.advance(0.6)
    assert driver.ranks == [0, 1]
    assert driver.monitor.slots.slots[2].state is SlotState.FENCING


def test_the_word_of_an_agent_spares_the_wait() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[2].is_beating = puppets[2].follows = False
    agent = driver.puppets[ProcessId("agent-0-a")]
    _restart(driver)
    driver.advance(0.5)
    driver.say(agent, Exited("agent-0", puppets[2].process, "decode-2", 7, "signal KILL"))
    _greet_new_term(driver, [*puppets[:2], agent], 0.7)
    driver.advance(0.6)
    assert driver.ranks == [0, 1]
    assert driver.monitor.slots.in_state(SlotState.FENCING) == []


def test_no_standby_gets_a_slot_before_the_members_are_known() -> None:
    driver = Driver()
    puppets = driver.form(4)
    _restart(driver)
    driver.advance(1.2)
    puppets[3].term = driver.monitor.counter.term
    driver.hello(puppets[3])
    driver.advance(1.0)
    assert puppets[3].got(Welcome) == [] and driver.monitor.slots.num_taken == 0


def test_a_late_member_is_a_zombie_and_fenced() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[2].is_beating = puppets[2].follows = False
    agent = driver.puppets[ProcessId("agent-0-a")]
    _restart(driver)
    _greet_new_term(driver, [*puppets[:2], agent])
    driver.advance(4.0)
    assert driver.ranks == [0, 1]
    driver.hello(puppets[2])
    driver.advance(0.1)
    assert [(s.process, s.signal) for s in agent.got(Signal)][-1] == (puppets[2].process, "KILL")
    assert driver.ranks == [0, 1] and puppets[2].got(Welcome)[-1].rank == NO_RANK


def test_a_void_that_the_old_monitor_missed_is_ended_by_the_new_one() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in puppets:
        puppet.state = "void"
    _restart(driver)
    _greet_new_term(driver, list(driver.puppets.values()))
    driver.advance(0.6)
    assert driver.ranks == [0, 1, 2] and all(puppet.state == "serving" for puppet in puppets)


def test_nobody_gets_a_slot_while_a_listed_decode_process_is_unheard() -> None:
    driver = Driver()
    puppets = driver.form(4)
    driver.exited(puppets[2])
    driver.advance(0.5)
    stopped = driver.enter("decode", "decode-9")
    driver.advance(0.2)
    stopped.is_beating = stopped.follows = False
    _restart(driver)
    agent = driver.puppets[ProcessId("agent-0-a")]
    driver.advance(1.2)
    agent.term = 2048
    driver.hello(agent, children=(puppets[0], puppets[1], puppets[3], stopped))
    for puppet in (puppets[0], puppets[1], puppets[3]):
        puppet.term = 2048
        driver.hello(puppet)
    driver.advance(1.0)
    assert driver.ranks == [0, 1, 2]
    driver.exited(puppets[1])
    spare = driver.enter("decode", "decode-5")
    spare.term = 2048
    driver.advance(2.0)
    assert driver.ranks == [0, 2], "decode-9 might hold the vacant slot"
    driver.exited(stopped)
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2]


def test_a_monitor_that_was_replaced_exits() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[0].term = 4096
    driver.beat(puppets[0])
    assert "term 4096 has taken over" in driver.exits[0]


def test_while_gathering_it_opens_a_higher_term_instead() -> None:
    driver = Driver()
    puppets = driver.form()
    _restart(driver)
    driver.advance(1.2)
    assert driver.monitor.counter.term == 2048
    puppets[0].term = 7000
    driver.beat(puppets[0])
    assert driver.monitor.counter.term == 7168 and driver.exits == []


def test_a_process_that_follows_another_monitor_of_this_term_ends_it() -> None:
    driver = Driver()
    driver.form()
    stranger = Puppet(ProcessId("decode-8-x"), "decode", "decode-8", term=1024)
    driver.puppets[stranger.process] = stranger
    driver.advance(1.0)
    assert driver.exits == []
    driver.advance(3.0)
    assert "another monitor of term 1024" in driver.exits[0]


def test_heartbeats_that_have_piled_up_prove_no_other_monitor() -> None:
    driver = Driver()
    driver.form()
    cut_off = Puppet(ProcessId("router-8-x"), "router", "router-8", term=1024, is_beating=False)
    driver.puppets[cut_off.process] = cut_off
    driver.beat(cut_off)
    driver.advance(10.0)
    for _ in range(100):
        driver.beat(cut_off)
    driver.advance(0.1)
    assert driver.exits == []


def test_a_listed_child_whose_agent_has_vanished_keeps_nobody_out_for_ever() -> None:
    driver = Driver()
    puppets = driver.form(4)
    other = driver.enter("agent", "agent-1")
    ghost = Puppet(ProcessId("decode-9-x"), "decode", "decode-9", agent="agent-1")
    _restart(driver)
    driver.advance(1.2)
    for puppet in list(driver.puppets.values()):
        puppet.term = driver.monitor.counter.term
        driver.hello(puppet, children=(ghost,) if puppet is other else ())
    driver.advance(4.0)
    other.is_beating = False
    driver.exited(puppets[1])
    driver.advance(30.0)
    assert driver.ranks == [0, 2], "decode-9 might hold the vacant slot"
    driver.advance(40.0)
    assert driver.ranks == [0, 1, 2]


def test_who_was_stopped_or_cut_off_before_it_could_greet_follows_no_other_monitor() -> None:
    """Stopped: it had heard of the term, and when it goes on heartbeats come before its Hello. Cut off: what it sends
    arrives, with an old term; it hears of the new one much later."""
    driver = Driver()
    driver.form()
    stopped = Puppet(ProcessId("router-8-x"), "router", "router-8", term=1024)
    deaf = Puppet(ProcessId("router-9-x"), "router", "router-9", term=512)
    driver.puppets |= {stopped.process: stopped, deaf.process: deaf}
    driver.advance(0.2)
    stopped.is_beating = False
    driver.advance(6.0)
    stopped.is_beating, deaf.term = True, 1024
    driver.advance(0.5)
    assert driver.exits == []
    driver.hello(stopped)
    driver.hello(deaf)
    driver.advance(4.0)
    assert driver.exits == []


def test_another_model_in_the_running_group_is_refused() -> None:
    driver = Driver()
    driver.form()
    _restart(driver, num_experts=8)
    _greet_new_term(driver, list(driver.puppets.values()))
    driver.advance(1.0)
    assert "another model" in driver.exits[0]


def test_who_died_while_monitor_and_agent_were_away_frees_its_slot() -> None:
    """Seed 2460 of the simulation: all three fell together, so that no agent ever reported the rank's end."""
    driver = Driver()
    puppets = driver.form()
    old_agent = driver.puppets.pop(ProcessId("agent-0-a"))
    dead = driver.puppets.pop(puppets[2].process)
    _restart(driver)
    agent = driver.enter("agent", old_agent.name, "agent-0-b")
    _greet_new_term(driver, [*puppets[:2], agent])
    driver.advance(CONFIG.monitor.heartbeat_timeout_s)
    signal = agent.got(Signal)[-1]
    assert (signal.process, signal.signal) == (dead.process, "KILL")
    assert [slot.rank for slot in driver.monitor.slots.in_state(SlotState.FENCING)] == [2]
    driver.say(agent, SignalDone(signal.id, signal.process, True, "no such process"))
    assert driver.monitor.slots.in_state(SlotState.FENCING) == []


def test_versions_of_the_directory_never_fall_within_a_term() -> None:
    """Seed 947 of the simulation: who had seen a list of the gathering monitor refused all later ones."""
    driver = Driver()
    puppets = driver.form()
    watcher = driver.enter("router", "router-0")
    _restart(driver)
    _greet_new_term(driver, [*puppets, watcher, driver.puppets[ProcessId("agent-0-a")]])
    driver.advance(1.0)
    driver.enter("prefill", "prefill-0")
    driver.advance(0.2)
    seen = [(d.term, d.version) for d in watcher.got(Directory)]
    assert len(seen) > 3 and seen == sorted(set(seen))


def test_a_masked_rank_that_died_while_its_agent_was_away_does_not_stay_masked() -> None:
    """Seed 5627 of the simulation: the dead agent's list of its children kept the slot from being given up."""
    driver = Driver()
    puppets = driver.form()
    old_agent = driver.puppets[ProcessId("agent-0-a")]
    driver.hello(old_agent, children=tuple(puppets))
    assert driver.fault("m", "mask", rank=1) == "accepted"
    for gone in (old_agent, driver.puppets.pop(puppets[1].process)):
        gone.is_beating = False
        driver.close_lifeline(gone, [old_agent.process, *(p.process for p in puppets)].index(gone.process) + 1)
    driver.advance(0.2)
    agent = driver.enter("agent", old_agent.name, "agent-0-b")
    driver.hello(agent, children=(puppets[0], puppets[2]))
    driver.advance(CONFIG.monitor.heartbeat_timeout_s + 0.5)
    assert driver.monitor.slots.in_state(SlotState.MASKED) == []
    driver.enter("decode", "decode-7")
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2]


@pytest.mark.parametrize("wakes", [False, True])
def test_a_masked_rank_does_not_get_the_number_of_one_that_nobody_has_heard(wakes: bool) -> None:
    """Seed 3864 of the simulation: the only member was stopped when the monitor died, and the masked rank, known to be
    in no group, was bound to the member's number."""
    driver = Driver()
    puppets = driver.form()
    assert driver.fault("m", "mask", rank=1) == "accepted"
    for puppet in (puppets[0], puppets[2]):
        puppet.is_beating = puppet.follows = False
    _restart(driver)
    agent = driver.puppets[ProcessId("agent-0-a")]
    puppets[1].state = "masked"
    driver.advance(1.2)
    agent.term = puppets[1].term = driver.monitor.counter.term
    driver.hello(agent, children=tuple(puppets))
    driver.hello(puppets[1])
    driver.advance(CONFIG.monitor.heartbeat_timeout_s + 0.5)
    assert driver.monitor.phase is Phase.ACTIVE and driver.monitor.slots.slots[0].process == puppets[1].process
    driver.fault("u", "unmask", rank=0)
    driver.advance(0.5)
    if wakes:
        for puppet in (puppets[0], puppets[2]):
            puppet.term = driver.monitor.counter.term
            driver.hello(puppet)
            puppet.is_beating = True
        driver.advance(1.0)
    assert driver.monitor.slots.slots[0].state is SlotState.MASKED, "decode-0 still takes itself for rank 0"
    for puppet in (puppets[0], puppets[2]):
        driver.exited(puppet)
    driver.advance(0.5)
    assert puppets[1].rank == 0


def test_numbers_of_which_nobody_was_heard_are_not_used_again() -> None:
    """A rank that is stopped may still have views of the last monitor unread. When it wakes up it enters one, and step
    words of one number must not mean two views."""
    driver = Driver(msgspec.structs.replace(CONFIG, decode=DecodeConfig(num_ranks=8, max_ranks=8)))
    stopped, *others = driver.form(8)
    agent = driver.puppets[ProcessId("agent-0-a")]
    for puppet in (agent, *others):
        puppet.follows = False  # from here on the last monitor's words reach only the one that is stopped
    stopped.is_beating = False
    for _ in range(5):
        driver.exited(others.pop())
    unread = {view.epoch for view in driver.views} - {puppet.epoch for puppet in others}
    assert stopped.epoch in unread and len(unread) == 5
    driver.views.clear()
    _restart(driver)
    for puppet in others:
        puppet.follows = True
    _greet_new_term(driver, [*others, agent])
    driver.advance(CONFIG.monitor.heartbeat_timeout_s)
    assert driver.ranks == [1, 2]
    assert driver.views and min(view.epoch for view in driver.views) > max(unread)
