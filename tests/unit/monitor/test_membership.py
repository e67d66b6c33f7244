"""Each rule of membership by itself: who is removed, on what evidence, how soon; and who is not."""

import pytest

from common.config import ClusterConfig, DecodeConfig
from common.ids import NO_RANK, Epoch, Incarnation, ProcessId
from common.messages import Heartbeat, HeartbeatReply, Signal, SlotLeft, VoidReport, Welcome
from services.monitor.slots import SlotState
from tests.unit.monitor.driver import CONFIG, Driver


def test_a_fresh_cluster_forms_when_it_has_its_size() -> None:
    driver = Driver()
    puppets = driver.enter_ranks(2)
    driver.advance(3.0)
    assert driver.view is None and [puppet.rank for puppet in puppets] == [0, 1]
    driver.enter_ranks(1, first=2)
    driver.advance(0.3)
    assert driver.ranks == [0, 1, 2]
    view = driver.view
    assert view is not None and view.epoch > view.term == 1024
    assert len({member.incarnation for member in view.members} | {view.epoch}) == 4


def test_formation_does_not_wait_for_ever_for_the_desired_size() -> None:
    driver = Driver()
    driver.enter_ranks(2)
    driver.advance(CONFIG.monitor.formation_s - 1)
    assert driver.view is None
    driver.advance(2.5)
    assert driver.ranks == [0, 1]


def test_nobody_gets_a_slot_while_the_monitor_listens() -> None:
    driver = Driver()
    (puppet,) = driver.enter_ranks(1)
    driver.advance(0.9)
    assert puppet.got(Welcome) == []
    driver.advance(0.2)
    assert puppet.rank == 0


def test_the_fourth_of_three_is_a_standby_and_steps_in() -> None:
    driver = Driver()
    puppets = driver.form(4)
    assert puppets[3].got(Welcome)[0].rank == -1
    driver.exited(puppets[1])
    assert driver.ranks == [0, 2]
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2] and puppets[3].rank == 1
    assert driver.view is not None and driver.view.members[1].incarnation == puppets[3].incarnation


def test_an_exit_notice_removes_at_once() -> None:
    driver = Driver()
    puppets = driver.form()
    epoch = driver.epoch
    driver.exited(puppets[2])
    assert driver.ranks == [0, 1] and driver.epoch > epoch
    assert driver.last_event("removed")["evidence"] == "signal KILL"
    assert "roll_call" not in driver.kinds()
    assert driver.monitor.slots.slots[2].state is SlotState.FREE


def test_a_closed_lifeline_is_a_suspicion_first() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.close_lifeline(puppets[1])
    assert driver.ranks == [0, 1, 2]
    driver.advance(0.1)
    assert driver.ranks == [0, 2]
    assert driver.last_event("removed")["evidence"] == "lifeline closed"


def test_a_lifeline_that_is_opened_again_clears_the_suspicion() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.close_lifeline(puppets[1])
    driver.open_lifeline(puppets[1])
    driver.advance(1.0)
    assert driver.ranks == [0, 1, 2]


def test_the_old_connection_may_close_after_the_new_one_is_open() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.open_lifeline(puppets[1])
    driver.close_lifeline(puppets[1])
    driver.advance(1.0)
    assert driver.ranks == [0, 1, 2]


def test_silence_removes_after_the_timeout_and_fences() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[0].is_beating = False
    driver.advance(CONFIG.monitor.heartbeat_timeout_s - 0.2)
    assert driver.ranks == [0, 1, 2]
    driver.advance(0.5)
    assert driver.ranks == [1, 2]
    (signal,) = driver.puppets[ProcessId("agent-0-a")].got(Signal)
    assert (signal.process, signal.signal) == (puppets[0].process, "KILL")


def test_when_nobody_is_heard_it_is_the_monitor_that_is_cut_off() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.enter("prefill", "prefill-0")
    epoch, everybody = driver.epoch, list(driver.puppets.values())
    for puppet in everybody:
        puppet.is_beating = False
    driver.advance(10 * CONFIG.monitor.heartbeat_timeout_s)
    assert (driver.ranks, driver.epoch) == ([0, 1, 2], epoch)
    assert driver.kinds().count("deaf") == 1
    for puppet in reversed(everybody):  # one after the other: who is heard first makes nobody else suspect
        puppet.is_beating = True
        driver.advance(2.0)
    driver.advance(12 * CONFIG.monitor.heartbeat_timeout_s)
    assert (driver.ranks, driver.epoch) == ([0, 1, 2], epoch)
    puppets[0].is_beating = False
    driver.advance(CONFIG.monitor.heartbeat_timeout_s + 0.5)
    assert driver.ranks == [1, 2]


