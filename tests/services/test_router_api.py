"""The depth of the API, judged by the openai client; the cluster around the router is played by the test."""

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest

from common.messages import Sampling
from tests.services.api_calls import PROMPT, get, post
from tests.services.fake_cluster import FakeCluster, fake_cluster, until
from tests.services.fake_decode import TOKENIZER, alternatives, expected_text, logprob, prompt_logprobs, token

KEY = tuple(PROMPT)
OTHER = [20, 21]


def _samplings(cluster: FakeCluster) -> list[Sampling]:
    return [prefill.sampling for worker in cluster.prefills for prefill in worker.seen]


def _texts(ids: list[int]) -> list[str]:
    return [TOKENIZER.decode([id]) for id in ids]


async def test_choices_of_a_batch_are_numbered_through_and_seeded_by_prompt() -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        answer = await client.completions.create(
            model="tiny-random", prompt=[PROMPT, OTHER], n=3, max_tokens=9, seed=2**64 - 2, logprobs=1
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        texts = [expected_text(tuple(prompt), 9) for prompt in (PROMPT, OTHER) for _ in range(3)]
        assert [choice.text for choice in answer.choices] == texts
        assert all(choice.logprobs and len(choice.logprobs.token_logprobs or []) == 9 for choice in answer.choices)
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 54), "a prompt counts once"
        seen = sorted((len(p.prompt), p.sampling.seed) for worker in cluster.prefills for p in worker.seen)
        assert seen == sorted((size, seed) for size in (2, 4) for seed in (2**64 - 2, 2**64 - 1, 0))


async def test_choices_without_a_seed_differ() -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        await client.completions.create(model="tiny-random", prompt=[PROMPT, PROMPT], n=2, max_tokens=1)
        seeds = [sampling.seed for sampling in _samplings(cluster)]
        assert len(set(seeds)) == 4


@pytest.mark.parametrize(("continuous", "num_together"), [(False, 1), (True, 1), (False, 3), (True, 3)])
async def test_streamed_choices_come_apart_again(continuous: bool, num_together: int) -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        for decode in cluster.decodes:
            decode.num_together = num_together
        stream = await client.completions.create(
            model="tiny-random",
            prompt=[PROMPT, OTHER],
            n=2,
            max_tokens=20,
            stream=True,
            extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": continuous}},
        )
        texts, finishes, counts = [""] * 4, [""] * 4, [0] * 4
        *chunks, last = [chunk async for chunk in stream]
        for chunk in chunks:
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            counts[choice.index] += len(choice.text)  # a character of this checkpoint is a token
            finishes[choice.index] += choice.finish_reason or ""
            assert (chunk.usage is not None) == continuous
            if chunk.usage is not None:
                assert chunk.usage.prompt_tokens == (4 if choice.index < 2 else 2)
                assert chunk.usage.completion_tokens == counts[choice.index]
        assert texts == [expected_text(tuple(prompt), 20) for prompt in (PROMPT, PROMPT, OTHER, OTHER)]
        assert finishes == ["length"] * 4
        assert last.choices == [] and last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 80)


async def test_a_chat_has_choices_with_a_role_each_and_alternatives() -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        stream = await client.chat.completions.create(
            model="tiny-random",
            messages=[{"role": "user", "content": "hi"}],
            n=2,
            max_tokens=5,
            logprobs=True,
            top_logprobs=3,
            stream=True,
        )
        chunks = [chunk async for chunk in stream]
        assert [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks[:2]] == [
            (0, "assistant"),
            (1, "assistant"),
        ]
        key = cluster.prefills[0].seen[0].prompt
        for index in range(2):
            mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
            assert "".join(choice.delta.content or "" for choice in mine) == expected_text(key, 5)
            content = [entry for choice in mine if choice.logprobs for entry in choice.logprobs.content or []]
            assert [entry.logprob for entry in content] == [logprob(key, n) for n in range(5)]
            got = [[(top.token, top.logprob) for top in entry.top_logprobs] for entry in content]
            assert got == [[(TOKENIZER.decode([id]), value) for id, value in alternatives(key, n, 3)] for n in range(5)]
            assert all(bytes(entry.bytes or []).decode() == entry.token for entry in content)
        whole = await client.chat.completions.create(
            model="tiny-random", messages=[{"role": "user", "content": "hi"}], n=2, max_tokens=5
        )
        assert [choice.message.content for choice in whole.choices] == [expected_text(key, 5)] * 2


