"""What a decode rank takes from a second Welcome."""

from pathlib import Path

from common.ids import ProcessId
from common.messages import Directory, Welcome, Worker
from services.decode.stream import Stream
from services.decode.stream_inbox import Incoming
from tests.services.decode_group import MONITOR, tiny_config

OLD, NEW = ProcessId("router-0-a"), ProcessId("router-1-b")


def welcome(version: int, *routers: ProcessId) -> Welcome:
    workers = tuple(Worker(router, "router", "router", "127.0.0.1", 1, "") for router in routers)
    return Welcome(MONITOR, 1024, tiny_config(1), Directory(MONITOR, 1024, version, workers))


def test_its_directory_counts_too(tmp_path: Path) -> None:
    """A Directory may be lost on its way, and after a Welcome that has it nobody asks for it any more."""
    stream = Stream(ProcessId("decode-0-a"), tmp_path, lambda words: None, lambda error: None)
    stream._receive(Incoming(MONITOR, welcome(1, OLD), ()))
    assert stream._rank is not None
    delivery = stream._rank.delivery
    stream._receive(Incoming(MONITOR, welcome(2, OLD, NEW), ()))
    assert stream._rank.delivery is delivery, "the configuration stays"
    watch = delivery._routers
    assert not watch.lost([NEW], 0.0)
    assert not watch.lost([NEW], 1000.0)
