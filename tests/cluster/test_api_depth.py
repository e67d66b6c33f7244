"""The whole API on a real cluster: recorded requests and their answers, and every option at once across a SIGKILL.

``tests/services/data/api_answers.json`` holds the requests and what the random checkpoint answers. After a change that
is meant to change answers, ``python -m tests.cluster.test_api_depth`` writes them anew.
"""

import asyncio
import json
import math
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.cluster.harness import ROOT, Cluster

TABLE = ROOT / "tests" / "services" / "data" / "api_answers.json"
NAMES = ("tokens", "token_logprobs", "text_offset", "top_logprobs")
MAX_TOKENS = 130

Answer = dict[str, Any]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(tmp_path_factory.mktemp("api") / "run", "--decode-ranks", "3", "--prefill-workers", "1")
    try:
        yield running.wait_ready()
    finally:
        running.stop()


async def _post(session: aiohttp.ClientSession, url: str, path: str, body: Mapping[str, Any]) -> Answer:
    async with session.post(f"{url}{path}", json=body) as response:
        answer: Answer = await response.json()
        return {"status": response.status, **{key: answer[key] for key in answer if key not in ("id", "created")}}


class _Choice:
    """What a client has of one choice when the chunks that concern it are put together."""

    def __init__(self) -> None:
        self.text = ""
        self.logprobs: dict[str, list[Any]] = {name: [] for name in NAMES}
        self.ends: list[Any] = [None, None]
        self.content: list[Answer] = []

    def take(self, part: Answer) -> None:
        self.text += part["text"] if "text" in part else part["delta"]["content"]
        logprobs = part["logprobs"] or {}
        self.content += logprobs.get("content", [])
        for name in NAMES:
            self.logprobs[name] += logprobs.get(name, [])
        assert self.ends[0] is None, "a chunk after the end of its choice"
        self.ends = [part["finish_reason"], part["stop_reason"]]

    def whole(self, like: Answer) -> Answer:
        """As a choice of an answer that did not come in chunks."""
        chat = "message" in like
        logprobs = {"content": self.content, "refusal": None} if chat else self.logprobs
        shown = {"message": {**like["message"], "content": self.text}} if chat else {"text": self.text}
        return {
            "index": like["index"],
            **shown,
            "logprobs": logprobs if like["logprobs"] is not None else None,
            "finish_reason": self.ends[0],
            "stop_reason": self.ends[1],
        }


