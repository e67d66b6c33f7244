"""Everything that is no decode rank, killed and stopped; a stop of all; and deaths that nobody is there to judge."""

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from common.process_table import processes_of, state_of
from services.cli.chat_client import Stream
from tests.cluster.fault_runs import (
    Row,
    assert_same,
    entry_of,
    events,
    kill,
    last_seq,
    pids_of,
    record,
    resume,
    serving,
    stop,
    under_fault,
    until,
    whole,
)
from tests.cluster.harness import Cluster, stream_all, until_tokens, varied_bodies

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.mark.parametrize("name", ["monitor", "planner", "agent-0", "prefill-0"])
async def test_a_service_is_killed(cluster: Cluster, expected: list[Stream], name: str) -> None:
    before = await whole(cluster)

    async def fault() -> str:
        return await asyncio.to_thread(cluster.inject, "kill", process=name)

    await under_fault(cluster, expected, f"SIGKILL of {name}", fault)
    after = await whole(cluster)
    assert [entry["pid"] for entry in after["ranks"]] == [entry["pid"] for entry in before["ranks"]]


@pytest.mark.parametrize("name", ["monitor", "planner", "agent-0", "router-0", "prefill-0"])
async def test_a_service_is_stopped_for_seconds(cluster: Cluster, expected: list[Stream], name: str) -> None:
    before = await whole(cluster)
    pid = [entry["pid"] for entry in (*before["services"], *before["prefill"]) if entry["name"] == name][-1]

    async def fault() -> str:
        proof = await asyncio.to_thread(cluster.inject, "stop", process=name, duration_s=3)
        await until(lambda: state_of(pid) != "T", f"{name} resumed")
        return proof

    await under_fault(cluster, expected, f"SIGSTOP of {name} for 3 s", fault)
    after = await whole(cluster)
    assert [entry["pid"] for entry in after["ranks"]] == [entry["pid"] for entry in before["ranks"]]


async def test_all_prefill_workers_are_killed(cluster: Cluster, expected: list[Stream]) -> None:
    workers = (await whole(cluster))["prefill"]

    async def fault() -> str:
        return await kill(*[worker["pid"] for worker in workers])

    await under_fault(cluster, expected, "SIGKILL of all prefill workers", fault)
    await whole(cluster)


async def test_the_router_is_killed(cluster: Cluster, expected: list[Stream]) -> None:
    """Its streams end; its clients come back and get the same."""
    before = await whole(cluster)

    async def fault(streams: list[Stream]) -> None:
        await until_tokens(streams, 5)
        proof = await asyncio.to_thread(cluster.inject, "kill", process="router-0")
        name, num_met = "SIGKILL of the router (streams end; equal when asked again)", len(streams)
        record(Row(name, proof, 0.0, num_met, num_met))

    streams = await stream_all(cluster.url, [stream.body for stream in expected], fault)
    assert all(stream.error for stream in streams)
    after = await whole(cluster)
    assert [entry["pid"] for entry in after["ranks"]] == [entry["pid"] for entry in before["ranks"]]
    assert_same(await stream_all(cluster.url, [stream.body for stream in expected]), expected)
    await cluster.wait_status(lambda s: all(entry["kv_used"] == 0 for entry in s["ranks"]), 30.0)


def decode_logs(cluster: Cluster) -> str:
    return "\n".join(path.read_text() for path in cluster.run_dir.glob("logs/decode-*.log"))


def masks_in(logs: str) -> list[list[int]]:
    """The accused of each round that ended at a deadline."""
    texts = re.findall(r"round void, VoidReason.DEADLINE, accusing \[([\d, ]*)\]", logs)
    return [[int(rank) for rank in text.split(",") if rank.strip()] for text in texts]


async def test_a_death_while_the_monitor_is_stopped(cluster: Cluster, expected: list[Stream]) -> None:
    """The others leave the round by deadline and poison, blame only the dead one, and go on once it is back."""
    victim = entry_of(await whole(cluster), 2)
    num_before = len(masks_in(await asyncio.to_thread(decode_logs, cluster)))

    async def fault() -> str:
        (monitor,) = pids_of(cluster, "monitor")
        proof = await stop(monitor)
        proof = f"{proof}; {await kill(victim['pid'])}"
        await asyncio.sleep(5.0)  # longer than the deadline of an operation
        resume(monitor)
        return proof

    await under_fault(cluster, expected, "SIGKILL of a rank while the monitor is stopped for 5 s", fault)
    accused = masks_in(await asyncio.to_thread(decode_logs, cluster))[num_before:]
    assert accused and all(mask == [2] for mask in accused), accused
    await whole(cluster)


async def test_everything_is_stopped_for_seconds(cluster: Cluster, expected: list[Stream]) -> None:
    before = await whole(cluster)
    kinds = ("monitor", "planner", "prefill", "decode")
    pids = [pid for kind in kinds for pid in pids_of(cluster, kind)]

    async def fault() -> str:
        proof = await stop(*pids)
        await asyncio.sleep(4.0)
        resume(*pids)
        return proof

    await under_fault(cluster, expected, "SIGSTOP of all for 4 s", fault)
    after = await whole(cluster)
    assert events(after, "removed", last_seq(before)) == [] and serving(after) == [0, 1, 2, 3]
    assert_same(await stream_all(cluster.url, [stream.body for stream in expected]), expected)


async def test_an_agent_that_is_told_to_end_is_started_again(tmp_path: Path) -> None:
    """It stops everything in order first, and removes what its next life needs."""
    cluster = Cluster(tmp_path / "run", "--decode-ranks", "1", "--prefill-workers", "1").wait_ready()
    try:
        (old,) = [found for found in processes_of(cluster.run_dir) if found.name == "agent-0"]
        os.kill(old.pid, signal.SIGTERM)
        await until(lambda: state_of(old.pid) in ("", "Z"), "the agent gone")
        await cluster.wait_status(lambda status: [rank["state"] for rank in status["ranks"]].count("serving") == 1)
        streams = await stream_all(cluster.url, varied_bodies(2, 8))
        assert [stream.finish for stream in streams] == ["length", "length"]
    finally:
        assert cluster.stop() == 0