@pytest.mark.parametrize("num_top", [0, 2])
async def test_tokens_that_came_together_are_shown_one_by_one(num_top: int) -> None:
    async with fake_cluster() as cluster:
        for decode in cluster.decodes:
            decode.num_together = 4
        body = {"prompt": PROMPT, "max_tokens": 30, "logprobs": num_top, "stop": expected_text(KEY, 30)[20:24], "n": 2}
        for choice in await _completion_choices(cluster, body, stream=True):
            assert choice["text"] == expected_text(KEY, 20)
            assert choice["tokens"] == _texts([token(KEY, n) for n in range(24)]), "those of the stop string count"
            assert choice["token_logprobs"] == [logprob(KEY, n) for n in range(24)]
            assert choice["text_offset"] == list(range(24))
            assert [len(top) for top in choice["top_logprobs"]] == [max(num_top, 1)] * 24
            assert choice["num_chunks"] < 12


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_with_logprobs_covers_the_prompt(stream: bool) -> None:
    async with fake_cluster() as cluster:
        body = {"prompt": [PROMPT, OTHER], "max_tokens": 3, "echo": True, "logprobs": 2}
        choices = await _completion_choices(cluster, body, stream)
        for choice, prompt in zip(choices, (PROMPT, OTHER), strict=True):
            key = tuple(prompt)
            ids = [*prompt, *(token(key, n) for n in range(3))]
            values = [*(value for value, _ in prompt_logprobs(key, 2)), *(logprob(key, n) for n in range(3))]
            tops = [*(top for _, top in prompt_logprobs(key, 2)), *(alternatives(key, n, 2) for n in range(3))]
            assert choice["text"] == "".join(_texts(ids))
            assert choice["tokens"] == _texts(ids)
            assert choice["token_logprobs"] == [None, *values]
            assert choice["text_offset"] == list(range(len(ids)))
            assert choice["top_logprobs"][0] is None
            shown = [{TOKENIZER.decode([id]): value for id, value in top} for top in tops]
            chosen = [{TOKENIZER.decode([id]): value} for id, value in zip(ids[1:], values, strict=True)]
            assert choice["top_logprobs"][1:] == [{**top, **own} for top, own in zip(shown, chosen, strict=True)]


async def _completion_choices(cluster: FakeCluster, body: dict[str, Any], stream: bool) -> list[dict[str, Any]]:
    """Text and joined logprobs of each choice."""
    async with aiohttp.ClientSession() as session:
        url = f"{cluster.url}/v1/completions"
        async with session.post(url, json={**body, "stream": stream}) as response:
            assert response.status == 200
            if not stream:
                bodies = [await response.json()]
            else:
                lines = [line[6:] async for line in response.content if line.startswith(b"data: {")]
                bodies = [json.loads(line) for line in lines]
    parts = [choice for one in bodies for choice in one["choices"]]
    choices: list[dict[str, Any]] = []
    for index in sorted({part["index"] for part in parts}):
        mine = [part for part in parts if part["index"] == index]
        names = ("tokens", "token_logprobs", "text_offset", "top_logprobs")
        joined = {name: [item for part in mine for item in part["logprobs"][name]] for name in names}
        choices.append({"text": "".join(part["text"] for part in mine), "num_chunks": len(mine), **joined})
    return choices


async def test_an_echo_alone_needs_no_completion() -> None:
    async with fake_cluster() as cluster, cluster.client() as client:
        answer = await client.completions.create(model="tiny-random", prompt="ab", max_tokens=0, echo=True, logprobs=1)
        choice = answer.choices[0]
        assert (choice.text, choice.finish_reason) == ("ab", "length")
        assert choice.logprobs is not None and choice.logprobs.tokens == ["a", "b"]
        assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 0)


