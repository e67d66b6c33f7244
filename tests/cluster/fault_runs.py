"""Streams under a fault, each compared with the fault-free run, and what every fault cost, as a table."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.process_table import state_of
from services.cli.chat_client import Stream
from tests.cluster.harness import Cluster, outcome, processes_of, stream_all, varied_bodies
from tests.cluster.steady_load import under_load

NUM_STREAMS, MAX_TOKENS = 12, 900  # as long as the model allows: hardly any is ever waited for to its end
Fault = Callable[[], Awaitable[str]]


@dataclass(frozen=True)
class Row:
    """``gap_s``: the longest that any stream waited between two tokens. ``num_in_course``: streams that the fault met
    after their first token and before their last one."""

    fault: str
    proof: str
    gap_s: float
    num_in_course: int
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


async def under_fault(
    cluster: Cluster, expected: list[Stream], name: str, fault: Fault, size: tuple[int, int] = (4, 2)
) -> str:
    """Does ``fault`` under load, which goes on until so many ranks and prefill workers are there again. ``fault``
    returns the proof that it happened. Every stream must be the fault-free one."""

    async def until_whole_again() -> str:
        proof = await fault()
        await whole(cluster, *size)
        return proof

    proof, load = await under_load(cluster, expected, until_whole_again)
    assert proof, "a fault without proof shows nothing"
    record(Row(name, proof, load.largest_gap_s, load.num_in_course, len(load.streams)))
    return proof


def record(row: Row) -> None:
    ROWS.append(row)
    print(row)


def table() -> str:
    lines = [
        "| fault | proof | largest gap of a stream, s | streams it met in their course | streams, all equal |",
        "|---|---|---|---|---|",
    ]
    for row in ROWS:
        cells = [row.fault, _short(row.proof), f"{row.gap_s:.2f}", str(row.num_in_course), str(row.num_streams)]
        lines.append(f"| {' | '.join(cells)} |")
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
