"""Experts move between ranks of a real cluster: streams stay exact, whoever is killed in the middle of it.

An expert of the random checkpoint takes a second and a half at this bandwidth, so a kill finds the migration under way;
what the monitor then says of it is the proof that it did.
"""

import asyncio
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from common.abacus_tasks import unseen_problems
from common.config import EMBEDDED_MODEL
from common.messages import View
from common.placement import PhysicalToLogical, initial_placement
from common.placement_file import PlacementFile
from common.view import ranks
from services.cli.chat_client import Stream
from services.cli.placement import MonitorTalk, export_placement, import_placement
from services.cli.run_directory import monitor_address
from tests.cluster.harness import Cluster, outcome, stream_all, varied_bodies
from tests.cluster.steady_load import under_load

NUM_STREAMS, MAX_TOKENS = 9, 900
NUM_MOVES = 3
# Twelve slots a rank for 32 experts: half of them have one copy, and three ranks have room for all.
SLOW = """
[decode]
num_redundant_experts = 16
[planner]
bandwidth_bytes_per_s = 8e3
step_interval = 1000000
"""
# Measured on so many (token, expert) pairs, balance is known within a hundredth or so.
ENOUGH_ENTRIES = 4000
# The loads of a second or two of traffic decide.
QUICK = """
[decode]
num_redundant_experts = 8
[planner]
window_size = 160
step_interval = 80
"""