@pytest.mark.parametrize("heard", ["agent-0", "prefill-0", "decode-2"])
def test_whoever_is_still_heard_shows_that_the_silent_are_gone(heard: str) -> None:
    driver = Driver()
    driver.form()
    driver.enter("prefill", "prefill-0")
    for puppet in driver.puppets.values():
        puppet.is_beating = puppet.name == heard
    driver.advance(CONFIG.monitor.heartbeat_timeout_s + 0.5)
    assert driver.ranks == ([2] if heard == "decode-2" else [])


def test_the_slot_of_a_fenced_process_waits_for_the_proof_and_another_number_is_given_out() -> None:
    driver = Driver()
    puppets = driver.form(4)
    puppets[0].is_beating = puppets[0].follows = False
    driver.advance(4.0)
    assert driver.ranks == [1, 2, 3] and puppets[3].rank == 3
    fenced = driver.monitor.slots.in_state(SlotState.FENCING)
    assert [slot.rank for slot in fenced] == [0]
    driver.exited(puppets[0])
    assert driver.monitor.slots.in_state(SlotState.FENCING) == []


def test_a_fence_is_repeated_until_there_is_proof() -> None:
    driver = Driver()
    puppets = driver.form()
    agent = driver.puppets[ProcessId("agent-0-a")]
    puppets[0].is_beating = puppets[0].follows = False
    driver.advance(8.0)
    signals = agent.got(Signal)
    assert len(signals) >= 4 and len({signal.id for signal in signals}) == len(signals)
    driver.exited(puppets[0])
    driver.advance(3.0)
    assert len(agent.got(Signal)) == len(signals)


def test_a_monitor_that_was_stopped_blames_nobody() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.sleep(60.0)
    driver.advance(2.0)
    assert driver.ranks == [0, 1, 2] and "late_tick" in driver.kinds()
    puppets[0].is_beating = False
    driver.advance(4.0)
    assert driver.ranks == [1, 2], "its timers must run again"


def test_a_prefill_worker_is_not_up_before_it_says_so() -> None:
    driver = Driver()
    driver.form()
    worker = driver.enter("prefill", "prefill-0")
    worker.state = "loading"

    def states() -> list[str]:
        return [listed.state for listed in driver.monitor.directory.message.of_kind("prefill")]

    driver.advance(0.2)
    assert states() == ["loading"]
    worker.state = "up"
    driver.advance(0.2)
    assert states() == ["up"]


def test_a_member_that_loads_experts_for_a_view_may_take_longer() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[2].follows = False
    driver.exited(puppets[1])
    for _ in range(10):
        puppets[2].progress += 1
        driver.advance(CONFIG.monitor.adopt_timeout_s / 2)
        assert driver.ranks == [0, 2], "it makes progress"
    driver.advance(CONFIG.monitor.adopt_timeout_s + 0.6)
    assert driver.ranks == [0], "and now it does not"


def test_a_member_that_makes_progress_and_never_adopts_is_removed() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[2].follows = False
    driver.exited(puppets[1])
    for _ in range(int(CONFIG.monitor.prepare_timeout_s) + 2):
        puppets[2].progress += 1
        driver.advance(1.0)
    assert driver.ranks == [0]


def test_a_member_that_does_not_adopt_is_removed() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[2].follows = False
    driver.exited(puppets[1])
    driver.advance(CONFIG.monitor.adopt_timeout_s - 0.3)
    assert driver.ranks == [0, 2]
    driver.advance(0.6)
    assert driver.ranks == [0] and "not adopted" in driver.last_event("removed")["evidence"]


def test_a_rank_that_leaves_by_itself_is_out_and_may_come_again() -> None:
    driver = Driver()
    puppets = driver.form()
    incarnation = puppets[1].incarnation
    driver.leave(puppets[1], driver.epoch)
    assert driver.ranks == [0, 2]
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2] and puppets[1].incarnation > incarnation
    assert driver.view is not None and driver.view.members[1].heap.endswith(".1"), "its new heap"


