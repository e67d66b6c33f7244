"""Fault events that a process carries out itself, those that wait for a round, and those that hit the monitor."""

import pytest

from common.fault import parse_fault
from common.ids import ProcessId
from common.messages import Inject, Injected, Signal, SignalDone
from tests.unit.monitor.driver import Driver, Puppet


def _agent(driver: Driver) -> Puppet:
    return driver.puppets[ProcessId("agent-0-a")]


def _says(driver: Driver, puppet: Puppet, ok: bool, proof: str) -> None:
    driver.say(puppet, Injected(puppet.process, puppet.got(Inject)[-1].id, ok, proof))


def test_slow_is_done_by_the_measured_time_of_the_rank_itself() -> None:
    driver = Driver()
    puppets = driver.form()
    assert driver.fault("s", "slow", rank=1, factor=4) == "accepted"
    (inject,) = puppets[1].got(Inject)
    assert (inject.id, inject.action, inject.factor) == ("s", "slow", 4.0)
    driver.advance(2.5)
    assert len(puppets[1].got(Inject)) == 3 and driver.fault_status("s") == "accepted", "repeated until answered"
    _says(driver, puppets[1], True, "8.0 ms for 2.0 ms")
    assert driver.fault_status("s") == "done" and driver.last_event("fault")["proof"] == "8.0 ms for 2.0 ms"
    assert driver.fault("s", "slow", rank=1, factor=4) == "done" and len(puppets[1].got(Inject)) == 3


def test_a_fault_that_is_not_in_force_by_the_word_of_the_process_fails() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.fault("s", "slow", rank=1, factor=4)
    _says(driver, puppets[1], False, "2.0 ms for 2.0 ms")
    assert driver.fault_status("s") == "failed" and "rank 1 says: 2.0 ms" in driver.last_event("fault")["proof"]
    driver.fault("t", "slow", rank=1, factor=4)
    driver.advance(15.2)
    assert driver.last_event("fault")["proof"] == "no proof within 15 s: no word of rank 1"


def test_the_word_of_another_process_is_no_proof() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.fault("s", "slow", rank=1, factor=4)
    driver.say(puppets[0], Injected(puppets[0].process, "s", True, "me"))
    assert driver.fault_status("s") == "accepted"


def test_a_cut_rank_is_silent_although_it_says_that_it_is_cut() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.fault("n", "drop_network", rank=1, which="monitor", direction="both", duration_s=20)
    puppets[1].is_beating = False
    driver.advance(2.9)
    _says(driver, puppets[1], True, "messages dropped: 3 in of monitor, 9 out of monitor")
    assert driver.fault_status("n") == "done" and driver.ranks == [0, 1, 2]
    driver.advance(0.5)
    assert driver.ranks == [0, 2], "its word on the fault is no sign of life"
    assert "no heartbeat" in driver.last_event("removed")["evidence"]


def test_a_heap_that_is_not_trusted_is_left_and_its_process_ended() -> None:
    driver = Driver()
    puppets = driver.form(4)
    assert driver.fault("c", "corrupt_heap", rank=1) == "accepted"
    _says(driver, puppets[1], True, "overwrote 64 bytes")
    assert driver.ranks == [0, 2] and driver.last_event("removed")["evidence"].startswith("its memory is not trusted")
    assert driver.fault_status("c") == "accepted", "not before the process is gone"
    assert [s.signal for s in _agent(driver).got(Signal)] == ["KILL"]
    driver.exited(puppets[1])
    assert driver.fault_status("c") == "done"
    assert driver.last_event("fault")["proof"] == "overwrote 64 bytes; pid 7 gone: signal KILL"
    driver.advance(1.0)
    assert driver.ranks == [0, 2, 3] and puppets[3].rank == 3, "another process has come in"


def test_a_heartbeat_that_declares_the_memory_untrusted_suffices() -> None:
    driver = Driver()
    puppets = driver.form()
    puppets[1].counters = {"distrusted": 1}
    driver.beat(puppets[1])
    assert driver.ranks == [0, 2]


@pytest.mark.parametrize(
    ("action", "fields", "reason"),
    [
        ("corrupt_heap", {"rank": 3}, "rank 3 has no process"),
        ("slow", {"process": "agent-0", "factor": 2}, "computes nothing"),
        ("drop_network", {"process": "agent-0", "which": "peers", "direction": "in", "duration_s": 1}, "monitor only"),
        ("stop", {"process": "agent-0"}, "nobody could continue agent-0 again: give duration_s"),
    ],
)
def test_what_cannot_be_done_is_refused(action: str, fields: dict[str, int | str], reason: str) -> None:
    driver = Driver()
    driver.form()
    assert driver.fault("x", action, **fields) == "refused" and reason in driver.last_event("fault")["error"]