async def test_every_parameter_reaches_those_who_choose_tokens() -> None:
    async with fake_cluster(num_decodes=1) as cluster, cluster.client() as client:
        await client.completions.create(
            model="tiny-random",
            prompt=PROMPT,
            max_tokens=6,
            temperature=0.5,
            top_p=0.9,
            seed=5,
            presence_penalty=0.25,
            frequency_penalty=-0.5,
            logit_bias={"40": -100, "7": 2},
            logprobs=3,
            echo=True,
            extra_body={
                "top_k": 9,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "stop_token_ids": [99],
                "min_tokens": 2,
                "ignore_eos": True,
            },
        )
        assert _samplings(cluster) == [
            Sampling(
                temperature=0.5,
                top_p=0.9,
                top_k=9,
                seed=5,
                max_tokens=6,
                ignore_eos=True,
                logprobs=True,
                stop_token_ids=(1,),
                extra_stop_token_ids=(99,),
                min_tokens=2,
                min_p=0.125,
                presence_penalty=0.25,
                frequency_penalty=-0.5,
                repetition_penalty=1.5,
                logit_bias=((7, 2.0), (40, -100.0)),
                num_top_logprobs=3,
                prompt_logprobs=True,
            )
        ]


async def test_what_ended_a_choice_is_told() -> None:
    async with fake_cluster(num_decodes=1) as cluster:
        url = f"{cluster.url}/v1/completions"
        own, whole = token(KEY, 7), expected_text(KEY, 20)
        first = next(index for index in range(8) if token(KEY, index) == own)

        async def end(**fields: object) -> tuple[str, str, object]:
            _, answer, _ = await post(url, {"prompt": PROMPT, "max_tokens": 20, **fields})
            (choice,) = answer["choices"]
            return choice["text"], choice["finish_reason"], choice["stop_reason"]

        assert await end() == (whole, "length", None)
        assert await end(stop_token_ids=[own]) == (whole[:first], "stop", own)
        assert await end(stop_token_ids=[own], ignore_eos=True) == (whole[:first], "stop", own)
        assert await end(stop=whole[4:6]) == (whole[: whole.index(whole[4:6])], "stop", whole[4:6])
        assert await end(stop=whole[4:6], min_tokens=10) == (whole, "length", None)
        cluster.decodes[0].stop_after = 3
        assert await end() == (whole[:3], "stop", None)


async def test_one_choice_that_fails_ends_the_request() -> None:
    async with fake_cluster(num_decodes=2, request_deadline_s=1.0) as cluster, cluster.client() as client:
        cluster.decodes[1].pause_at = 5
        with pytest.raises(openai.InternalServerError, match="no token within"):
            await client.completions.create(
                model="tiny-random", prompt=PROMPT, n=2, max_tokens=900, extra_body={"ignore_eos": True}
            )
        await until(lambda: not any(decode.rows for decode in cluster.decodes))


async def test_choices_are_accepted_together_or_not_at_all() -> None:
    async with fake_cluster(num_decodes=1, max_queued=4) as cluster:
        cluster.decodes[0].paused = True
        url = f"{cluster.url}/v1/completions"
        run = asyncio.create_task(post(url, {"prompt": PROMPT, "n": 3, "max_tokens": 2}))
        await until(lambda: len(cluster.decodes[0].rows) == 3)
        listed = await get(f"{cluster.url}/requests")
        assert [entry["num_prompt_tokens"] for entry in listed["requests"]] == [4, 4, 4]
        assert (await post(url, {"prompt": PROMPT, "n": 2}))[0] == 429
        for body, param in (({"prompt": PROMPT, "n": 5}, "n"), ({"prompt": [[5]] * 5}, "prompt")):
            status, answer, _ = await post(url, body)
            assert (status, answer["error"]["param"]) == (400, param)
        assert len(cluster.decodes[0].rows) == 3
        cluster.decodes[0].paused = False
        status, answer, _ = await run
        assert (status, len(answer["choices"])) == (200, 3)
        assert f"cmpl-{listed['requests'][0]['id']}" == answer["id"]
        assert (await get(f"{cluster.url}/requests"))["requests"] == []
        assert listed["router"].startswith("router-0-")