def test_a_lifeline_that_the_network_ended_is_no_sign_of_death() -> None:
    """Its heartbeats are: a rank whose link is whole again within their time stays."""
    driver = Driver()
    puppets = driver.form()
    connection = driver.open_lifeline(puppets[1])
    driver.close_lifeline(puppets[1])
    driver.perform(driver.monitor.on_lifeline_timed_out(puppets[1].process, connection, driver.now))
    driver.advance(1.0)
    assert driver.ranks == [0, 1, 2]
    puppets[1].is_beating = puppets[0].is_beating = False
    driver.perform(driver.monitor.on_lifeline_timed_out(puppets[0].process, 1, driver.now))
    driver.advance(2 * CONFIG.monitor.heartbeat_timeout_s + 0.5)
    assert driver.ranks == [2]
    assert [puppet.process for puppet in puppets[:2] if puppet.process in driver.monitor.table.gone] == []


def test_words_for_another_process_are_not_heard() -> None:
    """Over a connection that is not that process's own."""
    driver = Driver()
    puppet = driver.form()[1]
    epoch, other = driver.epoch, ProcessId("somebody-else")
    where = (puppet.process, puppet.rank, puppet.incarnation)
    for word in (Heartbeat(puppet.process), SlotLeft(*where, epoch), VoidReport(*where, epoch, 1, (0,))):
        driver.perform(driver.monitor.on_message(other, word, driver.now))
    assert driver.ranks == [0, 1, 2] and driver.epoch == epoch and "roll_call" not in driver.kinds()
    assert driver.last_event("unauthorised")["reason"] == "speaks for another process"
    driver.say(puppet, SlotLeft(*where, epoch))
    assert driver.ranks == [0, 2]


def test_two_dead_at_once() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.close_lifeline(puppets[0])
    driver.close_lifeline(puppets[1])
    before = len(driver.views)
    driver.advance(0.1)
    assert driver.ranks == [2] and len(driver.views) == before + 1


def test_all_dead_and_formed_again() -> None:
    driver = Driver()
    puppets = driver.form()
    for puppet in puppets:
        driver.exited(puppet)
    assert driver.ranks == [] and driver.view is not None
    epoch = driver.epoch
    for number in range(3):
        driver.enter("decode", f"decode-{number}", f"decode-{number}-b")
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2] and driver.epoch > epoch


def test_one_desired_rank_is_a_group() -> None:
    driver = Driver(ClusterConfig(decode=DecodeConfig(num_ranks=1, max_ranks=2)))
    (puppet,) = driver.form(1)
    epoch = driver.epoch
    driver.void(puppet)
    assert driver.epoch > epoch and driver.ranks == [0]


def test_experts_are_repaired_and_their_lack_is_told() -> None:
    decode = DecodeConfig(num_ranks=3, max_ranks=5, num_redundant_experts=0)
    driver = Driver(ClusterConfig(decode=decode))
    puppets = driver.form()
    driver.exited(puppets[2])
    assert driver.last_event("degraded")["num_orphans"] == 4
    driver.enter("decode", "decode-2", "decode-2-b")
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2] and driver.kinds().count("degraded") == 1


def test_a_placement_that_did_not_change_keeps_its_version() -> None:
    driver = Driver()
    puppets = driver.form()
    assert driver.view is not None
    version = driver.view.placement.version
    driver.void(puppets[0])
    assert driver.view.placement.version == version and driver.epoch > version


def test_epochs_are_unique_over_everything() -> None:
    driver = Driver()
    puppets = driver.form(4)
    for puppet in puppets[:3]:
        driver.void(puppets[3] if puppets[3].view else puppets[1])
        driver.exited(puppet)
        driver.advance(0.5)
    epochs = [view.epoch for view in driver.views]
    assert epochs == sorted(set(epochs)) and Epoch(0) not in epochs


def test_a_rank_whose_hello_after_its_leave_was_lost_is_asked_for_it_again() -> None:
    """A Welcome on its way to it had ended the repetition of its Hello; its next heap is known from nothing else."""
    driver = Driver()
    (puppet, *_) = driver.form()
    puppet.follows = False
    assert driver.fault("m", "mask", rank=0) == "accepted"
    left = SlotLeft(puppet.process, puppet.rank, puppet.incarnation, driver.epoch)
    puppet.rank, puppet.incarnation, puppet.view, puppet.life = NO_RANK, Incarnation(0), None, 1
    driver.say(puppet, left)
    driver.beat(puppet)
    assert not puppet.got(HeartbeatReply)[-1].known
    assert driver.fault("u", "unmask", rank=0) == "accepted"
    driver.hello(puppet)
    driver.beat(puppet)
    assert puppet.got(HeartbeatReply)[-1].known
    assert puppet.got(Welcome)[-1].rank == 0
