"""Decode ranks killed and stopped under load, one after the other, each followed until the rank serves again."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.failover_report import AFTER_S, Fault
from common.fault_answers import proof_of
from common.messages import View
from services.cli.fault import FaultClient, fault_event
from services.cli.run_directory import monitor_address
from services.cli.view_watch import watch_views

_REMOVED_S, _REJOIN_S, _REST_S = 30.0, 60.0, 1.0

Views = list[tuple[float, View]]


def order_of(num_kills: int, num_stops: int) -> list[str]:
    """Stops between kills, so that neither kind has the warmer cluster."""
    actions: list[str] = []
    while num_kills or num_stops:
        kills, stops = min(num_kills, 2), min(num_stops, 1)
        actions += ["kill"] * kills + ["stop"] * stops
        num_kills, num_stops = num_kills - kills, num_stops - stops
    return actions


async def inject(url: str, bus: FaultClient, views: Views, action: str) -> Fault:
    """One fault on the rank that serves most streams, followed until the rank serves again."""
    async with aiohttp.ClientSession() as session:
        cluster, requests = [await _get(session, f"{url}/{path}") for path in ("cluster", "requests")]
    serving = [entry for entry in cluster["ranks"] if entry["state"] == "serving"]
    victim = max(serving, key=lambda entry: int(entry["running"]))
    rank, incarnation = int(victim["rank"]), int(victim["incarnation"])
    victims = tuple(request["id"] for request in requests["requests"] if request["rank"] == rank)
    at = time.monotonic()
    answer = await asyncio.to_thread(bus.inject, fault_event(action, rank, None))
    if answer["status"] != "done":
        raise RuntimeError(f"{action} of rank {rank} did not take effect: {proof_of(answer)}")

    def is_out(view: View) -> bool:
        return all(member.incarnation != incarnation for member in view.members)

    def is_back(view: View) -> bool:
        """As many serve again: that rank in a new life, or a standby in its place."""
        return is_out(view) and len(view.members) >= len(serving)

    removed_at = await _seen(views, at, is_out, _REMOVED_S)
    rejoined_at = await _seen(views, at, is_back, _REJOIN_S)
    print(f"{action} rank {rank}: out after {removed_at - at:.3f} s, back after {rejoined_at - at:.1f} s", flush=True)
    return Fault(action, rank, at, removed_at, rejoined_at, victims)


async def _get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url, timeout=aiohttp.ClientTimeout(total=10)) as response:
        response.raise_for_status()
        return await response.json()


async def _seen(views: Views, since: float, is_it: Callable[[View], bool], within_s: float) -> float:
    """When a view for which ``is_it`` holds was published; raises RuntimeError when none is in time."""
    while time.monotonic() < since + within_s:
        for at, view in views:
            if at > since and is_it(view):
                return at
        await asyncio.sleep(0.005)
    raise RuntimeError(f"the view did not come within {within_s:.0f} s")


async def run_faults(url: str, run_dir: Path, actions: list[str]) -> list[Fault]:
    """Each in a whole group again, far enough apart that their windows do not overlap."""
    address = monitor_address(run_dir)
    faults = []
    async with watch_views(address) as views:
        with FaultClient(address) as bus:
            await asyncio.sleep(2 * _REST_S)
            for action in actions:
                fault = await inject(url, bus, views, action)
                faults.append(fault)
                await asyncio.sleep(max(_REST_S, fault.at + AFTER_S + _REST_S - time.monotonic()))
    return faults
