"""Too few ranks for all experts, or none: requests wait for capacity, and get 503 when it does not come in time."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster.fault_runs import (
    Row,
    assert_same,
    entry_of,
    events,
    fault_free,
    kill,
    last_seq,
    record,
    resume,
    serving,
    stop,
    under_fault,
    whole,
)
from tests.cluster.harness import Cluster, outcome, processes_of, stream_all

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]

DEADLINE_S = 20.0
CONFIG = f"[router]\nrequest_deadline_s = {DEADLINE_S}\n"
BARE = "[decode]\nnum_redundant_experts = 0\n"
SPARE = "[decode]\nnum_redundant_experts = 12\n[agent]\ngive_up_after = 4\ngive_up_window_s = 600.0\n"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two ranks that hold each expert once."""
    yield from running(tmp_path_factory.mktemp("bare"), CONFIG + BARE, 2)


@pytest.fixture(scope="module")
def without_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running(tmp_path_factory.mktemp("lax"), CONFIG + BARE + "allow_missing_experts = true\n", 2)


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four ranks with room for one loss, but most experts there once."""
    yield from running(tmp_path_factory.mktemp("spare"), SPARE, 4)


def running(directory: Path, config: str, num_ranks: int) -> Iterator[Cluster]:
    cluster = Cluster(directory / "run", "--decode-ranks", str(num_ranks), "--prefill-workers", "1", config=config)
    try:
        yield cluster.wait_ready()
    finally:
        cluster.stop()


async def refused(cluster: Cluster, body: dict[str, Any]) -> tuple[int, str]:
    """Status and Retry-After of a request that nobody can serve."""
    async with aiohttp.ClientSession() as session, session.post(f"{cluster.url}/v1/completions", json=body) as response:
        await response.read()
        return response.status, response.headers.get("Retry-After", "")


async def test_the_last_copy_of_an_expert_is_repaired_from_the_checkpoint(spare: Cluster) -> None:
    expected = await asyncio.to_thread(fault_free, spare)
    before = await whole(spare, 4, 1)

    async def fault() -> str:
        return await kill(entry_of(before, 1)["pid"])

    await under_fault(spare, expected, "SIGKILL of the rank with the last copy of experts", fault, (4, 1))
    after = await whole(spare, 4, 1)
    views = [event for event in events(after, "view", last_seq(before)) if 1 not in event["ranks"]]
    assert views[0]["placement_version"] > before["placement"]["version"], "nothing was repaired"
    assert events(after, "degraded", last_seq(before)) == []


async def test_too_few_slots_for_all_experts(bare: Cluster) -> None:
    """New requests wait and get 503 with Retry-After; streams go on exactly when a rank is back in time."""
    expected = await asyncio.to_thread(fault_free, bare)
    await whole(bare, 2, 1)

    async def fault() -> str:
        proof = await asyncio.to_thread(bare.inject, "mask", rank=1)
        # A heartbeat from within that view counts all that was committed before it.
        degraded = await bare.wait_status(
            lambda s: bool(events(s, "degraded")) and entry_of(s, 0)["epoch"] == s["epoch"]
        )
        await asyncio.sleep(3.0)
        after = entry_of(await bare.fetch_status(), 0)
        assert after["tokens_committed"] == entry_of(degraded, 0)["tokens_committed"], "a round committed"
        await asyncio.to_thread(bare.inject, "unmask", rank=1)
        return proof

    await under_fault(bare, expected, "too few slots for all experts for 3 s", fault, (2, 1))
    await whole(bare, 2, 1)
    proof = await asyncio.to_thread(bare.inject, "mask", rank=1)
    body = {**expected[0].body, "stream": False}
    answers = await asyncio.gather(*(refused(bare, body) for _ in range(4)))
    assert answers == [(503, "5")] * 4, answers
    record(Row(f"too few slots for all experts: 503 after {DEADLINE_S:g} s", proof, 0.0, 0, 4))
    await asyncio.to_thread(bare.inject, "unmask", rank=1)
    await whole(bare, 2, 1)
    assert_same(await stream_all(bare.url, [stream.body for stream in expected]), expected)


async def test_the_last_decode_rank_is_lost_and_comes_back_in_time(spare: Cluster) -> None:
    expected = await asyncio.to_thread(fault_free, spare)
    before = await whole(spare, 4, 1)

    async def fault() -> str:
        return await kill(*[entry["pid"] for entry in before["ranks"]])

    await under_fault(spare, expected, "SIGKILL of all decode ranks", fault, (4, 1))
    await whole(spare, 4, 1)


async def test_the_last_decode_rank_is_lost_for_good(bare: Cluster) -> None:
    expected = await asyncio.to_thread(fault_free, bare)
    before = await whole(bare, 2, 1)
    agents = [pid for pid, command in processes_of(bare.run_dir) if "agent" in command.split()[2]]
    assert len(agents) == 1
    held = await stop(*agents)
    proof = f"{held}; {await kill(*[entry['pid'] for entry in before['ranks']])}"
    try:
        answers = await asyncio.gather(*(refused(bare, {**expected[0].body, "stream": False}) for _ in range(3)))
    finally:
        resume(*agents)
    assert answers == [(503, "5")] * 3, answers
    record(Row(f"all decode ranks lost, none comes back: 503 after {DEADLINE_S:g} s", proof, 0.0, 0, 3))
    await whole(bare, 2, 1)
    assert_same(await stream_all(bare.url, [stream.body for stream in expected]), expected)


async def test_with_missing_experts_allowed_what_lacks_one_is_marked_and_nothing_else(without_all: Cluster) -> None:
    cluster = without_all
    expected = await asyncio.to_thread(fault_free, cluster)
    await whole(cluster, 2, 1)
    proof = await asyncio.to_thread(cluster.inject, "mask", rank=1)
    short = [{**stream.body, "max_tokens": number % 4 + 1} for number, stream in enumerate(expected)]
    answers = [await whole_answer(cluster, {**body, "stream": False}) for body in short]
    marked = [answer["choices"][0].get("missing_experts", False) for answer, _ in answers]
    assert marked == [headers.get("X-Regrow-Missing-Experts") == "true" for _, headers in answers]
    assert any(marked) and not all(marked), marked
    streams = await stream_all(cluster.url, short)
    assert [stream.missing_experts for stream in streams] == marked
    assert all(stream.finish == "length" for stream in streams)
    await asyncio.to_thread(cluster.inject, "unmask", rank=1)
    await whole(cluster, 2, 1)
    again = await stream_all(cluster.url, short)
    assert not any(stream.missing_experts for stream in again)
    for stream, other, is_marked in zip(streams, again, marked, strict=True):
        assert is_marked or outcome(stream) == outcome(other), "unmarked, and yet not the fault-free answer"
    assert any(outcome(stream) != outcome(other) for stream, other in zip(streams, again, strict=True))
    record(Row("an expert without live copy, allow_missing_experts: affected ones marked", proof, 0.0, 0, len(short)))


async def whole_answer(cluster: Cluster, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    async with aiohttp.ClientSession() as session, session.post(f"{cluster.url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json(), dict(response.headers)


async def test_a_rank_that_flaps_is_given_up_and_the_group_goes_on(spare: Cluster) -> None:
    """Killed as often as it starts, until its agent has had enough and says so."""
    expected = await asyncio.to_thread(fault_free, spare)
    before = await whole(spare, 4, 1)
    name = entry_of(before, 2)["name"]

    async def fault() -> str:
        seen: set[int] = set()
        for _ in range(3000):
            status = await spare.fetch_status()
            if gave_up := events(status, "gave_up", last_seq(before)):
                return f"{len(seen)} lives of {name} killed; {gave_up[-1]['text']}"
            entries = [*status["ranks"], *status["services"]]
            for pid in {e["pid"] for e in entries if e["name"] == name and e["state"] != "dead"} - seen:
                seen.add(pid)
                await kill(pid)
            await asyncio.sleep(0.02)
        raise AssertionError("the agent has not given up")

    await under_fault(spare, expected, "a rank that dies again and again", fault, (3, 1))
    assert len(serving(await spare.fetch_status())) == 3
    assert_same(await stream_all(spare.url, [stream.body for stream in expected]), expected)
