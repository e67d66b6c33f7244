"""The embedded model behind the real services, judged by the openai client: answers that can be checked by eye."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import pytest

from common.config import EMBEDDED_MODEL
from tests.cluster.harness import ROOT, Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(
        tmp_path_factory.mktemp("abacus") / "run",
        *("--decode-ranks", "3"),
        model=EMBEDDED_MODEL,
        config="[router]\nmax_queued = 20\n",
    )
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def _client(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60)


def _count(first: int, last: int) -> str:
    return " ".join(str(number) for number in range(first, last + 1))


async def _ask(client: openai.AsyncOpenAI, question: str) -> str:
    answer = await client.chat.completions.create(
        model="abacus", messages=[{"role": "user", "content": question}], temperature=0
    )
    return answer.choices[0].message.content or ""


async def test_answers_are_right(cluster: Cluster) -> None:
    async with _client(cluster) as client:
        assert [model.id async for model in client.models.list()] == ["abacus"]
        assert await _ask(client, "what is 348 + 277?") == "625"
        assert await _ask(client, "count from 17 to 60") == _count(17, 60)


async def test_a_streamed_answer_survives_the_death_of_its_rank(cluster: Cluster) -> None:
    async with _client(cluster) as client:
        stream = await client.chat.completions.create(
            model="abacus",
            messages=[{"role": "user", "content": "count from 101 to 190"}],
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, killed, usage = "", 0, None
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            if not killed and len(text) > 60:
                # From the router: heartbeats tell of it later, perhaps when the answer is over.
                (request,) = await cluster.fetch_requests()
                ranks = (await cluster.fetch_status())["ranks"]
                (killed,) = [entry["pid"] for entry in ranks if entry["rank"] == request["rank"]]
                os.kill(killed, signal.SIGKILL)
        assert killed and text == _count(101, 190)
        assert usage is not None and usage.completion_tokens == len(text) + 1
    await cluster.wait_status(lambda status: all(entry["state"] == "serving" for entry in status["ranks"]))


async def test_a_client_that_leaves_frees_its_rank(cluster: Cluster) -> None:
    body = {"model": "abacus", "prompt": [5] * 10, "max_tokens": 900, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session:
        response = await session.post(f"{cluster.url}/v1/completions", json=body)
        await response.content.readline()
        await cluster.wait_status(lambda status: sum(entry["running"] for entry in status["ranks"]) == 1)
        response.close()
        freed = await cluster.wait_status(
            lambda status: sum(entry["kv_used"] + entry["running"] for entry in status["ranks"]) == 0, within_s=20
        )
    assert freed["ranks"]


async def test_beyond_the_bound_requests_are_refused_with_a_time_to_retry(cluster: Cluster) -> None:
    body = {"model": "abacus", "prompt": [5] * 10, "max_tokens": 100, "ignore_eos": True}

    async def post(session: aiohttp.ClientSession) -> tuple[int, str | None]:
        async with session.post(f"{cluster.url}/v1/completions", json=body) as response:
            await response.read()
            return response.status, response.headers.get("Retry-After")

    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(*(post(session) for _ in range(32)))
    served = [answer for answer in answers if answer[0] == 200]
    refused = [answer for answer in answers if answer[0] == 429]
    assert len(served) >= 20 and len(refused) > 0 and len(served) + len(refused) == 32
    assert all(retry_after and int(retry_after) > 0 for _, retry_after in refused)


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"model": "gpt-9", "prompt": "x"}, 404, "gpt-9"),
        ({"model": "abacus", "prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ({"model": "abacus", "prompt": "x", "top_p": 1.5}, 400, "top_p"),
        ({"model": "abacus", "prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"model": "abacus", "prompt": "x" * 1200}, 400, "1024"),
        ({"model": "abacus"}, 400, "prompt"),
    ],
)
async def test_a_mistake_is_named(cluster: Cluster, body: dict[str, Any], status: int, named: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{cluster.url}/v1/completions", json=body) as response:
        answer = await response.json()
        assert response.status == status and named in answer["error"]["message"]
        assert answer["error"]["code"] == status


async def test_malformed_and_oversized_bodies(cluster: Cluster) -> None:
    path = f"{cluster.url}/v1/completions"
    async with aiohttp.ClientSession() as session, session.post(path, data=b"{not json") as response:
        assert response.status == 400 and "JSON" in (await response.json())["error"]["message"]
    # By hand: the answer comes before all is sent, and a connection with unsent bytes outlives a session's end.
    address = urlsplit(cluster.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: regrow\r\nContent-Length: %d\r\n\r\n" % (5 << 20))
        writer.write(b"x" * (5 << 20))
        assert b" 413 " in await asyncio.wait_for(reader.readline(), 60)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_the_ten_line_example_masks_and_unmasks_a_rank(cluster: Cluster) -> None:
    bus = (await cluster.fetch_status())["bus"]
    for action, state in (("mask", "masked"), ("unmask", "serving")):
        command = [sys.executable, "examples/fault_event.py", bus["publish"], bus["subscribe"], action, "1"]
        done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        (rank,) = [entry for entry in (await cluster.fetch_status())["ranks"] if entry["rank"] == 1]
        assert rank["state"] == state


async def test_eval_measures_a_running_server_and_answers_the_same_while_ranks_are_killed(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "services.cli", "eval", "--run-dir", str(cluster.run_dir), "--count", "24"]
    command += ["--kinds", "counting,copying", "--concurrency", "4", "--kill-every", "0.2"]
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "48 of 48 answers equal those without kills" in done.stdout
