"""The router's other answers over HTTP: lists, texts and tokens both ways, health, names of requests, mistakes."""

from typing import Any

import aiohttp

from tests.services.api_calls import CHAT, PROMPT, get, post
from tests.services.fake_cluster import fake_cluster, until
from tests.services.fake_decode import TOKENIZER


async def test_requests_in_flight_are_listed_with_their_places() -> None:
    async with fake_cluster(num_decodes=1) as cluster, cluster.client() as client:
        cluster.decodes[0].pause_at = 5
        stream = await client.completions.create(model="tiny-random", prompt=PROMPT, max_tokens=9, stream=True)
        first = [await anext(stream) for _ in range(5)]
        (entry,) = (await get(f"{cluster.url}/requests"))["requests"]
        assert f"cmpl-{entry.pop('id')}" == first[0].id
        assert entry == {
            "state": "decoding",
            "attempt": 0,
            "rank": 0,
            "num_prompt_tokens": 4,
            "num_output_tokens": 5,
        }
        await stream.close()


async def test_text_and_tokens_go_both_ways() -> None:
    async with fake_cluster(num_decodes=0) as cluster:
        url = cluster.url
        ids = TOKENIZER.encode("a bé")
        _, tokens, _ = await post(f"{url}/tokenize", {"prompt": "a bé", "return_token_strs": True})
        spelled = [TOKENIZER.token(id) for id in ids]
        assert tokens == {"count": len(ids), "max_model_len": 1024, "tokens": ids, "token_strs": spelled}
        assert "".join(spelled) == "a\u0120b\u00c3\u00a9"
        assert (await post(f"{url}/detokenize", {"tokens": ids}))[1] == {"prompt": "a bé"}
        chat = {"model": "tiny-random", "messages": CHAT}
        assert (await post(f"{url}/tokenize", chat))[1]["tokens"] == [0, 2, 75, 76, 3]
        closed = {**chat, "add_generation_prompt": False}
        assert (await post(f"{url}/tokenize", closed))[1]["tokens"] == [0, 2, 75, 76]
        assert (await post(f"{url}/detokenize", {"tokens": [0, 2, 75]}))[1] == {"prompt": "<|bos|><|user|>h"}


MISTAKES: list[tuple[str, dict[str, Any], int, str]] = [
    ("tokenize", {}, 400, "prompt"),
    ("tokenize", {"prompt": [1]}, 400, "prompt"),
    ("tokenize", {"prompt": "x", "model": "gpt-9"}, 404, "model"),
    ("tokenize", {"prompt": "x", "add_special_tokens": 1}, 400, "add_special_tokens"),
    ("tokenize", {"messages": []}, 400, "messages"),
    ("tokenize", {"messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
    ("detokenize", {}, 400, "tokens"),
    ("detokenize", {"tokens": "x"}, 400, "tokens"),
    ("detokenize", {"tokens": [260]}, 400, "tokens"),
    ("detokenize", {"tokens": [1], "model": "gpt-9"}, 404, "model"),
    ("v1/completions", {"prompt": "x", "logit_bias": {"260": 1}}, 400, "logit_bias"),
    ("v1/completions", {"prompt": "x", "min_tokens": 17}, 400, "min_tokens"),
    ("v1/chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs"),
]


async def test_mistakes_name_their_field() -> None:
    async with fake_cluster(num_decodes=0) as cluster:
        for path, body, status, param in MISTAKES:
            got, answer, headers = await post(f"{cluster.url}/{path}", body)
            assert (got, answer["error"]["param"]) == (status, param), body
            assert param in answer["error"]["message"] and headers["X-Request-Id"]


async def test_ping_is_health() -> None:
    async with fake_cluster(num_decodes=0) as cluster, aiohttp.ClientSession() as session:
        for expected in (503, 200):
            async with session.get(f"{cluster.url}/ping") as response:
                assert response.status == expected
            async with session.post(f"{cluster.url}/ping") as response:
                assert response.status == expected
            cluster.add_decode(0)
            cluster.publish()
            await until(lambda: cluster.beat is not None and cluster.beat.epoch == cluster.epoch)


async def test_every_answer_names_its_request() -> None:
    async with fake_cluster() as cluster:
        url, body = f"{cluster.url}/v1/completions", {"prompt": PROMPT, "max_tokens": 2}
        named = {"X-Request-Id": "mine-1"}
        _, answer, headers = await post(url, body, named)
        assert headers["X-Request-Id"] == "mine-1"
        _, answer, headers = await post(url, body)
        assert headers["X-Request-Id"] == answer["id"]
        async with aiohttp.ClientSession() as session:
            async with session.post(url, json={**body, "stream": True}, headers=named) as response:
                assert response.headers["X-Request-Id"] == "mine-1"
            async with session.get(f"{cluster.url}/v1/models", headers=named) as response:
                assert response.headers["X-Request-Id"] == "mine-1"
        _, _, headers = await post(url, {"prompt": 3}, named)
        assert headers["X-Request-Id"] == "mine-1"
        ids = {(await post(url, {"prompt": 3}, {"X-Request-Id": long}))[2]["X-Request-Id"] for long in ("x" * 200, "")}
        assert len(ids) == 2 and all(0 < len(id) <= 128 for id in ids)
