"""Real processes: every prefill worker is killed and stays away for a while; decode ranks compute the prompts."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from services.cli.chat_client import Stream
from tests.cluster.harness import Cluster, outcome, stream_all, varied_bodies

NUM_STREAMS, MAX_TOKENS = 6, 40
_CONFIG = """
[agent]
restart_backoff_s = 5.0
restart_backoff_max_s = 5.0
[router]
prefill_wait_s = 0.3
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    run_dir = tmp_path_factory.mktemp("cluster") / "run"
    running = Cluster(run_dir, "--decode-ranks", "2", "--prefill-workers", "2", config=_CONFIG)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def _computed(status: dict[str, Any], where: str) -> int:
    return sum(entry["prompt_tokens_computed"] for entry in status[where])


async def test_streams_complete_and_are_equal_without_any_prefill_worker(cluster: Cluster) -> None:
    bodies = varied_bodies(NUM_STREAMS, MAX_TOKENS)
    bodies[3]["prompt"] = [(11 * position) % 200 + 5 for position in range(300)]
    expected = await stream_all(cluster.url, bodies)
    assert [(stream.error, len(stream.logprobs)) for stream in expected] == [("", MAX_TOKENS)] * NUM_STREAMS
    before = await cluster.wait_status(lambda status: len(status["prefill"]) == 2 and _computed(status, "prefill") > 0)
    assert _computed(before, "ranks") == 0, "as long as there are prefill workers"

    async def kill_all(streams: list[Stream]) -> None:
        for worker in before["prefill"]:
            os.kill(worker["pid"], signal.SIGKILL)
        await cluster.wait_status(lambda status: not status["prefill"])

    streams = await stream_all(cluster.url, bodies, kill_all)
    status = await cluster.fetch_status()
    assert not status["prefill"], "a worker is back too soon: the fault would prove nothing"
    computed = _computed(status, "ranks")
    assert computed >= sum(len(body["prompt"]) for body in bodies)
    assert [stream.error for stream in streams] == [""] * NUM_STREAMS
    assert [outcome(stream) for stream in streams] == [outcome(stream) for stream in expected]

    await cluster.wait_status(lambda status: len(status["prefill"]) == 2 and _all_up(status))
    back = await stream_all(cluster.url, bodies[:2])
    assert [outcome(stream) for stream in back] == [outcome(stream) for stream in expected[:2]]
    status = await cluster.wait_status(lambda status: _computed(status, "prefill") > 0)
    assert _computed(status, "ranks") == computed, "prefill workers do it again"


def _all_up(status: dict[str, Any]) -> bool:
    return all(worker["state"] == "up" for worker in status["prefill"])
