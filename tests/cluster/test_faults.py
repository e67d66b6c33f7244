"""Real processes, real signals: whatever is killed or masked, every stream is the one of a fault-free run.

The random checkpoint at temperature 1 has no margins to hide behind, and the bits of each chosen token's
log-probability are compared, so one lost expert row in one round would show.
"""

import asyncio
import os
import signal
from typing import Any

import pytest

from services.cli.chat_client import Stream
from tests.cluster.harness import Cluster, outcome, stream_all, varied_bodies
from tests.cluster.steady_load import under_load

NUM_STREAMS, MAX_TOKENS = 9, 900


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[Stream]:
    """The fault-free run."""
    streams = asyncio.run(stream_all(cluster.url, varied_bodies(NUM_STREAMS, MAX_TOKENS)))
    for stream in streams:
        assert (stream.error, stream.finish, len(stream.logprobs)) == ("", "length", MAX_TOKENS)
    return streams


def _assert_same(streams: list[Stream], expected: list[Stream]) -> None:
    for number, (stream, fault_free) in enumerate(zip(streams, expected, strict=True)):
        assert stream.error == "", f"stream {number} failed"
        assert outcome(stream) == outcome(fault_free), f"stream {number} differs from the fault-free run"


def _rank(status: dict[str, Any], rank: int) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in status["ranks"] if entry["rank"] == rank)
    return found


def _serving(status: dict[str, Any]) -> list[int]:
    return [entry["rank"] for entry in status["ranks"] if entry["state"] == "serving"]


def _void_rounds(status: dict[str, Any]) -> dict[int, int]:
    return {entry["rank"]: entry["void_rounds"] for entry in status["ranks"] if entry["state"] == "serving"}


async def test_a_second_run_side_by_side_gives_the_same_streams(cluster: Cluster, expected: list[Stream]) -> None:
    _assert_same(await stream_all(cluster.url, [record.body for record in reversed(expected)]), expected[::-1])


async def test_sigkill_of_a_decode_rank_in_mid_stream(cluster: Cluster, expected: list[Stream]) -> None:
    before = await cluster.wait_status(lambda status: len(_serving(status)) == 4)
    victim = _rank(before, 2)

    async def kill() -> None:
        os.kill(victim["pid"], signal.SIGKILL)
        removed = await cluster.wait_status(lambda status: 2 not in _serving(status))
        assert removed["epoch"] > before["epoch"]

    await under_load(cluster, expected, kill)
    after = await cluster.wait_status(lambda status: len(_serving(status)) == 4)
    reborn = _rank(after, 2)
    assert reborn["pid"] != victim["pid"] and reborn["incarnation"] > victim["incarnation"]


async def test_the_rank_that_comes_back_joins_without_a_void_round_and_serves(
    cluster: Cluster, expected: list[Stream]
) -> None:
    before = await cluster.wait_status(lambda status: len(_serving(status)) == 4)
    os.kill(_rank(before, 1)["pid"], signal.SIGKILL)
    # The heartbeat that shows the new epoch is the first one that surely counts the void round of the kill.
    alone = await cluster.wait_status(
        lambda status: (
            len(_serving(status)) == 3
            and all(_rank(status, rank)["epoch"] == status["epoch"] for rank in _serving(status))
        )
    )
    voids = _void_rounds(alone)

    async def join() -> dict[str, Any]:
        await cluster.wait_status(lambda status: len(_serving(status)) == 4)
        return await cluster.wait_status(lambda status: _rank(status, 1)["tokens_committed"] > 0)

    # The load goes on while the rank joins; what runs long enough is moved to it.
    after, _ = await under_load(cluster, expected, join)
    assert {rank: _void_rounds(after)[rank] for rank in voids} == voids, "the join voided a round of a member"


async def test_sigkill_of_a_prefill_worker_under_load(cluster: Cluster, expected: list[Stream]) -> None:
    status = await cluster.wait_status(lambda status: len(status["prefill"]) == 2)
    victim = status["prefill"][0]

    async def kill() -> None:
        os.kill(victim["pid"], signal.SIGKILL)
        await cluster.wait_status(
            lambda status: len(status["prefill"]) == 2 and victim["pid"] not in [w["pid"] for w in status["prefill"]]
        )

    await under_load(cluster, expected, kill)


