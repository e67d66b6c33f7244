"""A rank that loses what passes between it and the monitor, or its peers, in one direction or both."""

import asyncio

import pytest

from services.cli.chat_client import Stream
from tests.cluster.fault_runs import entry_of, events, last_seq, serving, under_fault, whole, without
from tests.cluster.harness import Cluster

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


def cut(cluster: Cluster, which: str, direction: str, duration_s: float, rank: int | None, process: str | None) -> str:
    options = {"which": which, "direction": direction, "duration_s": duration_s}
    return cluster.inject("drop_network", rank, process, **options)


@pytest.mark.parametrize("direction", ["both", "out"])
async def test_a_rank_that_the_monitor_does_not_hear(cluster: Cluster, expected: list[Stream], direction: str) -> None:
    before = entry_of(await whole(cluster), 1)

    async def fault() -> str:
        proof = await asyncio.to_thread(cut, cluster, "monitor", direction, 10, 1, None)
        removed = await without(cluster, 1, before["incarnation"])
        return f"{proof}; {events(removed, 'removed')[-1]['evidence']}"

    proof = await under_fault(cluster, expected, f"drop_network monitor {direction}", fault)
    assert "no heartbeat" in proof
    await whole(cluster)


async def test_a_rank_that_does_not_hear_the_monitor_gets_views_from_its_peers(
    cluster: Cluster, expected: list[Stream]
) -> None:
    before = await whole(cluster)
    deaf, victim = entry_of(before, 1), entry_of(before, 2)

    async def fault() -> str:
        proof = await asyncio.to_thread(cut, cluster, "monitor", "in", 20, 1, None)
        await asyncio.to_thread(cluster.inject, "kill", rank=2)
        removed = await without(cluster, 2, victim["incarnation"])
        await cluster.wait_status(lambda s: entry_of(s, 1).get("epoch", 0) >= removed["epoch"], 4.0)
        return f"{proof}; it adopted epoch {removed['epoch']} all the same"

    await under_fault(cluster, expected, "drop_network monitor in, then SIGKILL of another", fault)
    after = await whole(cluster)
    assert entry_of(after, 1)["incarnation"] == deaf["incarnation"], "it was removed"


@pytest.mark.parametrize("direction", ["in", "out", "both"])
async def test_a_rank_that_is_cut_off_from_its_peers(cluster: Cluster, expected: list[Stream], direction: str) -> None:
    before = await whole(cluster)
    victim = entry_of(before, 3)

    async def fault() -> str:
        proof = await asyncio.to_thread(cut, cluster, "peers", direction, 120, 3, None)
        removed = await without(cluster, 3, victim["incarnation"])
        return f"{proof}; {events(removed, 'removed')[-1]['evidence']}"

    await under_fault(cluster, expected, f"drop_network peers {direction}", fault)
    after = await whole(cluster)
    gone = {event["process"] for event in events(after, "removed", last_seq(before))}
    assert gone == {victim["process"]}, "a healthy rank was removed"
    assert victim["pid"] not in [entry["pid"] for entry in after["ranks"]] and serving(after) == [0, 1, 2, 3]


async def test_a_prefill_worker_that_loses_its_peers(cluster: Cluster, expected: list[Stream]) -> None:
    await whole(cluster)

    async def fault() -> str:
        return await asyncio.to_thread(cut, cluster, "peers", "both", 20, None, "prefill-0")

    await under_fault(cluster, expected, "drop_network peers both, of a prefill worker", fault)
