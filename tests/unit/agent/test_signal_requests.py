"""A signal is answered with proof, once it took effect; repeats are harmless."""

import pytest

from common.ids import ProcessId
from common.messages import Signal, SignalDone
from services.agent.signal_requests import PROOF_S, Answer, Deliver, SignalRequests

DECODE = ProcessId("decode-1-aa")


def ask(name: str, number: str = "e1") -> Signal:
    return Signal(number, DECODE, 42, name)


def done(ok: bool, proof: str, number: str = "e1") -> list[Answer]:
    return [Answer(SignalDone(number, DECODE, ok, proof))]


def test_kill_is_answered_when_reaped_and_only_sent_once() -> None:
    requests = SignalRequests()
    assert requests.on_request(ask("KILL"), True, 0.0) == [Deliver(DECODE, "KILL")]
    assert requests.on_request(ask("KILL"), True, 0.1) == []
    assert requests.on_exit(DECODE, "signal KILL") == done(True, "reaped: signal KILL")
    assert requests.on_request(ask("KILL"), False, 0.2) == done(True, "reaped: signal KILL")
    assert requests.on_tick(100.0) == []


def test_a_process_that_ended_before_is_proof_for_kill_but_not_for_stop() -> None:
    requests = SignalRequests()
    requests.on_exit(DECODE, "exit 1")
    assert requests.on_request(ask("KILL"), False, 0.0) == done(True, "reaped: exit 1")
    assert requests.on_request(ask("STOP", "e2"), False, 0.0) == done(False, "reaped: exit 1", "e2")


def test_unknown_process_and_unknown_signal() -> None:
    requests = SignalRequests()
    assert requests.on_request(ask("KILL"), False, 0.0) == done(True, "no such process")
    assert requests.on_request(ask("CONT", "e2"), False, 0.0) == done(False, "no such process", "e2")
    assert requests.on_request(ask("FOO", "e3"), True, 0.0) == done(False, "unknown signal 'FOO'", "e3")


@pytest.mark.parametrize(("name", "before", "after"), [("STOP", "R", "T"), ("CONT", "T", "S")])
def test_stop_and_cont_are_proved_by_the_state(name: str, before: str, after: str) -> None:
    requests = SignalRequests()
    requests.on_request(ask(name), True, 0.0)
    assert requests.stop_or_cont_pending == [DECODE]
    assert requests.on_state(DECODE, before) == []
    assert requests.on_state(DECODE, after) == done(True, f"state {after}")
    assert requests.stop_or_cont_pending == []


def test_no_effect_in_time_is_a_failure_that_says_so() -> None:
    requests = SignalRequests()
    requests.on_request(ask("STOP"), True, 0.0)
    assert requests.on_tick(PROOF_S - 0.1) == []
    assert requests.on_tick(PROOF_S) == done(False, "no effect within 5 s")


def test_death_of_a_process_that_should_stop_is_a_failure() -> None:
    requests = SignalRequests()
    requests.on_request(ask("STOP"), True, 0.0)
    assert requests.on_exit(DECODE, "signal KILL") == done(False, "reaped: signal KILL")


def test_memory_is_bounded() -> None:
    requests = SignalRequests()
    for number in range(2000):
        requests.on_request(ask("KILL", str(number)), False, 0.0)
        requests.on_exit(ProcessId(str(number)), "exit 0")
    assert len(requests._answers) <= 256 and len(requests._exits) <= 256
