"""What `regrow placement` asks a monitor, which the test plays."""

import time
from collections.abc import Iterator

import pytest
import zmq

from common.ids import Epoch, ProcessId
from common.messages import Directory, PlacementPlan, Refusal, Wake, encode
from common.monitor_address import MonitorAddress
from services.cli.placement import MonitorTalk

MONITOR = ProcessId("monitor-cd")


@pytest.fixture
def talk() -> Iterator[tuple[MonitorTalk, "zmq.Socket[bytes]"]]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as monitor:
        monitor.linger = 0
        port = monitor.bind_to_random_port("tcp://127.0.0.1")
        talk = MonitorTalk(MonitorAddress("127.0.0.1", port))
        yield talk, monitor
        talk.close()


def test_a_refusal_is_heard_behind_other_words_and_the_wait_is_kept(
    talk: tuple[MonitorTalk, "zmq.Socket[bytes]"],
) -> None:
    asker, monitor = talk
    asker.send(PlacementPlan(ProcessId("cli"), 1, ()))
    peer, _ = monitor.recv_multipart()
    for word in (Directory(MONITOR, 1, 1, ()), Refusal("a rank is being emptied"), Wake(Epoch(1))):
        monitor.send_multipart([peer, encode(word)])
    began = time.monotonic()
    assert asker.refusal(0.3) == "a rank is being emptied"
    assert time.monotonic() - began >= 0.3
    assert asker.refusal(0.05) == ""