def test_an_event_waits_for_its_round_and_says_in_which_it_was_carried_out() -> None:
    driver = Driver()
    puppets = driver.form()
    assert driver.fault("k", "kill", rank=2, at_round=500) == "accepted"
    assert driver.last_event("fault")["deadline_s"] > 600
    puppets[0].counters = {"group_rounds": 499}
    driver.advance(1.0)
    assert _agent(driver).got(Signal) == []
    puppets[0].counters = {"group_rounds": 503}
    driver.advance(0.2)
    assert driver.fault_status("k") == "fired" and len(_agent(driver).got(Signal)) == 1
    driver.exited(puppets[2])
    assert driver.fault_status("k") == "done" and driver.last_event("fault")["round"] == 503


def test_a_round_that_does_not_come_is_named() -> None:
    driver = Driver()
    driver.form()
    driver.fault("m", "mask", rank=2, at_round=500)
    driver.advance(601)
    assert driver.fault_status("m") == "failed" and driver.ranks == [0, 1, 2]
    assert "has not reached round 500 within 600 s, it is at 0" in driver.last_event("fault")["proof"]


def test_a_target_that_is_gone_when_the_round_comes_is_refused_then() -> None:
    driver = Driver()
    puppets = driver.form()
    driver.fault("k", "kill", rank=2, at_round=5)
    driver.exited(puppets[2])
    puppets[0].counters = {"group_rounds": 5}
    driver.advance(0.2)
    assert driver.fault_status("k") == "refused" and "rank 2 has no process" in driver.last_event("fault")["error"]


def test_killing_the_monitor_kills_one_monitor() -> None:
    """Its successor gets the repeated event, asks the agent under the same id, and is told what happened then."""
    driver = Driver()
    driver.form()
    monitor = Puppet(ProcessId("monitor-1"), "monitor", "monitor")
    driver.hello(_agent(driver), (monitor,))
    assert driver.fault("k", "kill", process="monitor") == "accepted"
    signal = _agent(driver).got(Signal)[-1]
    assert (signal.process, signal.signal) == ("monitor-1", "KILL")
    driver.replace_monitor("monitor-2")
    monitor.process = ProcessId("monitor-2")
    driver.advance(1.2)
    for puppet in driver.puppets.values():
        driver.hello(puppet, (monitor,) if puppet.kind == "agent" else ())
    driver.advance(3.0)
    assert driver.fault("k", "kill", process="monitor") == "accepted"
    again = _agent(driver).got(Signal)[-1]
    assert again.id == signal.id, "the agent answers this id without another signal"
    driver.say(_agent(driver), SignalDone(signal.id, ProcessId("monitor-1"), True, "reaped: signal KILL"))
    assert driver.fault_status("k") == "done"
    assert driver.last_event("fault")["proof"] == "monitor-1: reaped: signal KILL"


def test_the_agent_stops_itself_for_a_time() -> None:
    driver = Driver()
    driver.form()
    assert driver.fault("p", "stop", process="agent-0", duration_s=3) == "accepted"
    (signal,) = _agent(driver).got(Signal)
    assert (signal.process, signal.signal, signal.duration_s) == (_agent(driver).process, "STOP", 3.0)
    driver.say(_agent(driver), SignalDone(signal.id, signal.process, True, "stood still for 3.00 s"))
    assert driver.fault_status("p") == "done"


def test_the_death_of_an_agent_is_proven_by_its_successor() -> None:
    driver = Driver()
    driver.form()
    assert driver.fault("k", "kill", process="agent-0") == "accepted"
    (signal,) = _agent(driver).got(Signal)
    assert signal.process == _agent(driver).process, "it does it itself"
    _agent(driver).is_beating = False
    driver.close_lifeline(_agent(driver))
    driver.advance(0.5)
    assert driver.fault_status("k") == "accepted"
    driver.enter("agent", "agent-0", "agent-0-b")
    driver.advance(0.2)
    assert driver.fault_status("k") == "done"
    assert driver.last_event("fault")["proof"] == "pid 7 gone: lifeline closed, and agent-0 is pid 7 now"


def test_options_are_read() -> None:
    payload = b"\x87\xa4type\xa5fault\xa2id\xa1n\xa6action\xacdrop_network\xa4rank\x01"
    payload += b"\xa5which\xa5peers\xa9direction\xa3out\xaaduration_s\x05"
    fault = parse_fault(payload)
    assert (fault.which, fault.direction, fault.duration_s, fault.rank) == ("peers", "out", 5.0, 1)
