"""What clients see of long prompts: the first token with and without a shared beginning, and the pace of other streams.

A part of `benchmarks.prefill`. The cluster is a real one: two decode ranks, one prefill worker, everything over HTTP.
Eight streams run while a long prompt is computed, first by the prefill worker, then, with the worker killed and kept
away, by a decode rank in its rounds.
"""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from services.cli.chat_client import Stream, model_name, new_session, run_stream
from services.cli.cluster_state import fetch_cluster
from services.cli.temporary_cluster import temporary_cluster

NUM_STREAMS, NUM_WARM = 8, 20
CALM_S = 3.0
_LIMIT_S = 300.0
CONFIG = """
[agent]
restart_backoff_s = 300.0
restart_backoff_max_s = 300.0
[router]
prefill_wait_s = 0.3
[decode]
delivery_interval_s = 0.0
"""
Rows = dict[str, list[float]]  # what -> milliseconds


def body(model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0.0}


def ids(number: int, count: int) -> list[int]:
    return [(17 * number + 13 * position + position // 200) % 200 + 5 for position in range(count)]


async def first_token_ms(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> float:
    stream, begun = Stream(request), time.monotonic()
    await run_stream(session, url, stream)
    if stream.error:
        raise RuntimeError(stream.error)
    return 1000 * (stream.times[0] - begun)


def gaps_ms(streams: Sequence[Stream], begin: float, end: float) -> list[float]:
    """Between two tokens of one stream, the later of which came in the window."""
    times = [stream.times for stream in streams]
    return [1000 * (after - before) for each in times for before, after in pairwise(each) if begin < after <= end]


async def first_tokens(url: str, num_tokens: int, run: int) -> Rows:
    """A new prompt, one that ends otherwise, and the first again."""
    async with new_session(_LIMIT_S) as session:
        model, new = await model_name(session, url), ids(run, num_tokens)
        prompts = {"new prompt": new, "all but 100 tokens shared": new[:-100] + [7] * 100, "the same again": new}
        return {
            f"first token over HTTP, {name}": [await first_token_ms(session, url, body(model, prompt, 2))]
            for name, prompt in prompts.items()
        }


async def pace(url: str, num_tokens: int, run: int, by_whom: str) -> Rows:
    """Gaps of running streams before a long prompt is sent, and until its first token."""
    async with new_session(_LIMIT_S) as session, asyncio.TaskGroup() as group:
        model = await model_name(session, url)
        streams = [Stream(body(model, ids(100 + number, 10), 12_000)) for number in range(NUM_STREAMS)]
        tasks = [group.create_task(run_stream(session, url, stream)) for stream in streams]
        while not all(len(stream.times) > NUM_WARM or stream.is_over for stream in streams):  # noqa: ASYNC110 - streams tell nobody
            await asyncio.sleep(0.01)
        begun = time.monotonic()
        await asyncio.sleep(CALM_S)
        sent = time.monotonic()
        first = await first_token_ms(session, url, body(model, ids(50 + run, num_tokens), 2))
        rows = {f"first token over HTTP beside {NUM_STREAMS} streams, by {by_whom}": [first]}
        for name, window in {"before": (begun, sent), "meanwhile": (sent, sent + first / 1000)}.items():
            found = gaps_ms(streams, *window)
            for share, value in zip(("p50", "p99", "largest"), np.percentile(found, (50, 99, 100)), strict=True):
                rows[f"gap of {NUM_STREAMS} streams, {name}, by {by_whom}, {share}"] = [float(value)]
        for task in tasks:
            task.cancel()
        return rows


def without_prefill_worker(url: str) -> None:
    (worker,) = fetch_cluster(url)["prefill"]
    os.kill(worker["pid"], signal.SIGKILL)
    until = time.monotonic() + 60
    while fetch_cluster(url)["prefill"]:
        if time.monotonic() > until:
            raise RuntimeError("the prefill worker is still listed 60 s after its SIGKILL")
        time.sleep(0.05)


def measure_http(model: Path, directory: Path, num_tokens: int, runs: int) -> Rows:
    rows: Rows = {}

    def note(found: Rows) -> None:
        for name, values in found.items():
            rows.setdefault(name, []).extend(values)

    config = directory / "prefill_http.toml"
    config.write_text(CONFIG)
    with temporary_cluster(directory / "run", model, 2, 1, "--config", str(config)) as url:
        for run in range(runs):
            note(asyncio.run(first_tokens(url, num_tokens, run)))
        for run in range(runs):
            note(asyncio.run(pace(url, num_tokens, run, "prefill")))
        without_prefill_worker(url)
        for run in range(runs):
            note(asyncio.run(pace(url, num_tokens, 10 + run, "a decode rank")))
    return rows
