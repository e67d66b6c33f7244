"""Growing and shrinking under load: nobody's stream notices, whatever rank or worker it was on."""

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from services.cli.chat_client import Stream
from tests.cluster.harness import ROOT, Cluster, stream_all, varied_bodies
from tests.cluster.steady_load import under_load

NUM_STREAMS, MAX_TOKENS = 9, 900


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[Stream]:
    """The fault-free run."""
    streams = asyncio.run(stream_all(cluster.url, varied_bodies(NUM_STREAMS, MAX_TOKENS)))
    for stream in streams:
        assert (stream.error, stream.finish, len(stream.logprobs)) == ("", "length", MAX_TOKENS)
    return streams


def regrow(cluster: Cluster, *words: str) -> str:
    """Runs a command of the cluster; it exits 0 only with proof."""
    command = [sys.executable, "-m", "services.cli", *words, "--run-dir", str(cluster.run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{cluster.logs()}"
    return done.stdout


def serving(status: dict[str, Any]) -> list[int]:
    return [entry["rank"] for entry in status["ranks"] if entry["state"] == "serving"]


def decode_pids(status: dict[str, Any]) -> set[int]:
    """Of ranks, and of standbys."""
    return {entry["pid"] for entry in (*status["ranks"], *status["services"]) if entry["name"].startswith("decode")}


async def commanded(cluster: Cluster, expected: list[Stream], *words: str) -> str:
    """Gives a command under load, which goes on until it has returned; what it said."""
    said, load = await under_load(cluster, expected, lambda: asyncio.to_thread(regrow, cluster, *words))
    print(f"{' '.join(words)}: largest gap {load.largest_gap_s:.3f} s in {len(load.streams)} streams")
    return said


async def test_four_to_six_to_three_to_four(cluster: Cluster, expected: list[Stream]) -> None:
    for ranks, workers in ((6, 3), (3, 1), (4, 2)):
        words = ("scale", str(ranks), "--prefill", str(workers))
        said = await commanded(cluster, expected, *words)
        assert f"scale decode {ranks}, prefill {workers}: done: view" in said
        status = await cluster.fetch_status()
        assert (status["desired_ranks"], status["desired_prefill"]) == (ranks, workers)
        assert serving(status) == list(range(ranks))
        assert [worker["state"] for worker in status["prefill"]] == ["up"] * workers
        assert len(decode_pids(status)) == ranks, "surplus processes were not ended"
        assert f"done: view {status['epoch']} " in regrow(cluster, *words), "asking twice changes nothing"


async def test_a_drained_rank_stays_alive_without_work_until_undrained(
    cluster: Cluster, expected: list[Stream]
) -> None:
    before = await cluster.fetch_status()
    pid = next(entry["pid"] for entry in before["ranks"] if entry["rank"] == 1)
    assert "done: drained, view" in await commanded(cluster, expected, "drain", "--rank", "1")
    drained = await cluster.fetch_status()
    entry = next(entry for entry in drained["ranks"] if entry["rank"] == 1)
    assert (entry["state"], entry["pid"], entry["running"]) == ("masked", pid, 0)
    assert serving(drained) == [0, 2, 3], f"{drained['ranks']}\n{cluster.logs()}"
    assert "done: rank 1 serves" in await commanded(cluster, expected, "undrain", "--rank", "1")


@pytest.mark.parametrize("victim", ["monitor", "agent-0"])
async def test_a_part_that_dies_in_the_middle_of_a_scaling(
    cluster: Cluster, expected: list[Stream], victim: str
) -> None:
    """It ends in the new size, which the survivor knows, and the next size is reached as if nothing had been."""
    before = await cluster.fetch_status()
    pid = next(entry["pid"] for entry in before["services"] if entry["name"] == victim)
    wanted = 5 if len(serving(before)) == 4 else 4

    async def interrupt() -> None:
        asked = asyncio.create_task(asyncio.to_thread(regrow, cluster, "scale", str(wanted)))
        await cluster.wait_status(lambda status: status["desired_ranks"] == wanted)
        os.kill(pid, signal.SIGKILL)
        await asked

    await under_load(cluster, expected, interrupt)
    status = await cluster.fetch_status()
    assert status["desired_ranks"] == wanted and serving(status) == list(range(wanted))
