"""The containers for real: started, asked, broken by a fault event on the published bus, healed, and taken down.

Builds the image, so the first run takes minutes. Runs with ``make test-compose``.
"""

import os
from collections.abc import Iterator

import msgpack
import pytest
import zmq

from tests.compose.containers import Containers, compose_command

pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]

BODY = {"model": "abacus", "prompt": "count from 17 to 60", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Containers]:
    command = compose_command()
    if command is None:
        pytest.skip("needs a Docker engine with compose")
    containers = Containers.named(command, f"regrow-test-{os.getpid()}")
    containers.compose("build", "monitor", timeout_s=1200)
    try:
        containers.compose("up", "-d", timeout_s=300)
        containers.wait_for("four ranks serve", lambda: list(containers.rank_states().values()) == ["serving"] * 4)
        yield containers
    finally:
        containers.compose("down", "-v", timeout_s=180)
    assert containers.remains() == ""


def publish_until(containers: Containers, event: dict[str, object], rank: int, state: str) -> None:
    """A fresh publisher loses its first messages, and repeats of one id are harmless: publish until it shows."""
    with zmq.Context() as context, context.socket(zmq.PUB) as bus:
        bus.linger = 0
        bus.connect(f"tcp://127.0.0.1:{containers.publish_port}")

        def shows() -> bool:
            bus.send_multipart([b"fault", msgpack.packb(event)])
            return containers.rank_states().get(rank) == state

        containers.wait_for(f"rank {rank} is {state}", shows)


def test_a_masked_rank_leaves_and_comes_back_under_a_stream(cluster: Containers) -> None:
    whole = cluster.post("/v1/completions", BODY)
    assert whole["usage"]["completion_tokens"] == BODY["max_tokens"]

    masked: list[int] = []

    def mask_the_rank_that_streams(chunk: int) -> None:
        if chunk == 5:
            masked.extend(rank["rank"] for rank in cluster.get("/cluster")["ranks"] if rank["running"])
            event = {"type": "fault", "id": "mask-1", "action": "mask", "rank": masked[0]}
            publish_until(cluster, event, masked[0], "masked")

    assert cluster.stream("/v1/completions", BODY, mask_the_rank_that_streams) == whole["choices"][0]["text"]
    assert len(masked) == 1
    publish_until(
        cluster, {"type": "fault", "id": "unmask-1", "action": "unmask", "rank": masked[0]}, masked[0], "serving"
    )
    assert cluster.post("/v1/completions", BODY)["choices"] == whole["choices"]


def test_a_killed_rank_is_started_again_by_its_container(cluster: Containers) -> None:
    whole = cluster.post("/v1/completions", BODY)

    def incarnation() -> int:
        return next(int(rank["incarnation"]) for rank in cluster.get("/cluster")["ranks"] if rank["rank"] == 2)

    before = incarnation()
    with zmq.Context() as context, context.socket(zmq.PUB) as bus:
        bus.linger = 0
        bus.connect(f"tcp://127.0.0.1:{cluster.publish_port}")

        def is_new() -> bool:
            bus.send_multipart(
                [b"fault", msgpack.packb({"type": "fault", "id": "kill-2", "action": "kill", "rank": 2})]
            )
            return cluster.rank_states().get(2) == "serving" and incarnation() != before

        cluster.wait_for("rank 2 serves in a new incarnation", is_new)
    assert cluster.post("/v1/completions", BODY)["choices"] == whole["choices"]
