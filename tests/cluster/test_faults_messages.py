"""What strangers and the past may send to live sockets, and clients that do not wait for their answers."""

import asyncio
import socket
import time
from collections.abc import Iterator
from random import Random

import msgspec
import pytest
import zmq

from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank
from common.messages import (
    AskView,
    Exited,
    Heartbeat,
    Message,
    Release,
    RollAnswer,
    SlotLeft,
    TokenBatch,
    View,
    VoidReport,
    decode,
    encode,
)
from common.monitor_address import MonitorAddress
from services.cli.chat_client import Stream
from services.cli.run_directory import read_description
from tests.cluster.fault_runs import events, last_seq, serving, under_fault, whole
from tests.cluster.harness import Cluster, stream_all, until_tokens

pytestmark = [pytest.mark.timeout(300)]


def address_of(cluster: Cluster) -> MonitorAddress:
    return MonitorAddress.parse(read_description(cluster.run_dir).monitor_address)


def view_of(cluster: Cluster, context: "zmq.Context[zmq.Socket[bytes]]") -> View:
    """What the monitor tells to who asks."""
    asker = ProcessId("stranger-0")
    with context.socket(zmq.DEALER) as link:
        link.setsockopt_string(zmq.IDENTITY, asker)
        link.connect(address_of(cluster).control)
        link.send(encode(AskView(asker)))
        deadline = time.monotonic() + 20.0
        while time.monotonic() < deadline:
            if link.poll(200):
                message = decode(link.recv_multipart()[-1])
                if isinstance(message, View):
                    return message
    raise AssertionError("no view")


def nonsense(random: Random) -> Iterator[bytes]:
    for size in (0, 1, 3, 40, 5000):
        yield random.randbytes(size)
    yield msgspec.msgpack.encode(["view", 1, 2])
    yield msgspec.msgpack.encode({"type": "fault"})
    yield msgspec.msgpack.encode(["heartbeat", "p", "no rank"])
    yield b"\x93" * 200


def stale(view: View) -> list[Message]:
    """True words of a past that is over, or of ranks that others hold now."""
    first = view.members[0]
    old_epoch, gone = Epoch(view.epoch - 1), Incarnation(first.incarnation - 1)
    rank, process = Rank(first.rank), first.process
    return [
        Heartbeat(process, rank, gone, view.term - 1024, old_epoch, "void"),
        VoidReport(process, rank, gone, old_epoch, 7, (1, 2, 3)),
        VoidReport(process, rank, first.incarnation, old_epoch, 7, (1, 2, 3)),
        RollAnswer(process, rank, first.incarnation, old_epoch, 1, (1, 2)),
        SlotLeft(process, rank, gone, old_epoch),
        Exited("agent-0", ProcessId(f"{process}-before"), "decode-0", 1, "signal KILL"),
        msgspec.structs.replace(view, epoch=old_epoch, members=view.members[:1]),
        msgspec.structs.replace(view, term=view.term - 1024, epoch=Epoch(view.epoch + 500), members=view.members[:1]),
        TokenBatch(rank, gone, old_epoch, ()),
        Heartbeat(ProcessId("nobody"), NO_RANK),
        # True to the present, but said for somebody else.
        Heartbeat(process, rank, first.incarnation, view.term, view.epoch, "void"),
        VoidReport(process, rank, first.incarnation, view.epoch, 7, (1, 2, 3)),
        SlotLeft(process, rank, first.incarnation, view.epoch),
        Release("no-such-request", 3),  # type: ignore[arg-type]
    ]


def throw(cluster: Cluster, seconds: float, seed: int) -> str:
    """At every socket that is known: nonsense, stale words, each doubled, in random order."""
    random, address = Random(seed), address_of(cluster)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        view = view_of(cluster, context)
        targets = [address.control, *(member.endpoint for member in view.members)]
        payloads = [*nonsense(random), *(encode(message) for message in stale(view))] * 2
        sent, end = 0, time.monotonic() + seconds
        while time.monotonic() < end:
            for number, target in enumerate(targets):
                with context.socket(zmq.DEALER) as link:
                    link.linger = 500
                    link.setsockopt_string(zmq.IDENTITY, f"stranger-{number}")
                    link.connect(target)
                    for payload in random.sample(payloads, len(payloads)):
                        link.send_multipart([payload, *[random.randbytes(20)] * random.randrange(3)])
                        sent += 1
            with context.socket(zmq.PUB) as publisher:
                publisher.linger = 500
                publisher.connect(address.publish)
                time.sleep(0.05)  # a fresh publisher loses its first messages
                for payload in payloads:
                    publisher.send_multipart([random.choice((b"fault", b"view", b"load", b"plan", b"x")), payload])
                    sent += 1
            for port in (address.port, address.lifeline_port, address.port + 2, address.port + 3):
                with socket.create_connection(("127.0.0.1", port), timeout=5) as raw:
                    raw.sendall(random.randbytes(300))
                    sent += 1
    finally:
        context.destroy()
    return f"{sent} messages thrown"


@pytest.mark.faults
async def test_nonsense_and_the_past_change_nothing(cluster: Cluster, expected: list[Stream]) -> None:
    before = await whole(cluster)

    async def fault() -> str:
        said = await asyncio.to_thread(throw, cluster, 5.0, 1)
        status = await cluster.fetch_status()
        counted = sum(entry.get("malformed_messages", 0) for entry in status["ranks"])
        refused = len(events(status, "fault"))
        assert counted > 0 and refused > 0
        return f"{said}; {counted} counted by ranks, {refused} refused as fault events"

    await under_fault(cluster, expected, "malformed, stale, doubled and reordered messages", fault)
    after = await whole(cluster)
    assert events(after, "removed", last_seq(before)) == [] and serving(after) == [0, 1, 2, 3]
    assert [entry["pid"] for entry in after["ranks"]] == [entry["pid"] for entry in before["ranks"]]
    assert after["epoch"] == before["epoch"], "a stranger made a view"


@pytest.mark.faults
async def test_clients_that_go_away_free_what_they_held(cluster: Cluster, expected: list[Stream]) -> None:
    await whole(cluster)
    bodies, num_held = [stream.body for stream in expected], []

    async def leave(streams: list[Stream]) -> None:
        await until_tokens(streams, 5)
        num_held.append(len(await cluster.fetch_requests()))
        used = sum(entry["kv_used"] for entry in (await cluster.fetch_status())["ranks"])
        assert used > 0 and num_held[0] > len(expected), "nothing was held"
        raise ConnectionAbortedError

    async def fault() -> str:
        try:
            await stream_all(cluster.url, bodies, leave)
        except* ConnectionAbortedError:
            pass
        for _ in range(400):
            num_left = len(await cluster.fetch_requests())
            if num_left <= len(expected):
                return f"{len(bodies)} clients gone: {num_held[0]} requests, then {num_left}"
            await asyncio.sleep(0.05)
        raise AssertionError(f"more than {len(expected)} requests are left, of {num_held[0]}")

    await under_fault(cluster, expected, "clients that disconnect in mid-stream", fault)
    await cluster.wait_status(lambda s: all(entry["kv_used"] == 0 for entry in s["ranks"]), 20.0)
    assert await cluster.fetch_requests() == []