def recorded() -> PhysicalToLogical:
    """Not what a cluster would begin with."""
    plain = initial_placement(num_layers=2, num_logical_experts=32, max_ranks=8, num_ranks=4, num_local=12)
    return tuple((*rows[3::-1], *rows[4:]) for rows in plain)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started from a recorded placement."""
    base = tmp_path_factory.mktemp("slow")
    (base / "start.json").write_text(PlacementFile(recorded()).to_text())
    running = Cluster(base / "run", "--decode-ranks", "4", "--init-placement", str(base / "start.json"), config=SLOW)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


@pytest.fixture(scope="module")
def expected(slow: Cluster) -> list[Stream]:
    """Without any migration."""
    streams = asyncio.run(stream_all(slow.url, varied_bodies(NUM_STREAMS, MAX_TOKENS)))
    for stream in streams:
        assert (stream.error, stream.finish, len(stream.logprobs)) == ("", "length", MAX_TOKENS)
    return streams


@dataclass
class Wish:
    """``target`` shall hold experts that only ``source`` has, in place of some with other copies. ``seen``: the status
    that told of it."""

    version: int
    seen: dict[str, Any]
    source: int
    target: int


def view_of(cluster: Cluster) -> View:
    talk = MonitorTalk(monitor_address(cluster.run_dir))
    try:
        return talk.view()
    finally:
        talk.close()


async def wish(cluster: Cluster) -> Wish:
    """Returns when it is on its way."""
    talk = MonitorTalk(monitor_address(cluster.run_dir))
    known = begun(await cluster.fetch_status(), [])
    try:
        view = await asyncio.to_thread(talk.view)
        for layer, (source, target) in product(range(2), permutations(ranks(view), 2)):
            if (wanted := with_moves(view, layer, source, target)) is not None:
                talk.send(talk.plan(view, wanted))
                status = await cluster.wait_status(lambda status: bool(begun(status, known)))
                return Wish(begun(status, known)[0], status, source, target)
    finally:
        talk.close()
    raise AssertionError(f"no rank alone has {NUM_MOVES} experts of a layer: {view.placement}")


def begun(status: dict[str, Any], known: list[int]) -> list[int]:
    """Versions of migrations that were not known, from the record of events: it still tells of those that are over."""
    told = [event for event in status["events"] if event["kind"] == "migration" and event["status"] == "staging"]
    return [event["version"] for event in told if event["version"] not in known]


def with_moves(view: View, layer: int, source: int, target: int) -> PhysicalToLogical | None:
    layers = [[list(row) for row in rows] for rows in view.placement.physical_to_logical]
    rows = layers[layer]
    held = [expert for rank in ranks(view) for expert in rows[rank]]
    alone = [expert for expert in rows[source] if held.count(expert) == 1]
    spare = [local for local, expert in enumerate(rows[target]) if held.count(expert) > 1]
    if min(len(alone), len(spare)) < NUM_MOVES:
        return None
    for local, expert in zip(spare[:NUM_MOVES], alone, strict=False):
        rows[target][local] = expert
    return tuple(tuple(tuple(row) for row in rows) for rows in layers)


async def end_of(cluster: Cluster, version: int) -> dict[str, Any]:
    """The event that tells what became of it."""

    def ends(status: dict[str, Any]) -> list[dict[str, Any]]:
        told = [e for e in status["events"] if e["kind"] == "migration" and e["version"] == version]
        return [event for event in told if event["status"] != "staging"]

    return ends(await cluster.wait_status(lambda status: bool(ends(status))))[-1]


def pid_of(status: dict[str, Any], name_or_rank: str | int) -> int:
    entries = [*status["ranks"], *status["services"]]
    pid: int = next(e["pid"] for e in entries if name_or_rank in (e.get("rank", ""), e["name"]))
    return pid


def is_whole(status: dict[str, Any]) -> bool:
    serving = [entry["rank"] for entry in status["ranks"] if entry["state"] == "serving"]
    return serving == [0, 1, 2, 3] and status["prepared"] is None and status["placement"]["orphans"] == 0


async def during_streams(
    cluster: Cluster, expected: list[Stream], what: Callable[[], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """Does it in mid-stream; every stream is the one without it."""
    ended, _ = await under_load(cluster, expected, what)
    return ended


async def test_streams_are_exact_while_experts_move(slow: Cluster, expected: list[Stream]) -> None:
    before = await slow.wait_status(is_whole)
    assert (await asyncio.to_thread(view_of, slow)).placement.physical_to_logical == recorded()

    async def move() -> dict[str, Any]:
        return await end_of(slow, (await wish(slow)).version)

    assert (await during_streams(slow, expected, move))["status"] == "in force"
    after = (await slow.wait_status(is_whole))["placement"]
    assert after["experts_copied"] == before["placement"]["experts_copied"] + NUM_MOVES, "read from live copies"
    assert (after["experts_from_checkpoint"], after["bad_expert_copies"]) == (0, 0)
    assert all(entry["void_rounds"] == 0 for entry in (await slow.fetch_status())["ranks"])
    again = await stream_all(slow.url, [record.body for record in expected])
    assert [outcome(stream) for stream in again] == [outcome(stream) for stream in expected]


@pytest.mark.parametrize("victim", ["source", "target", "planner"])
async def test_sigkill_in_the_middle_of_a_migration(slow: Cluster, expected: list[Stream], victim: str) -> None:
    await slow.wait_status(is_whole)
    killed: list[int] = []

    async def kill() -> dict[str, Any]:
        moving = await wish(slow)
        while moving.target in moving.seen["placement"]["staged_ranks"]:
            # What an older placement had left in its rows was all that it lacked.
            await end_of(slow, moving.version)
            moving = await wish(slow)
        killed.append(pid_of(moving.seen, {"source": moving.source, "target": moving.target}.get(victim, "planner")))
        os.kill(killed[0], signal.SIGKILL)
        killed_at = time.time()
        ended = await end_of(slow, moving.version)
        assert ended["time"] > killed_at, "it was over already"
        return ended

    ended = await during_streams(slow, expected, kill)
    if victim == "planner":
        assert ended["status"] == "in force", "a plan that was taken needs no planner"
    else:
        assert ended["status"] == "abandoned" and "signal KILL" in ended["reason"]
    after = await slow.wait_status(is_whole)
    assert killed[0] not in [entry["pid"] for entry in (*after["ranks"], *after["services"])]


async def test_an_exported_placement_is_reached_again(slow: Cluster, tmp_path: Path) -> None:
    before = await slow.wait_status(is_whole)
    assert await asyncio.to_thread(export_placement, slow.run_dir, tmp_path / "placement.json", 0.0) == 0
    ended = await end_of(slow, (await wish(slow)).version)
    assert ended["status"] == "in force"
    assert await asyncio.to_thread(import_placement, slow.run_dir, tmp_path / "placement.json", 60.0) == 0
    after = await slow.wait_status(is_whole)
    assert after["placement"]["version"] > ended["version"] > before["placement"]["version"]


async def test_balance_follows_the_traffic(tmp_path: Path) -> None:
    """First one kind of task, then another: what the ranks really compute becomes more even, under the settings that
    ship; seen on /cluster and on /metrics."""
    cluster = Cluster(tmp_path / "run", "--decode-ranks", "4", model=EMBEDDED_MODEL, config=QUICK)
    try:
        cluster.wait_ready()
        for kind in ("counting", "sorting"):
            started, least, status = time.monotonic(), 1.0, await cluster.fetch_status()
            moved = status["placement"]["moved_experts"]
            while True:
                assert time.monotonic() < started + 100.0, f"{kind}: {status['placement']}\n{cluster.logs()}"
                await stream_all(cluster.url, task_bodies(kind))
                status = await cluster.fetch_status()
                if status["placement"]["served_entries"] < ENOUGH_ENTRIES:
                    continue  # foretold, or measured on next to nothing
                figure = status["placement"]["balancedness"]
                least = min(least, figure)
                if status["placement"]["moved_experts"] > moved and figure > least + 0.02:
                    break
            print(f"{kind}: balancedness {least:.3f} -> {figure:.3f} in {time.monotonic() - started:.1f} s")
            text = await metrics(cluster)
            assert gauge(text, "regrow_placement_balancedness") > least
            assert gauge(text, "regrow_placement_moved_experts") > moved
            assert gauge(text, 'regrow_placement_version{state="active"}') >= status["placement"]["version"]
            assert len(re.findall(r"^regrow_placement_layer_balancedness\{", text, re.MULTILINE)) == 4
    finally:
        cluster.stop()


def task_bodies(kind: str) -> list[dict[str, Any]]:
    return [
        {
            "model": EMBEDDED_MODEL.name,
            "messages": [{"role": "user", "content": problem.prompt}],
            "max_tokens": 40,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for problem in unseen_problems(kind, 12, 3)
    ]


async def metrics(cluster: Cluster) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{cluster.url}/metrics") as response:
        return await response.text()


def gauge(text: str, name: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} "))
