"""What a failure costs: 32 streams on 4 decode ranks, ranks killed and stopped under them, all seen by the clients.

    python -m benchmarks.failover [--kills 20] [--stops 10] [--streams 32] [--model DIR] [--output PREFIX]

Every stream is compared, text and log-probability bits, with the same request of the fault-free run before. A fault
counts only with the monitor's proof. Writes PREFIX.json, PREFIX.md and PREFIX.svg.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.failover_report import AFTER_S, Fault, picture, summary, table
from benchmarks.load_generator import LoadGenerator, bodies_for
from benchmarks.provenance import provenance
from common.fault_answers import proof_of
from common.messages import View
from services.cli.fault import FaultClient, fault_event
from services.cli.run_directory import monitor_address
from services.cli.temporary_cluster import temporary_cluster
from services.cli.view_watch import watch_views

ROOT = Path(__file__).resolve().parent.parent
MAX_TOKENS, NUM_BODIES = 240, 64
_REMOVED_S, _REJOIN_S, _REST_S = 30.0, 60.0, 1.0

Views = list[tuple[float, View]]


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
        return any(member.rank == rank and member.incarnation > incarnation for member in view.members)

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
    """One after the other, each in a whole group again, far enough apart that their windows do not overlap."""
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


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    origin = provenance()
    # Stops between kills, so that neither kind has the warmer cluster.
    kills, stops = ["kill"] * arguments.kills, ["stop"] * arguments.stops
    actions = [action for pair in zip(kills[::2], kills[1::2], stops, strict=False) for action in pair]
    actions += kills[2 * len(stops) :] + stops[len(kills) // 2 :]
    with tempfile.TemporaryDirectory(prefix="regrow-failover-") as directory:
        base = Path(directory)
        (base / "bodies.json").write_text(json.dumps(bodies_for(arguments.model.name, NUM_BODIES, MAX_TOKENS)))
        with temporary_cluster(base / "run", arguments.model, 4, 2) as url:
            calm = LoadGenerator(url, base / "bodies.json", base / "calm.json", arguments.streams)
            time.sleep(arguments.calm_s)
            expected = calm.finish()
            assert {record["body"] for record in expected} == set(range(NUM_BODIES)), "raise --calm-s"
            print(f"fault-free: {len(expected)} requests", flush=True)
            start = time.monotonic()
            load = LoadGenerator(url, base / "bodies.json", base / "load.json", arguments.streams)
            faults = asyncio.run(run_faults(url, base / "run", actions))
            records = load.finish()
            span = (start, time.monotonic())
    figures = summary(records, expected, faults, span)
    text = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in origin.items())
    report = f"# Failover\n\n{text}\n- streams: {arguments.streams} of {MAX_TOKENS} tokens\n\n{table(figures)}\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text(report)
    arguments.output.with_suffix(".svg").write_text(picture(records, faults, span))
    arguments.output.with_suffix(".json").write_text(json.dumps({**origin, "figures": figures}, indent=1) + "\n")
    print(report)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--calm-s", type=float, default=45.0, help="length of the fault-free run")
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "fixtures" / "tiny-random")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/failover_cpu"))
    figures = measure(parser.parse_args())
    return 0 if figures["requests"] == figures["completed"] == figures["equal_to_fault_free"] else 1


if __name__ == "__main__":
    sys.exit(main())
