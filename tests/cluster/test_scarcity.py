"""Real processes with too little of something: no prefill worker for a while, KV blocks for a few requests only."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import aiohttp
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
[decode]
num_kv_blocks = 24
kv_reserve_tokens = 16
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

    async def see_them_gone(streams: list[Stream]) -> None:
        await cluster.wait_status(lambda status: not status["prefill"])

    for worker in before["prefill"]:
        os.kill(worker["pid"], signal.SIGKILL)  # before the first of them can compute a short prompt
    streams = await stream_all(cluster.url, bodies, see_them_gone)
    num_prompt_tokens = sum(len(body["prompt"]) for body in bodies)
    status = await cluster.wait_status(lambda status: _computed(status, "ranks") >= num_prompt_tokens)
    assert not status["prefill"], "a worker is back too soon: the fault would prove nothing"
    assert [stream.error for stream in streams] == [""] * NUM_STREAMS
    assert [outcome(stream) for stream in streams] == [outcome(stream) for stream in expected]

    status = await cluster.wait_status(lambda status: len(status["prefill"]) == 2 and _all_up(status))
    computed = _computed(status, "ranks")
    back = await stream_all(cluster.url, bodies[:2])
    assert [outcome(stream) for stream in back] == [outcome(stream) for stream in expected[:2]]
    status = await cluster.wait_status(lambda status: _computed(status, "prefill") > 0)
    assert _computed(status, "ranks") == computed, "prefill workers do it again"


def _all_up(status: dict[str, Any]) -> bool:
    return all(worker["state"] == "up" for worker in status["prefill"])


def _crowd() -> list[dict[str, Any]]:
    """Each could have 12 of the 24 blocks of a rank, and there are six for each; every option decides tokens."""
    options: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logprobs": 3},
        {"frequency_penalty": -1.0, "min_tokens": 100, "top_p": 0.95, "logprobs": 0},
        {"logit_bias": {"50": 4.0, "51": 4.0}, "stop": ["\x00\x01\x02"], "logprobs": 2},
    ]
    prompt = [(7 * position) % 200 + 5 for position in range(60)]
    common = {"model": "tiny-random", "max_tokens": 130, "ignore_eos": True, "temperature": 0.9}
    return [{**common, **options[n % 3], "seed": n, "prompt": prompt[n : 40 + n]} for n in range(12)]


async def test_requests_that_make_room_for_others_go_on_exactly(cluster: Cluster) -> None:
    bodies = _crowd()
    alone = [stream for n in range(0, 12, 4) for stream in await stream_all(cluster.url, bodies[n : n + 4])]
    before = await cluster.fetch_status()
    together = await stream_all(cluster.url, bodies)
    after = await cluster.fetch_status()
    num_preempted = [sum(rank["preempted"] for rank in status["ranks"]) for status in (before, after)]
    assert num_preempted[1] - num_preempted[0] >= 2, "nobody had to make room: the test proves nothing"
    assert [stream.error for stream in alone + together] == [""] * 24
    assert [outcome(stream) for stream in together] == [outcome(stream) for stream in alone]
    assert _blocks_used(await cluster.wait_status(lambda status: _blocks_used(status) == 0)) == 0


async def test_a_request_that_fits_no_rank_is_told_so_at_once(cluster: Cluster) -> None:
    body = {"model": "tiny-random", "prompt": [5] * 300, "max_tokens": 85}
    async with aiohttp.ClientSession() as session, session.post(f"{cluster.url}/v1/completions", json=body) as answer:
        assert answer.status == 400
        assert "maximum context length is 384 tokens" in (await answer.json())["error"]["message"]


def _blocks_used(status: dict[str, Any]) -> int:
    return sum(entry["kv_blocks_used"] for entry in status["ranks"])
