"""Fault events: each is carried out once, proven, and answered however often it is repeated."""

import json

import msgspec
import pytest

from common.fault import ACTIONS, Fault, FaultRefused, parse_fault
from common.ids import ProcessId
from common.messages import AskStatus, Signal, SignalDone, Status, Welcome
from tests.unit.monitor.driver import Driver, Puppet


def _agent(driver: Driver) -> Puppet:
    return driver.puppets[ProcessId("agent-0-a")]


def _states(driver: Driver) -> dict[int, str]:
    driver.say(_agent(driver), AskStatus(_agent(driver).process, 1))
    body = json.loads(_agent(driver).got(Status)[-1].body)
    return {entry["rank"]: entry["state"] for entry in body["ranks"]}


def test_kill_is_done_when_the_pid_is_gone() -> None:
    driver = Driver()
    puppets = driver.form()
    assert driver.fault("k", "kill", rank=2) == "accepted"
    (signal,) = _agent(driver).got(Signal)
    assert (signal.process, signal.pid, signal.signal) == (puppets[2].process, 7, "KILL")
    driver.advance(0.5)
    assert driver.fault_status("k") == "accepted" and driver.ranks == [0, 1, 2]
    driver.exited(puppets[2])
    assert driver.last_event("fault")["proof"] == "pid 7 gone: signal KILL"
    assert driver.fault_status("k") == "done" and driver.ranks == [0, 1] and _states(driver)[2] == "dead"


def test_the_word_of_the_agent_is_proof_too() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.fault("k", "kill", rank=2)
    (signal,) = _agent(driver).got(Signal)
    driver.say(_agent(driver), SignalDone(signal.id, puppets[2].process, True, "reaped: signal KILL"))
    assert driver.fault_status("k") == "done" and driver.ranks == [0, 1]


def test_a_kill_without_effect_fails() -> None:
    driver = Driver()
    driver.form()
    driver.fault("k", "kill", rank=2)
    driver.advance(8.2)
    assert driver.fault_status("k") == "failed"
    assert driver.last_event("fault")["proof"] == "no proof within 8 s: no agent has reaped pid 7"


def test_kill_by_name() -> None:
    driver = Driver()
    driver.form()
    worker = driver.enter("prefill", "prefill-0")
    assert driver.fault("k", "kill", process="prefill-0") == "accepted"
    assert _agent(driver).got(Signal)[-1].process == worker.process
    driver.exited(worker)
    assert driver.fault_status("k") == "done"
    assert worker.process not in {entry.process for entry in driver.monitor.directory.message.workers}


def test_a_restart_is_done_when_the_successor_serves_and_the_old_one_leaves() -> None:
    driver = Driver()
    driver.form()
    old, other = driver.enter("router", "router-0"), driver.enter("router", "router-1")
    for router in (old, other):
        router.state = "up"
        driver.beat(router)
    assert driver.fault("r", "restart", process="router-0") == "accepted"
    assert (driver.puppets[ProcessId("agent-0-a")].got(Signal)[-1].signal) == "RESTART"
    old.state = "draining"
    driver.beat(old)
    driver.advance(0.2)
    assert driver.fault_status("r") == "accepted", "router-1 was there before"
    successor = driver.enter("router", "router-2")
    driver.beat(successor)
    driver.advance(0.2)
    assert driver.fault_status("r") == "accepted", "it does not serve yet"
    successor.state = "up"
    driver.beat(successor)
    driver.advance(0.2)
    assert driver.last_event("fault")["proof"] == "router-2, pid 7, serves in its place"
    assert driver.fault_status("r") == "done"


def test_only_routers_are_restarted() -> None:
    driver = Driver()
    driver.form()
    driver.enter("prefill", "prefill-0")
    assert driver.fault("p", "restart", process="prefill-0") == "refused"
    assert driver.last_event("fault")["error"] == "prefill-0 is no router; others come back after term"
    assert driver.fault("d", "restart", rank=1) == "refused"
    assert driver.last_event("fault")["error"] == "restart needs a process: the name of a router"


def test_the_same_id_twice_does_nothing_but_answer_again() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.fault("k", "kill", rank=2)
    driver.exited(puppets[2])
    driver.enter("decode", "decode-2", "decode-2-b")
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2]
    num_signals, num_kept = len(_agent(driver).got(Signal)), len(driver.monitor.events.kept())
    assert driver.fault("k", "kill", rank=2) == "done"
    driver.advance(1.0)
    assert driver.ranks == [0, 1, 2] and len(_agent(driver).got(Signal)) == num_signals
    assert len(driver.monitor.events.kept()) == num_kept, "a repeat is no new event"