async def test_mask_and_unmask_by_a_fault_event(cluster: Cluster, expected: list[Stream]) -> None:
    before = await cluster.wait_status(lambda status: len(_serving(status)) == 4)

    async def mask() -> None:
        await asyncio.to_thread(cluster.fault, "mask", rank=3)

    await under_load(cluster, expected, mask)
    masked = await cluster.fetch_status()
    assert _rank(masked, 3)["state"] == "masked" and _rank(masked, 3)["pid"] == _rank(before, 3)["pid"]

    async def unmask() -> None:
        await asyncio.to_thread(cluster.fault, "unmask", rank=3)

    await under_load(cluster, expected, unmask)
    after = await cluster.fetch_status()
    assert _rank(after, 3)["state"] == "serving" and _rank(after, 3)["pid"] == _rank(before, 3)["pid"]


async def test_kill_by_a_fault_event_is_proven(cluster: Cluster, expected: list[Stream]) -> None:
    before = await cluster.wait_status(lambda status: len(_serving(status)) == 4)
    pid = _rank(before, 0)["pid"]

    async def kill() -> None:
        await asyncio.to_thread(cluster.fault, "kill", rank=0)
        assert _rank(await cluster.fetch_status(), 0)["pid"] != pid or 0 not in _serving(await cluster.fetch_status())

    await under_load(cluster, expected, kill)
    await cluster.wait_status(lambda status: len(_serving(status)) == 4)


async def test_with_a_prefill_worker_alive_decode_ranks_compute_no_prompt_tokens(cluster: Cluster) -> None:
    status = await cluster.fetch_status()
    assert [entry["prompt_tokens_computed"] for entry in status["ranks"]] == [0] * len(status["ranks"])
    assert sum(worker["prompt_tokens_computed"] for worker in status["prefill"]) > 0


async def test_memory_that_must_not_be_trusted_is_never_used_again(cluster: Cluster, expected: list[Stream]) -> None:
    before = _rank(await cluster.wait_status(lambda status: len(_serving(status)) == 4), 2)

    async def corrupt() -> None:
        proof = await asyncio.to_thread(cluster.inject, "corrupt_heap", rank=2)
        assert "bytes of expert_weights (crc " in proof and "gone: signal KILL" in proof

    await under_load(cluster, expected, corrupt)
    after = await cluster.wait_status(lambda status: len(_serving(status)) == 4)
    assert before["heap"] not in [entry["heap"] for entry in after["ranks"]]


async def test_a_rank_that_its_peers_do_not_hear_is_found_out(cluster: Cluster, expected: list[Stream]) -> None:
    before = await cluster.wait_status(lambda status: len(_serving(status)) == 4)
    victim = _rank(before, 1)

    async def cut() -> None:
        options = {"which": "peers", "direction": "out", "duration_s": 60}
        proof = await asyncio.to_thread(cluster.inject, "drop_network", 1, None, **options)
        assert "out of peers" in proof
        await cluster.wait_status(lambda status: victim["process"] not in [e["process"] for e in status["ranks"]])

    await under_load(cluster, expected, cut)
    after = await cluster.wait_status(lambda status: len(_serving(status)) == 4)
    removed = [e for e in after["events"] if e["kind"] == "removed" and e["seq"] > before["events"][-1]["seq"]]
    assert [event["process"] for event in removed] == [victim["process"]], "a healthy rank was removed"


async def test_a_stop_at_a_round_happens_in_that_round_and_removes_nobody(
    cluster: Cluster, expected: list[Stream]
) -> None:
    before = await cluster.wait_status(lambda status: len(_serving(status)) == 4)

    async def stop() -> int:
        # Heartbeats tell of rounds that are over: far enough ahead not to have been made already.
        at_round: int = max(entry["group_rounds"] for entry in (await cluster.fetch_status())["ranks"]) + 600
        await asyncio.to_thread(cluster.inject, "stop", rank=3, duration_s=0.3, at_round=at_round)
        return at_round

    at_round, _ = await under_load(cluster, expected, stop)
    after = await cluster.fetch_status()
    done = next(e for e in reversed(after["events"]) if e["kind"] == "fault" and e["action"] == "stop")
    assert at_round <= done["round"] < at_round + 200 and "state T" in done["proof"]
    assert _rank(after, 3)["incarnation"] == _rank(before, 3)["incarnation"]