class _Stream:
    def __init__(self, path: str, body: Mapping[str, Any]) -> None:
        self.path, self.body = path, {**body, "stream": True, "stream_options": {"include_usage": True}}
        self.choices: dict[int, _Choice] = {}
        self.usage: Answer | None = None

    async def run(self, session: aiohttp.ClientSession, url: str) -> None:
        async with session.post(f"{url}{self.path}", json=self.body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    self.usage = chunk["usage"]
                    for part in chunk["choices"]:
                        self.choices.setdefault(part["index"], _Choice()).take(part)

    def whole(self, like: Answer) -> Answer:
        choices = [self.choices[part["index"]].whole(part) for part in like["choices"]]
        return {**like, "choices": choices, "usage": self.usage}


def _differences(got: Any, recorded: Any, where: str = "") -> list[str]:
    """Numbers with a fraction may differ in what another processor rounds; nothing else may."""
    if isinstance(got, float) and isinstance(recorded, float):
        return [] if math.isclose(got, recorded, abs_tol=1e-4) else [f"{where}: {got}, recorded {recorded}"]
    if isinstance(got, dict) and isinstance(recorded, dict) and got.keys() == recorded.keys():
        return [line for key in got for line in _differences(got[key], recorded[key], f"{where}.{key}")]
    if isinstance(got, list) and isinstance(recorded, list) and len(got) == len(recorded):
        pairs = enumerate(zip(got, recorded, strict=True))
        return [line for number, pair in pairs for line in _differences(*pair, f"{where}[{number}]")]
    return [] if got == recorded else [f"{where}: {got!r}, recorded {recorded!r}"]


async def test_answers_are_the_recorded_ones_whole_and_streamed(cluster: Cluster) -> None:
    async with aiohttp.ClientSession() as session:

        async def ask(path: str, body: Answer, recorded: Answer) -> None:
            answer = await _post(session, cluster.url, path, body)
            assert _differences(answer, recorded) == [], body
            if "choices" in answer:
                stream = _Stream(path, body)
                await stream.run(session, cluster.url)
                assert stream.whole(like=answer) == answer, "streamed, it is the same to the last bit"

        table = json.loads(TABLE.read_text())
        await asyncio.gather(*(ask(entry["path"], entry["body"], entry["answer"]) for entry in table))


async def test_the_openai_client_reads_every_option(cluster: Cluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        completion = await client.completions.create(
            model="tiny-random",
            prompt=[[5, 6, 7], [8, 9]],
            n=2,
            echo=True,
            logprobs=5,
            max_tokens=8,
            seed=3,
            presence_penalty=1,
            frequency_penalty=1,
            logit_bias={"40": 100, "41": -100},
            extra_body={"ignore_eos": True, "min_tokens": 4, "repetition_penalty": 1.2, "min_p": 0.01},
        )
        assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
        for choice, num_prompt in zip(completion.choices, (3, 3, 2, 2), strict=True):
            assert choice.logprobs and choice.logprobs.token_logprobs and choice.logprobs.top_logprobs
            assert len(choice.logprobs.token_logprobs) == num_prompt + 8
            # Tokens that are no whole character all show as U+FFFD and share a key.
            assert all(2 <= len(top) <= 6 for top in choice.logprobs.top_logprobs[1:])
            assert "E" in choice.text and "F" not in choice.text, "ids 40 and 41 are wanted and banned"
        chat = await client.chat.completions.create(
            model="tiny-random",
            messages=[{"role": "user", "content": "hi"}],
            n=2,
            logprobs=True,
            top_logprobs=20,
            max_tokens=6,
            seed=3,
            extra_body={"ignore_eos": True},
        )
        texts = [choice.message.content for choice in chat.choices]
        assert texts[0] != texts[1], "choices have seeds of their own"
        alone = await client.chat.completions.create(
            model="tiny-random",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=6,
            seed=4,
            extra_body={"ignore_eos": True},
        )
        assert alone.choices[0].message.content == texts[1], "choice i has the seed + i"


def _all_options(stop_id: int) -> list[tuple[str, Answer]]:
    """Requests in which every option decides nearly every token, so that one which a new place forgets would show.

    Three choices of each: every rank gets some of each.
    """
    common = {
        "max_tokens": MAX_TOKENS,
        "ignore_eos": True,
        "seed": 11,
        "top_p": 0.98,
        "min_p": 0.001,
        "logit_bias": {"50": 1.5, str(stop_id): 9.0, "60": -100},
        "stop_token_ids": [stop_id],
        "min_tokens": MAX_TOKENS - 15,
        "n": 3,
    }
    prompt = [(7 * position) % 200 + 5 for position in range(40)]
    # Negative penalties (and one below 1) hold on to what was said before.
    often = {"frequency_penalty": -2.0, "repetition_penalty": 1.05}
    once = {"presence_penalty": -2.0, "frequency_penalty": 0.05, "temperature": 0.3}
    ever = {"repetition_penalty": 0.3}
    chat = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 7}
    return [
        ("/v1/completions", {**common, **often, "prompt": [prompt, prompt[:9]], "echo": True, "logprobs": 4}),
        ("/v1/chat/completions", {**common, **ever, **chat}),
        ("/v1/completions", {**common, **once, "prompt": "colder", "logprobs": 0, "echo": True}),
    ]


async def test_every_option_is_exact_across_the_death_of_a_rank(cluster: Cluster) -> None:
    async with aiohttp.ClientSession() as session:
        requests = _all_options(stop_id=70)
        free = {"prompt": [9, 8, 7], "max_tokens": MAX_TOKENS, "seed": 5, "ignore_eos": True, "logprobs": 1}
        text = (await _post(session, cluster.url, "/v1/completions", free))["choices"][0]["text"]
        # Wherever in it the rank dies, the seam is inside of the stop string.
        stop = text[4 : len(text) - 10]
        requests.append(("/v1/completions", {**free, "stop": stop}))
        expected = await asyncio.gather(*(_post(session, cluster.url, path, body) for path, body in requests))
        ended = expected[-1]["choices"][0]
        assert (ended["text"], ended["stop_reason"]) == (text[:4], stop)
        reasons = [choice["stop_reason"] for choice in expected[1]["choices"]]
        assert reasons == [70, 70, 70], "the chats end by the id that min_tokens has held off"

        streams = [_Stream(path, body) for path, body in requests]
        before = {entry["rank"]: entry for entry in (await cluster.fetch_status())["ranks"]}
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(stream.run(session, cluster.url))
            in_flight = await _in_mid_stream(session, cluster.url, num_requests=13)
            victim = in_flight[-1]["rank"]  # the one with the long stop string
            os.kill(before[victim]["pid"], signal.SIGKILL)
            replaced = await _replaced(session, cluster.url)
        assert {entry["id"] for entry in in_flight if entry["rank"] == victim} <= replaced
        for stream, answer in zip(streams, expected, strict=True):
            assert stream.whole(like=answer) == answer


async def _requests(session: aiohttp.ClientSession, url: str) -> list[Answer]:
    async with session.get(f"{url}/requests") as response:
        found: list[Answer] = (await response.json())["requests"]
        return found


async def _in_mid_stream(session: aiohttp.ClientSession, url: str, num_requests: int) -> list[Answer]:
    """The requests in flight once all of them are well under way; fails when one has ended before that."""
    async with asyncio.timeout(60):
        while True:
            entries = await _requests(session, url)
            if len(entries) == num_requests and all(entry["num_output_tokens"] >= 40 for entry in entries):
                assert all(entry["num_output_tokens"] < MAX_TOKENS - 30 for entry in entries), (
                    "the fault comes too late"
                )
                return entries
            await asyncio.sleep(0.005)


async def _replaced(session: aiohttp.ClientSession, url: str) -> set[str]:
    """The ids of the requests that were placed again."""
    async with asyncio.timeout(60):
        while True:
            if ids := {entry["id"] for entry in await _requests(session, url) if entry["attempt"] > 0}:
                return ids
            await asyncio.sleep(0.005)


async def _record(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        entries = [
            {**entry, "answer": await _post(session, url, entry["path"], entry["body"])}
            for entry in json.loads(TABLE.read_text())
        ]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    TABLE.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="api_") as directory:
        running = Cluster(Path(directory) / "run", "--decode-ranks", "2")
        try:
            asyncio.run(_record(running.wait_ready().url))
        finally:
            running.stop()
