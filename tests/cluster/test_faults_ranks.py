"""Decode ranks that stop, die together, or die while the group is busy with the last death."""

import asyncio

import pytest

from services.cli.chat_client import Stream
from tests.cluster.fault_runs import (
    entry_of,
    events,
    kill,
    last_seq,
    resume,
    serving,
    stop,
    under_fault,
    whole,
    without,
)
from tests.cluster.harness import Cluster

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


async def test_a_short_stop_removes_nobody(cluster: Cluster, expected: list[Stream]) -> None:
    before = await whole(cluster)

    async def fault() -> str:
        return await asyncio.to_thread(cluster.inject, "stop", rank=1, duration_s=0.6)

    assert "state T" in await under_fault(cluster, expected, "SIGSTOP of a rank for 0.6 s", fault)
    after = await whole(cluster)
    assert events(after, "removed", last_seq(before)) == []
    assert entry_of(after, 1)["incarnation"] == entry_of(before, 1)["incarnation"]


async def test_a_long_stop_ends_in_a_new_life(cluster: Cluster, expected: list[Stream]) -> None:
    before = entry_of(await whole(cluster), 1)

    async def fault() -> str:
        proof = await asyncio.to_thread(cluster.inject, "stop", rank=1)
        await without(cluster, 1, before["incarnation"])
        return proof

    await under_fault(cluster, expected, "SIGSTOP of a rank for good", fault)
    after = entry_of(await whole(cluster), 1)
    assert after["incarnation"] > before["incarnation"] and after["pid"] != before["pid"]


async def test_a_kill_in_a_given_round(cluster: Cluster, expected: list[Stream]) -> None:
    before = entry_of(await whole(cluster), 1)

    async def fault() -> str:
        # Heartbeats tell of rounds that are over: far enough ahead not to have been made already.
        at_round = max(entry["group_rounds"] for entry in (await cluster.fetch_status())["ranks"]) + 600
        proof = await asyncio.to_thread(cluster.inject, "kill", rank=1, at_round=at_round)
        done = events(await without(cluster, 1, before["incarnation"]), "fault")[-1]
        assert at_round <= done["round"] < at_round + 200
        return f"round {done['round']} for {at_round}; {proof}"

    await under_fault(cluster, expected, "SIGKILL of a rank at a round", fault)
    assert entry_of(await whole(cluster), 1)["incarnation"] > before["incarnation"]


async def test_masked_and_unmasked(cluster: Cluster, expected: list[Stream]) -> None:
    before = entry_of(await whole(cluster), 3)

    async def fault() -> str:
        proof = await asyncio.to_thread(cluster.inject, "mask", rank=3)
        return f"{proof}; {await asyncio.to_thread(cluster.inject, 'unmask', rank=3)}"

    await under_fault(cluster, expected, "mask and unmask of a rank", fault)
    after = entry_of(await whole(cluster), 3)
    assert after["pid"] == before["pid"] and after["incarnation"] > before["incarnation"]


async def test_a_zombie_that_wakes_is_out_and_joins_anew(cluster: Cluster, expected: list[Stream]) -> None:
    """The agent is stopped meanwhile, so that nobody ends the rank before it wakes."""
    before = entry_of(await whole(cluster), 2)

    async def fault() -> str:
        held = asyncio.create_task(asyncio.to_thread(cluster.inject, "stop", process="agent-0", duration_s=12.0))
        await asyncio.sleep(0.5)
        proof = await stop(before["pid"])
        await without(cluster, 2, before["incarnation"])
        resume(before["pid"])
        return f"{proof}; agent {await held}"

    await under_fault(cluster, expected, "SIGSTOP of a rank and of its agent; the zombie wakes", fault)
    after = await whole(cluster)
    assert entry_of(after, 2)["incarnation"] != before["incarnation"]


async def test_two_ranks_at_once(cluster: Cluster, expected: list[Stream]) -> None:
    status = await whole(cluster)
    pids = [entry_of(status, rank)["pid"] for rank in (1, 2)]

    async def fault() -> str:
        return await kill(*pids)

    await under_fault(cluster, expected, "SIGKILL of two ranks at once", fault)
    await whole(cluster)


async def test_a_second_death_during_the_recovery_from_the_first(cluster: Cluster, expected: list[Stream]) -> None:
    status = await whole(cluster)
    first, second = entry_of(status, 3), entry_of(status, 0)

    async def fault() -> str:
        proof = await kill(first["pid"])
        await cluster.wait_status(lambda s: s["epoch"] > status["epoch"])
        return f"{proof}; {await kill(second['pid'])}"

    await under_fault(cluster, expected, "SIGKILL of a rank in the view that the death of another made", fault)
    await whole(cluster)


@pytest.mark.parametrize("who", ["the newcomer", "a member"])
async def test_a_death_during_a_join(cluster: Cluster, expected: list[Stream], who: str) -> None:
    victim = entry_of(await whole(cluster), 1)

    async def fault() -> str:
        await kill(victim["pid"])
        joining = await cluster.wait_status(
            lambda s: s["prepared"] is not None or entry_of(s, 1).get("state") == "joining", 60.0
        )
        newcomers = [entry for entry in joining["ranks"] if entry["state"] == "joining"]
        second = newcomers[0] if who == "the newcomer" else entry_of(joining, 3)
        return f"epoch {joining['prepared']} was prepared; {await kill(second['pid'])}"

    await under_fault(cluster, expected, f"SIGKILL of {who} during a join", fault)
    await whole(cluster)


async def test_a_death_during_a_handoff_of_kv(cluster: Cluster, expected: list[Stream]) -> None:
    before = await whole(cluster)

    async def fault() -> str:
        for _ in range(4000):
            requests = await cluster.fetch_requests()
            handed = [r for r in requests if r["state"] in ("prefilling", "handing off") and r["rank"] >= 0]
            if handed:
                victim = entry_of(before, handed[0]["rank"])
                return f"request {handed[0]['state']}; {await kill(victim['pid'])}"
            await asyncio.sleep(0.002)
        raise AssertionError("no handoff was seen")

    await under_fault(cluster, expected, "SIGKILL of a rank that waits for KV", fault)
    await whole(cluster)


async def test_slow_ranks_are_kept_by_default(cluster: Cluster, expected: list[Stream]) -> None:
    before = await whole(cluster)

    async def fault() -> str:
        proof = await asyncio.to_thread(cluster.inject, "slow", rank=2, factor=2)
        await asyncio.sleep(6.0)
        assert (await cluster.fetch_status())["ranks"][2]["slow_percent"] == 200
        await asyncio.to_thread(cluster.inject, "slow", rank=2, factor=1)
        return proof

    await under_fault(cluster, expected, "a rank twice as slow, kept", fault)
    after = await whole(cluster)
    assert events(after, "removed", last_seq(before)) == [] and serving(after) == [0, 1, 2, 3]


async def test_memory_that_must_not_be_trusted(cluster: Cluster, expected: list[Stream]) -> None:
    before = entry_of(await whole(cluster), 0)

    async def fault() -> str:
        return await asyncio.to_thread(cluster.inject, "corrupt_heap", rank=0)

    proof = await under_fault(cluster, expected, "corrupt_heap of a rank", fault)
    assert "bytes of expert_weights (crc " in proof and "gone: signal KILL" in proof
    after = await whole(cluster)
    heaps = [entry["heap"] for entry in after["ranks"]]
    assert before["heap"] not in heaps and before["pid"] not in [entry["pid"] for entry in after["ranks"]]
