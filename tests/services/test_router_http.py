"""The router over real sockets, judged by the openai client; the rest of the cluster is played by the test."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from tests.services.fake_cluster import FakeCluster, fake_cluster, until
from tests.services.fake_decode import expected_text, logprob, token

PROMPT = [10, 11, 12, 13]
KEY = tuple(PROMPT)


async def _post(cluster: FakeCluster, path: str, data: bytes) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    async with aiohttp.ClientSession() as session, session.post(cluster.url + path, data=data) as response:
        return response.status, await response.json(), response.headers


async def _get(cluster: FakeCluster, path: str) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as session, session.get(cluster.url + path) as response:
        return response.status, await response.json()


async def test_a_completion_has_its_tokens_usage_and_reason() -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        answer = await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=20, logprobs=1)
        choice = answer.choices[0]
        assert choice.text == expected_text(KEY, 20)
        assert choice.finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 20, 24)
        assert choice.logprobs is not None
        # Equal to the last bit: what the client reads is what the rank computed.
        assert choice.logprobs.token_logprobs == [logprob(KEY, index) for index in range(20)]
        assert "".join(choice.logprobs.tokens or []) == choice.text
        assert (choice.logprobs.text_offset or [])[-1] == 19
        released = await cluster.decodes[0].released.get()
        assert answer.id == f"cmpl-{released.request}"


async def test_a_stream_has_the_same_text_then_usage_then_done() -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        stream = await client.completions.create(
            model="tiny-random",
            prompt=PROMPT,
            max_tokens=30,
            logprobs=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        logprobs = [entry for chunk in chunks[:-1] if (entry := chunk.choices[0].logprobs) is not None]
        assert [n for entry in logprobs for n in entry.text_offset or []] == list(range(30))
        assert [p for entry in logprobs for p in entry.token_logprobs or []] == [logprob(KEY, n) for n in range(30)]
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected_text(KEY, 30)
        assert chunks[-2].choices[0].finish_reason == "length"
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 30


async def test_chat_streams_a_role_first_and_stops_at_the_end_of_the_sequence() -> None:
    async with fake_cluster(num_decodes=1) as cluster, cluster.client() as client:
        cluster.decodes[0].stop_after = 7
        stream = await client.chat.completions.create(
            model="tiny-random", messages=[{"role": "user", "content": "hi"}], stream=True, logprobs=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        prompt = cluster.prefills[0].seen[0].prompt
        assert prompt == (0, 2, 75, 76, 3)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected_text(prompt, 7)
        assert chunks[-1].choices[0].finish_reason == "stop"
        logprobs = [entry for chunk in chunks if (entry := chunk.choices[0].logprobs) is not None]
        values = [token.logprob for entry in logprobs for token in entry.content or []]
        assert values == [logprob(prompt, index) for index in range(8)]


async def test_a_stop_string_ends_the_answer_and_frees_the_rank() -> None:
    async with fake_cluster(num_decodes=1) as cluster, cluster.client() as client:
        whole = expected_text(KEY, 200)
        stop = whole[20:23]
        answer = await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=200, stop=[stop])
        assert answer.choices[0].text == whole[: whole.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None and answer.usage.completion_tokens == whole.index(stop) + 3
        assert (await cluster.decodes[0].aborted.get()).request in answer.id


@pytest.mark.parametrize("by_bus", [False, True])
async def test_streams_outlive_their_rank_token_for_token(by_bus: bool) -> None:
    async with fake_cluster(num_decodes=2, num_prefills=2) as cluster, cluster.client() as client:
        prompts = [[10 + n, 20, 30] for n in range(6)]

        async def run(prompt: list[int]) -> str:
            stream = await client.completions.create(
                model="tiny-random", prompt=prompt, max_tokens=150, stream=True, temperature=0.7
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        runs = [asyncio.create_task(run(prompt)) for prompt in prompts]
        await until(
            lambda: all(any(len(row.outputs) > 10 for row in decode.rows.values()) for decode in cluster.decodes)
        )
        cluster.kill(cluster.decodes[0])
        cluster.publish(by_bus)
        cluster.add_decode(0)
        await until(lambda: any(prefill.attempt for worker in cluster.prefills for prefill in worker.seen))
        cluster.publish(by_bus)
        assert await asyncio.gather(*runs) == [expected_text(tuple(prompt), 150) for prompt in prompts]
        moved = [prefill for worker in cluster.prefills for prefill in worker.seen if prefill.attempt > 0]
        assert moved and all(prefill.outputs for prefill in moved if prefill.attempt == 1)
        # The request is replaced whole: seed and parameters are those of its first attempt.
        seeds = {(p.request, p.sampling.seed) for worker in cluster.prefills for p in worker.seen}
        assert len(seeds) == len(prompts)


async def test_a_stop_string_is_found_across_a_redispatch() -> None:
    async with fake_cluster(num_decodes=1) as cluster, cluster.client() as client:
        whole = expected_text(KEY, 60)
        stop = whole[40:50]
        cluster.decodes[0].pause_at = 45
        stream = await client.completions.create(
            model="tiny-random", prompt=PROMPT, max_tokens=60, stream=True, stop=stop
        )
        chunks = [await anext(stream) for _ in range(45)]
        cluster.kill(cluster.decodes[0])
        cluster.add_decode(0)
        cluster.publish()
        chunks += [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:40]
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert [prefill.outputs for prefill in cluster.prefills[0].seen][1] != ()


async def test_a_lost_prefill_worker_is_replaced() -> None:
    async with fake_cluster(num_prefills=2) as cluster, cluster.client() as client:
        for prefill in cluster.prefills:
            prefill.stuck = True
        run = asyncio.create_task(client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=5))
        await until(lambda: any(prefill.seen for prefill in cluster.prefills))
        stuck, other = sorted(cluster.prefills, key=lambda prefill: not prefill.seen)
        other.stuck = False
        cluster.prefills.remove(stuck)
        cluster.publish()
        assert (await run).choices[0].text == expected_text(KEY, 5)


async def test_a_client_that_leaves_is_aborted() -> None:
    async with fake_cluster(num_decodes=1) as cluster, cluster.client() as client:
        stream = await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=900, stream=True)
        await anext(stream)
        await stream.close()
        assert (await cluster.decodes[0].aborted.get()).attempt == 0
        assert cluster.decodes[0].rows == {}


async def test_a_client_that_leaves_before_its_first_token_is_aborted() -> None:
    async with fake_cluster(num_decodes=1) as cluster:
        cluster.decodes[0].paused = True
        body = json.dumps({"prompt": PROMPT, "max_tokens": 5}).encode()
        run = asyncio.create_task(_post(cluster, "/v1/completions", body))
        await until(lambda: len(cluster.decodes[0].rows) == 1)
        run.cancel()
        await cluster.decodes[0].aborted.get()


async def test_a_client_that_leaves_as_its_first_token_comes_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is closed when the headers are to be written, and nobody has been told yet."""

    async def prepare(response: web.StreamResponse, request: web.BaseRequest) -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    async with fake_cluster(num_decodes=1) as cluster:
        monkeypatch.setattr(web.StreamResponse, "prepare", prepare)
        body = json.dumps({"prompt": PROMPT, "max_tokens": 900, "stream": True}).encode()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await _post(cluster, "/v1/completions", body)
        monkeypatch.undo()
        await cluster.decodes[0].aborted.get()
        assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_overload_is_told_so_and_passes() -> None:
    async with fake_cluster(num_decodes=1, max_queued=2) as cluster, cluster.client() as client:
        cluster.decodes[0].paused = True
        body = json.dumps({"prompt": PROMPT, "max_tokens": 5}).encode()
        runs = [asyncio.create_task(_post(cluster, "/v1/completions", body)) for _ in range(2)]
        await until(lambda: len(cluster.decodes[0].rows) == 2)
        status, answer, headers = await _post(cluster, "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (429, 429)
        assert int(headers["Retry-After"]) >= 1 and headers["X-Request-Id"]
        cluster.decodes[0].paused = False
        assert [status for status, _, _ in await asyncio.gather(*runs)] == [200, 200]
        assert (await client.completions.create(model="tiny-random", prompt=PROMPT)).choices[0].text


async def test_requests_wait_for_a_first_view_and_fail_with_503_at_their_deadline() -> None:
    async with fake_cluster(num_decodes=0, request_deadline_s=0.5) as cluster, cluster.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny-random", prompt=PROMPT)
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert (await _get(cluster, "/health"))[0] == 503
        run = asyncio.create_task(client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=5))
        cluster.add_decode(0)
        cluster.publish()
        assert (await run).choices[0].text == expected_text(KEY, 5)
        assert await _get(cluster, "/health") == (200, {"status": "ok"})


