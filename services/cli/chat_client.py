"""A client of the OpenAI API that keeps what each stream received, and when."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(slots=True)
class Stream:
    """One request and what came back. ``times``: arrival of each piece of text, monotonic seconds; ``sizes``: its
    number of tokens, 1 where no log-probabilities tell it."""

    body: dict[str, Any]
    id: str = ""  # the server's
    text: str = ""
    logprobs: list[float] = field(default_factory=list)  # of the chosen tokens
    times: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    missing_experts: bool = False  # some token was computed without an expert, which the server may be allowed to

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    @property
    def is_over(self) -> bool:
        return bool(self.finish or self.error)

    def is_same(self, other: "Stream") -> bool:
        """Text, every token's log-probability to the last bit, and the reason of the end."""
        return not self.error and (self.text, self.logprobs, self.finish) == (other.text, other.logprobs, other.finish)

    def largest_gap_s(self, since: float) -> float:
        """The longest wait between two pieces of which the second came after ``since``."""
        gaps = [after - before for before, after in zip(self.times, self.times[1:], strict=False) if after > since]
        return max(gaps, default=0.0)


def new_session(deadline_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=deadline_s), connector=aiohttp.TCPConnector(limit=0)
    )


async def run_stream(session: aiohttp.ClientSession, url: str, stream: Stream) -> None:
    """Fills ``stream``; an error goes into its ``error``, never out. ``messages`` in the body makes it a chat."""
    path = "/v1/chat/completions" if "messages" in stream.body else "/v1/completions"
    try:
        async with session.post(url + path, json={**stream.body, "stream": True}) as response:
            if response.status != 200:
                stream.error = f"HTTP {response.status}: {_message(await response.text())}"
                return
            async for chunk in _chunks(response):
                take(stream, chunk, time.monotonic())
    except (aiohttp.ClientError, TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        stream.error = f"the server sent no OpenAI chunk: {error!r}"
    if not stream.is_over:
        stream.error = "the stream ended without a reason"


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        field_name, _, data = line.strip().partition(b":")
        if field_name == b"data" and data.strip() != b"[DONE]":
            yield json.loads(data)


def take(stream: Stream, chunk: dict[str, Any], now: float) -> None:
    """Adds what came at ``now``. Raises KeyError, TypeError or AttributeError for what is no OpenAI chunk."""
    if "error" in chunk:
        stream.error = str(chunk["error"].get("message", chunk["error"]))
        return
    stream.id = chunk.get("id", stream.id)
    for choice in chunk["choices"]:
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        logprobs = choice.get("logprobs") or {}
        values = logprobs.get("token_logprobs") or [entry["logprob"] for entry in logprobs.get("content") or ()]
        if text or values:
            stream.times.append(now)
            stream.sizes.append(len(values) or 1)
        stream.text += text
        stream.missing_experts |= bool(choice.get("missing_experts"))
        stream.logprobs += values
        stream.finish = choice.get("finish_reason") or stream.finish


def _message(text: str) -> str:
    """The message of an OpenAI error body."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


async def run_streams(url: str, streams: Sequence[Stream], concurrency: int, deadline_s: float) -> None:
    """All of them, at most ``concurrency`` at a time."""
    gate = asyncio.Semaphore(concurrency)
    async with new_session(deadline_s) as session, asyncio.TaskGroup() as group:

        async def one(stream: Stream) -> None:
            async with gate:
                await run_stream(session, url, stream)

        for stream in streams:
            group.create_task(one(stream))


async def model_name(session: aiohttp.ClientSession, url: str) -> str:
    """The name of the model served there; raises aiohttp.ClientError."""
    async with session.get(f"{url}/v1/models") as response:
        response.raise_for_status()
        body = await response.json()
        return str(body["data"][0]["id"])
