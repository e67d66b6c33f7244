"""Several routers on one port: one dies or is replaced, and only its own clients may notice the death."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.cli.chat_client import Stream, new_session, run_stream
from tests.cluster.harness import ROOT, Cluster, outcome, stream_all, until_tokens, varied_bodies

NUM_STREAMS, MAX_TOKENS = 12, 400  # seconds long, so that a kill finds them open
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two routers, two decode ranks."""
    run_dir: Path = tmp_path_factory.mktemp("routers") / "run"
    config = "[router]\nlost_s = 1.0\n"
    running = Cluster(run_dir, "--routers", "2", "--decode-ranks", "2", "--prefill-workers", "1", config=config)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture(scope="module")
def expected(pair: Cluster) -> list[Stream]:
    """The fault-free run."""
    asyncio.run(pair.wait_status(lambda status: len(routers(status)) == 2))
    streams = asyncio.run(stream_all(pair.url, varied_bodies(NUM_STREAMS, MAX_TOKENS)))
    for stream in streams:
        assert (stream.error, stream.finish, len(stream.logprobs)) == ("", "length", MAX_TOKENS)
    return streams


def routers(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that serve."""
    return [entry for entry in status["services"] if entry["kind"] == "router" and entry["state"] == "up"]


async def in_flight(endpoint: str) -> dict[str, Any]:
    """``GET /requests`` of one router, at its own address."""
    async with aiohttp.ClientSession() as session, session.get(f"{endpoint}/requests") as response:
        body: dict[str, Any] = await response.json()
        return body


def request_id(stream: Stream) -> str:
    return stream.id.partition("-")[2]


async def test_a_killed_router_takes_only_its_own_streams_along(pair: Cluster, expected: list[Stream]) -> None:
    before = routers(await pair.fetch_status())
    assert len(before) == 2 and len({router["endpoint"] for router in before}) == 2
    of_killed: set[str] = set()

    async def kill_one(streams: list[Stream]) -> None:
        await until_tokens(streams, 10)
        listed = {router["name"]: await in_flight(router["endpoint"]) for router in before}
        assert all(of_one["requests"] for of_one in listed.values()), "each router has streams"
        assert all(of_one["router"].startswith(name) for name, of_one in listed.items())
        of_killed.update(request["id"] for request in listed[before[0]["name"]]["requests"])
        os.kill(before[0]["pid"], signal.SIGKILL)

    # Routers are dealt connections at random: twice as many streams, so that each has some.
    bodies = [record.body for record in expected]
    streams = await stream_all(pair.url, bodies + bodies, kill_one)
    broken = {request_id(stream) for stream in streams if stream.error}
    assert broken and broken <= of_killed
    for stream, fault_free in zip(streams, [*expected, *expected], strict=True):
        if not stream.error:
            assert request_id(stream) not in of_killed
            assert outcome(stream) == outcome(fault_free)
    status = await pair.wait_status(lambda status: len(routers(status)) == 2)
    assert {router["pid"] for router in routers(status)} != {router["pid"] for router in before}
    # The ranks have let go of what the dead router had asked for.
    await pair.wait_status(lambda status: not any(rank["kv_used"] for rank in status["ranks"]))
    again = await stream_all(pair.url, bodies)
    assert [outcome(stream) for stream in again] == [outcome(stream) for stream in expected]


async def test_replacing_all_routers_under_load_is_not_noticed(pair: Cluster, expected: list[Stream]) -> None:
    old = routers(await pair.wait_status(lambda status: len(routers(status)) == 2))
    replaced = asyncio.create_task(asyncio.to_thread(replace, pair, [router["name"] for router in old]))
    records: list[tuple[Stream, Stream]] = []

    async def keep_one_open(session: aiohttp.ClientSession, number: int) -> None:
        """Over kept connections, as clients do, until the new routers have had to answer too."""
        num_after = 0
        while num_after < 2:
            num_after += replaced.done()
            fault_free = expected[number % len(expected)]
            stream = Stream(fault_free.body)
            await run_stream(session, pair.url, stream)
            records.append((stream, fault_free))
            number += 1

    async with new_session(PATIENCE_S) as session, asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(keep_one_open(session, number))
    said = replaced.result()
    assert all("done: router-" in line and "serves in its place" in line for line in said), said
    assert records and not [stream.error for stream, _ in records if stream.error]
    assert all(outcome(stream) == outcome(fault_free) for stream, fault_free in records)
    pids = {router["pid"] for router in old}
    gone = await pair.wait_status(lambda status: not pids & {entry["pid"] for entry in status["services"]})
    assert len(routers(gone)) == 2
    assert len({request_id(stream)[:16] for stream, _ in records}) >= 3, "old and new routers answered"


def replace(cluster: Cluster, names: list[str]) -> list[str]:
    """``regrow restart``, one after the other; what it said."""
    said = []
    for name in names:
        command = [sys.executable, "-m", "services.cli", "restart", name, "--run-dir", str(cluster.run_dir)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{cluster.logs()}"
        said.append(done.stdout)
    return said