def test_mask_keeps_the_process_and_its_number() -> None:
    driver = Driver()
    puppets = driver.form(4)
    assert driver.fault("m", "mask", rank=1) == "accepted"
    driver.advance(0.3)
    assert driver.fault_status("m") == "done" and driver.ranks == [0, 2]
    assert "adopted by ranks [0, 2]" in driver.last_event("fault")["proof"]
    driver.advance(10.0)
    assert driver.ranks == [0, 2] and _states(driver)[1] == "masked", "neither it nor the standby steps in"
    assert _agent(driver).got(Signal) == [], "a masked rank is not fenced"
    assert puppets[1].got(Welcome)[-1].masked, "it must tell a restarted monitor"
    incarnation = driver.monitor.slots.slots[1].last_incarnation
    assert driver.fault("u", "unmask", rank=1) == "accepted"
    driver.advance(0.5)
    assert driver.fault_status("u") == "done" and driver.ranks == [0, 1, 2]
    assert puppets[1].rank == 1 and puppets[1].incarnation > incarnation
    assert "rank 1 serves in view" in driver.last_event("fault")["proof"]


def test_mask_is_not_done_before_all_have_adopted_the_view_without_it() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[0].follows = False
    driver.fault("m", "mask", rank=1)
    driver.advance(1.0)
    assert driver.fault_status("m") == "accepted"
    puppets[0].follows = True
    assert driver.view is not None
    driver.receive(puppets[0], driver.view)
    driver.advance(0.2)
    assert driver.fault_status("m") == "done"


def test_a_masked_process_that_dies_frees_its_number() -> None:
    driver = Driver()
    puppets = driver.form(4)
    driver.fault("m", "mask", rank=1)
    driver.advance(0.3)
    driver.exited(puppets[1])
    driver.advance(0.5)
    assert driver.ranks == [0, 1, 2] and puppets[3].rank == 1


def test_the_last_rank_cannot_be_masked() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.exited(puppets[0])
    driver.exited(puppets[1])
    driver.advance(0.2)
    assert driver.fault("m", "mask", rank=2) == "refused" and driver.ranks == [2]
    assert "only one that serves" in driver.last_event("fault")["error"]


def test_stop_and_continue_are_proven_by_the_state() -> None:
    driver = Driver()
    puppets = driver.form()
    for action, state in (("stop", "state T"), ("cont", "state S")):
        driver.fault(action, action, rank=0)
        signal = _agent(driver).got(Signal)[-1]
        assert signal.signal == action.upper()
        driver.say(_agent(driver), SignalDone(signal.id, puppets[0].process, True, state))
        assert driver.fault_status(action) == "done" and state in driver.last_event("fault")["proof"]


def test_without_an_agent_nothing_can_be_signalled() -> None:
    driver = Driver()
    driver.enter_ranks(3)
    driver.advance(2.0)
    assert driver.fault("k", "kill", rank=0) == "refused"
    assert "no agent" in driver.last_event("fault")["error"]


@pytest.mark.parametrize(
    ("action", "target", "reason"),
    [
        ("kill", {"rank": 4}, "has no process"),
        ("kill", {"rank": 99}, "there are ranks 0..4"),
        ("mask", {"rank": 3}, "has no process"),
        ("unmask", {"rank": 3}, "has no process"),
        ("kill", {"process": "decode-77"}, "no live process"),
    ],
)
def test_an_unknown_target_is_refused(action: str, target: dict[str, int | str], reason: str) -> None:
    driver = Driver()
    driver.form()
    epoch = driver.epoch
    assert driver.fault("x", action, **target) == "refused"
    assert reason in driver.last_event("fault")["error"]
    driver.advance(1.0)
    assert driver.epoch == epoch and _agent(driver).got(Signal) == []