async def test_a_stream_that_gets_no_more_tokens_ends_with_an_error_event() -> None:
    async with fake_cluster(num_decodes=1, request_deadline_s=1.0) as cluster, cluster.client() as client:
        stream = await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=900, stream=True)
        await anext(stream)
        cluster.decodes[0].paused = True
        with pytest.raises(openai.APIError, match="no token within"):
            async for _ in stream:
                pass
        await cluster.decodes[0].aborted.get()


async def test_a_router_that_was_stopped_for_longer_than_the_deadline_fails_nobody() -> None:
    """Tokens have come meanwhile; they are heard first."""
    async with fake_cluster(num_decodes=1, request_deadline_s=1.0) as cluster, cluster.client() as client:
        stream = await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=60, stream=True)
        chunks = [await anext(stream)]
        time.sleep(1.5)  # noqa: ASYNC251  # the router is of this loop
        chunks += [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected_text(KEY, 60)


@pytest.mark.parametrize(
    ("data", "status", "param"),
    [
        (b"{", 400, None),
        (b"[1]", 400, None),
        (b"\xff", 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"model": "gpt-4", "prompt": "hi"}', 404, "model"),
        (b'{"prompt": "hi", "temperature": "hot"}', 400, "temperature"),
        (json.dumps({"prompt": "a" * 2000}).encode(), 400, "prompt"),
        (json.dumps({"prompt": "a" * 300_000}).encode(), 413, None),
        (b'{"prompt": ""}', 400, "prompt"),
    ],
)
async def test_bad_requests_name_the_field(data: bytes, status: int, param: str | None) -> None:
    async with fake_cluster(max_body_bytes=200_000) as cluster:
        got, answer, _ = await _post(cluster, "/v1/completions", data)
        assert (got, answer["error"]["code"], answer["error"]["param"]) == (status, status, param)
        assert answer["error"]["message"]


async def test_a_body_without_a_length_is_bounded_too() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    async with (
        fake_cluster(max_body_bytes=100_000) as cluster,
        aiohttp.ClientSession() as session,
        session.post(f"{cluster.url}/v1/completions", data=endless()) as response,
    ):
        assert response.status == 413


async def test_an_unknown_path_and_a_wrong_method_are_json_too() -> None:
    async with fake_cluster() as cluster:
        assert (await _post(cluster, "/v1/nothing", b"{}"))[1]["error"]["code"] == 404
        status, answer, headers = await _post(cluster, "/health", b"{}")
        assert (status, answer["error"]["code"]) == (405, 405)
        assert "GET" in headers["Allow"]


async def test_models_version_and_metrics() -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        assert [(m.id, m.max_model_len) for m in (await client.models.list()).data] == [("tiny-random", 1024)]  # type: ignore[attr-defined]
        assert (await client.models.retrieve("tiny-random")).id == "tiny-random"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-4")
        await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=5)
        async with aiohttp.ClientSession() as session, session.get(f"{cluster.url}/metrics") as response:
            text = await response.text()
        assert 'regrow_requests_total{outcome="finished"} 1.0' in text
        assert "regrow_output_tokens_total 5.0" in text
        status, version = await _get(cluster, "/version")
        assert status == 200 and version["version"]
        assert f"regrow_epoch {float(cluster.epoch)}" in text


