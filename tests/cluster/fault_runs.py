"""Streams under a fault, each compared with the fault-free run, and what every fault cost, as a table.

Requests go on coming until the fault is over, so that it meets streams at every point of their lives.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.process_table import state_of
from services.cli.chat_client import Stream
from tests.cluster.harness import Cluster, outcome, processes_of, stream_all, until_tokens, varied_bodies

NUM_STREAMS, MAX_TOKENS = 8, 80
_AT_TOKENS = 8
Fault = Callable[[], Awaitable[str]]


@dataclass(frozen=True)
class Row:
    """``gap_s``: the longest that any stream waited between two tokens."""

    fault: str
    proof: str
    gap_s: float
    num_streams: int


ROWS: list[Row] = []


def fault_free(cluster: Cluster) -> list[Stream]:
    streams = asyncio.run(stream_all(cluster.url, varied_bodies(NUM_STREAMS, MAX_TOKENS)))
    for stream in streams:
        assert (stream.error, stream.finish, len(stream.logprobs)) == ("", "length", MAX_TOKENS)
    return streams


def assert_same(streams: list[Stream], expected: list[Stream]) -> None:
    for number, (stream, wanted) in enumerate(zip(streams, expected, strict=True)):
        assert stream.error == "", f"stream {number} failed: {stream.error}"
        assert outcome(stream) == outcome(wanted), f"stream {number} differs from the fault-free run"


def largest_gap_s(streams: list[Stream]) -> float:
    return max((after - before for stream in streams for before, after in pairwise(stream.times)), default=0.0)


async def under_fault(cluster: Cluster, expected: list[Stream], name: str, fault: Fault) -> str:
    """Does ``fault`` in mid-stream; it returns the proof that it happened. Every stream until then must be equal."""
    running: list[asyncio.Task[str]] = []

    async def begin_once(streams: list[Stream]) -> None:
        await until_tokens(streams, _AT_TOKENS)
        if not running:
            running.append(asyncio.create_task(_named(fault)))

    gap_s, num_streams = 0.0, 0
    while not running or not running[0].done():
        streams = await stream_all(cluster.url, [stream.body for stream in expected], begin_once)
        assert_same(streams, expected)
        gap_s, num_streams = max(gap_s, largest_gap_s(streams)), num_streams + len(streams)
    proof = running[0].result()
    assert proof, "a fault without proof shows nothing"
    record(name, proof, gap_s, num_streams)
    return proof


async def _named(fault: Fault) -> str:
    return await fault()


def record(name: str, proof: str, gap_s: float, num_streams: int) -> None:
    ROWS.append(Row(name, proof, gap_s, num_streams))
    print(f"{name}: largest gap {gap_s:.3f} s in {num_streams} streams; {proof}")


def table() -> str:
    lines = ["| fault | proof | largest gap of a stream, s | streams, all equal |", "|---|---|---|---|"]
    lines += [f"| {row.fault} | {_short(row.proof)} | {row.gap_s:.2f} | {row.num_streams} |" for row in ROWS]
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def serving(status: dict[str, Any]) -> list[int]:
    return [entry["rank"] for entry in status["ranks"] if entry["state"] == "serving"]


def entry_of(status: dict[str, Any], rank: int) -> dict[str, Any]:
    found: dict[str, Any] = next((entry for entry in status["ranks"] if entry["rank"] == rank), {})
    return found


def events(status: dict[str, Any], kind: str, after: int = 0) -> list[dict[str, Any]]:
    return [event for event in status["events"] if event["kind"] == kind and event["seq"] > after]


def last_seq(status: dict[str, Any]) -> int:
    return int(status["events"][-1]["seq"])


async def whole(cluster: Cluster, num_ranks: int = 4, num_prefill: int = 2) -> dict[str, Any]:
    return await cluster.wait_status(
        lambda s: len(serving(s)) == num_ranks and len(s["prefill"]) == num_prefill and s["prepared"] is None, 120.0
    )


async def without(cluster: Cluster, rank: int, incarnation: int) -> dict[str, Any]:
    """Once that life of the rank is out of the group."""
    return await cluster.wait_status(
        lambda s: rank not in serving(s) or entry_of(s, rank)["incarnation"] != incarnation, 60.0
    )


async def kill(*pids: int) -> str:
    """SIGKILL, all at once; returns when they are gone."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: all(state_of(pid) in ("", "Z") for pid in pids), f"pids {pids} gone")
    return f"pids {list(pids)} gone"


async def stop(*pids: int) -> str:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    await until(lambda: all(state_of(pid) == "T" for pid in pids), f"pids {pids} stopped")
    return f"pids {list(pids)} in state T"


def resume(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


async def until(what: Callable[[], bool], text: str, within_s: float = 20.0) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not what():
        assert loop.time() < deadline, f"not within {within_s:g} s: {text}"
        await asyncio.sleep(0.005)


def pids_of(cluster: Cluster, kind: str) -> list[int]:
    found = []
    for pid, command in processes_of(cluster.run_dir):
        if f"services.{kind}" in command.split():
            found.append(pid)
    return sorted(found)


def write_table(path: Path, heading: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{heading}\n{table()}")
