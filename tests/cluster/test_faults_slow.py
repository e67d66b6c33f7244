"""A slow rank is removed after the configured time, and comes back as a process that is not slow."""

import asyncio
from collections.abc import Iterator

import pytest

from services.cli.chat_client import Stream
from tests.cluster.fault_runs import entry_of, events, last_seq, under_fault, whole, without
from tests.cluster.harness import Cluster

pytestmark = [pytest.mark.faults, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    run_dir = tmp_path_factory.mktemp("slow") / "run"
    config = "[monitor]\nslow_factor = 1.5\nslow_for_s = 3.0\n"
    running = Cluster(run_dir, "--decode-ranks", "4", "--prefill-workers", "2", config=config)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.mark.parametrize("factor", [2, 10])
async def test_a_slow_rank_is_removed(cluster: Cluster, expected: list[Stream], factor: int) -> None:
    before = await whole(cluster)
    victim = entry_of(before, 1)

    async def fault() -> str:
        proof = await asyncio.to_thread(cluster.inject, "slow", rank=1, factor=factor)
        removed = await without(cluster, 1, victim["incarnation"])
        return f"{proof}; {events(removed, 'removed')[-1]['evidence']}"

    proof = await under_fault(cluster, expected, f"a rank {factor} times as slow, to be removed", fault)
    assert "slow: " in proof and "ms is usual" in proof
    after = await whole(cluster)
    assert {event["process"] for event in events(after, "removed", last_seq(before))} == {victim["process"]}
    assert all(entry["slow_percent"] == 100 for entry in after["ranks"])
