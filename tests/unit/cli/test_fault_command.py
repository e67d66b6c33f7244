"""`regrow fault` against a bus played by a thread: it repeats until its own event is acknowledged."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq

from common.fault import FaultRefused
from common.monitor_address import MonitorAddress
from services.cli.fault import FaultClient, fault, fault_event, scale, scale_event

Answers = Callable[[dict[str, Any], int], list[object]]


@contextmanager
def bus(answers: Answers) -> Iterator[MonitorAddress]:
    """``answers(event, n)``: what to publish when ``event`` arrives for the n-th time."""
    context, stop = zmq.Context(), threading.Event()
    publisher = context.socket(zmq.PUB)
    subscriber, port = _bind_pair(context, publisher)

    def play() -> None:
        num_seen = 0
        while not stop.is_set():
            if not subscriber.poll(20):
                continue
            topic, payload = subscriber.recv_multipart()
            assert topic == b"fault"
            num_seen += 1
            for answer in answers(msgspec.msgpack.decode(payload), num_seen):
                data = answer if isinstance(answer, bytes) else msgspec.msgpack.encode(answer)
                publisher.send_multipart([b"event", data])

    thread = threading.Thread(target=play)
    thread.start()
    try:
        yield MonitorAddress("127.0.0.1", port)
    finally:
        stop.set()
        thread.join(timeout=10)
        context.destroy(linger=0)


def _bind_pair(context: "zmq.Context[zmq.Socket[bytes]]", publisher: "zmq.Socket[bytes]") -> tuple[Any, int]:
    """Subscriber at port + 2, publisher at port + 3; returns the subscriber and the port."""
    for port in range(22_000, 32_000, 11):
        subscriber = context.socket(zmq.SUB)
        subscriber.subscribe(b"fault")
        try:
            subscriber.bind(f"tcp://127.0.0.1:{port + 2}")
            publisher.bind(f"tcp://127.0.0.1:{port + 3}")
        except zmq.ZMQError:
            subscriber.close(0)
        else:
            return subscriber, port
    raise AssertionError("no free ports")


def acknowledgement(event: dict[str, Any], status: str, **fields: str) -> dict[str, object]:
    return {"type": "event", "kind": "fault", "id": event["id"], "status": status, **fields}


def test_repeats_until_the_final_acknowledgement_of_its_own_event(capsys: pytest.CaptureFixture[str]) -> None:
    def answers(event: dict[str, Any], number: int) -> list[object]:
        assert event["type"] == "fault" and event["action"] == "kill" and event["rank"] == 2
        if number < 3:
            return [acknowledgement(event, "accepted"), acknowledgement({"id": "another"}, "done"), b"\xc1", [1, 2]]
        return [acknowledgement(event, "done", proof="pid 7 gone")]

    with bus(answers) as address:
        assert fault(address, "kill", 2, None) == 0
    assert capsys.readouterr().out == "kill rank 2: done: pid 7 gone\n"


@pytest.mark.parametrize("status", ["failed", "refused"])
def test_no_proof_is_code_1_with_the_reason(status: str, capsys: pytest.CaptureFixture[str]) -> None:
    def answers(event: dict[str, Any], number: int) -> list[object]:
        return [acknowledgement(event, status, proof="", error="no live process is called 'x'")]

    with bus(answers) as address:
        assert fault(address, "stop", None, "x") == 1
    assert capsys.readouterr().out == f"stop x: {status}: no live process is called 'x'\n"


def test_scale_says_the_wanted_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    def answers(event: dict[str, Any], number: int) -> list[object]:
        assert (event["action"], event["decode"], event["prefill"]) == ("scale", 6, 2)
        return [acknowledgement(event, "done", proof="view 9")]

    with bus(answers) as address:
        assert scale(address, 6, 2) == 0
    assert capsys.readouterr().out == "scale decode 6, prefill 2: done: view 9\n"
    with pytest.raises(FaultRefused, match="needs decode or prefill"):
        scale_event(None, None)


def test_silence_ends_at_the_deadline() -> None:
    with (
        bus(lambda event, number: []) as address,
        FaultClient(address) as client,
        pytest.raises(TimeoutError, match="no acknowledgement from the bus at tcp://127"),
    ):
        client.inject(fault_event("kill", 0, None), accept_s=0.3)


def test_events_are_fresh_and_checked_before_they_are_sent() -> None:
    assert fault_event("kill", 0, None)["id"] != fault_event("kill", 0, None)["id"]
    for action, rank, process in (("explode", 0, None), ("kill", None, None), ("kill", 0, "x"), ("mask", None, "x")):
        with pytest.raises(FaultRefused):
            fault_event(action, rank, process)