async def test_cluster_status_is_the_monitors_or_its_last_one() -> None:
    async with fake_cluster() as cluster:
        assert (await _get(cluster, "/cluster"))[0] == 503
        cluster.status = {"epoch": 7, "ranks": []}
        assert await _get(cluster, "/cluster") == (200, {"epoch": 7, "ranks": []})
        cluster.status = None
        assert await _get(cluster, "/cluster") == (200, {"epoch": 7, "ranks": [], "stale": True})


async def test_a_stopped_router_finishes_its_streams() -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        stream = await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=100, stream=True)
        first = await anext(stream)
        cluster.stop.set()
        rest = [chunk async for chunk in stream]
        assert first.choices[0].text + "".join(c.choices[0].text for c in rest) == expected_text(KEY, 100)
        await cluster.router
        with pytest.raises(openai.APIConnectionError):
            await client.completions.create(model="tiny-random", prompt=PROMPT)


async def test_a_stopped_router_gives_up_streams_after_its_patience() -> None:
    async with fake_cluster(num_decodes=1, drain_s=0.2) as cluster, cluster.client() as client:
        stream = await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=900, stream=True)
        await anext(stream)
        cluster.decodes[0].paused = True
        cluster.stop.set()
        with pytest.raises(openai.APIError, match="shut down"):
            async for _ in stream:
                pass


def test_the_fake_model_tells_prompts_and_positions_apart() -> None:
    assert len({tuple(token((prompt,), index) for index in range(8)) for prompt in range(50)}) == 50