GOOD = {"type": "fault", "id": "a", "action": "kill", "rank": 1}
NETWORK = GOOD | {"action": "drop_network", "which": "all", "direction": "in", "duration_s": 2.0}


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (b"\xc1", "not MessagePack"),
        ([1, 2], "a map"),
        ({}, "a map"),
        (GOOD | {"type": "event"}, "a map"),
        (GOOD | {"id": 7}, "id must be"),
        (GOOD | {"id": ""}, "id must be"),
        (GOOD | {"id": "x" * 201}, "id must be"),
        (GOOD | {"action": "explode"}, "unknown action 'explode'"),
        (GOOD | {"action": None}, "unknown action"),
        (GOOD | {"at_step": 7}, "unknown key 'at_step'"),
        (GOOD | {"at_round": -7}, "at_round must be"),
        (GOOD | {"factor": 2.0}, "kill takes no factor"),
        (GOOD | {"action": "slow"}, "factor must be a number from 1 to 1000, got 'None'"),
        (GOOD | {"action": "slow", "factor": 0.5}, "factor must be"),
        (GOOD | {"action": "slow", "factor": float("nan")}, "factor must be"),
        (GOOD | {"action": "slow", "factor": True}, "factor must be"),
        (GOOD | {"action": "stop", "duration_s": 0}, "duration_s must be"),
        (GOOD | {"action": "corrupt_heap", "duration_s": 1}, "corrupt_heap takes no duration_s"),
        (NETWORK | {"which": "neighbours"}, "which must be one of monitor, peers, all"),
        (NETWORK | {"direction": None}, "direction must be one of in, out, both"),
        (NETWORK | {"duration_s": 1e9}, "duration_s must be a number from 0 to 3600"),
        ({"type": "fault", "id": "a", "action": "corrupt_heap", "process": "decode-1"}, "corrupt_heap needs a rank"),
        ({"type": "fault", "id": "a", "action": "scale", "decode": 2, "factor": 2.0}, "scale takes no factor"),
        (GOOD | {"decode": 3}, "decode goes with scale only"),
        ({"type": "fault", "id": "a", "action": "scale"}, "scale needs decode or prefill"),
        ({"type": "fault", "id": "a", "action": "scale", "decode": 2, "rank": 1}, "no rank and no process"),
        ({"type": "fault", "id": "a", "action": "scale", "decode": 0}, "decode must be a whole number from 1 to 64"),
        ({"type": "fault", "id": "a", "action": "scale", "prefill": True}, "prefill must be a whole number"),
        (GOOD | {"rank": -1}, "rank must be"),
        (GOOD | {"rank": True}, "rank must be"),
        (GOOD | {"rank": "1"}, "rank must be"),
        (GOOD | {"process": "decode-1"}, "either rank or process"),
        ({"type": "fault", "id": "a", "action": "kill"}, "either rank or process"),
        ({"type": "fault", "id": "a", "action": "mask", "process": "decode-1"}, "mask needs a rank"),
        ({"type": "fault", "id": "a", "action": "kill", "process": ""}, "name of a process"),
    ],
)
def test_nonsense_is_answered_with_the_reason_and_changes_nothing(event: object, reason: str) -> None:
    payload = event if isinstance(event, bytes) else msgspec.msgpack.encode(event)
    with pytest.raises(FaultRefused, match=reason):
        parse_fault(payload)
    driver = Driver()
    driver.form()
    epoch = driver.epoch
    driver.perform(driver.monitor.on_fault(payload, driver.now))
    assert driver.last_event("fault")["status"] == "refused" and reason in driver.last_event("fault")["error"]
    assert driver.epoch == epoch


def test_a_good_event_is_read() -> None:
    assert parse_fault(msgspec.msgpack.encode(GOOD)) == Fault("a", "kill", rank=1)
    scale = parse_fault(msgspec.msgpack.encode({"type": "fault", "id": "s", "action": "scale", "decode": 6}))
    assert (scale.counts, scale.target) == ({"decode": 6}, "decode 6")
    assert "kill" in ACTIONS and "mask" in ACTIONS and "unmask" in ACTIONS


def test_a_monitor_that_still_listens_says_so_and_takes_the_repeat() -> None:
    driver = Driver()
    driver.enter("agent", "agent-0")
    driver.enter_ranks(3)
    assert driver.fault("k", "kill", rank=0) == "deferred"
    driver.advance(2.0)
    assert driver.fault("k", "kill", rank=0) == "accepted"


def test_a_newcomer_that_is_masked_before_it_knows_of_its_slot_can_be_unmasked() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.leave(puppets[0], puppets[0].epoch)
    driver.fault("m", "mask", rank=0)
    driver.advance(0.2)
    assert driver.fault_status("m") == "done" and driver.ranks == [1, 2]
    driver.fault("u", "unmask", rank=0)
    driver.advance(2.0)
    assert driver.fault_status("u") == "done" and driver.ranks == [0, 1, 2]
