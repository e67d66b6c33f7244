"""What clients notice of moving experts: windows of load with and without migrations in turn.

    python -m benchmarks.migration                   (make bench-migration)

While a load generator in a process of its own keeps streams open, every second window asks the running cluster for
migrations: each rank takes some experts drawn at random, and ``--every-s`` after the last one was begun the next is
asked for (0: as soon as the last is in force, far more often than any planner would). In the windows between, the
cluster is asked the same questions as often, and nothing moves. Gaps between tokens are compared between the two kinds
of windows; every stream must equal the one of the run before the first window.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.load_generator import ROOT, LoadGenerator, bodies_for
from benchmarks.provenance import provenance
from common.messages import View
from common.placement import PhysicalToLogical
from common.view import ranks
from services.cli.cluster_state import fetch_cluster
from services.cli.placement import MonitorTalk
from services.cli.run_directory import monitor_address
from services.cli.temporary_cluster import temporary_cluster

MAX_TOKENS = 120
_POLL_S, _GIVE_UP_S = 0.05, 10.0
CONFIG = """
[decode]
num_redundant_experts = 16
delivery_interval_s = 0.0
[planner]
step_interval = 1000000
bandwidth_bytes_per_s = {bandwidth}
"""


def shuffled(view: View, num_moves: int, random: Random) -> PhysicalToLogical:
    """Every rank gets ``num_moves`` other experts in each layer, in the place of experts that have another copy."""
    members, layers = ranks(view), []
    for rows in view.placement.physical_to_logical:
        new = [list(row) for row in rows]
        everything = sorted({expert for member in members for expert in rows[member]})
        for rank in members:
            lacking = [expert for expert in everything if expert not in new[rank]]
            for expert in random.sample(lacking, min(num_moves, len(lacking))):
                held = [expert for member in members for expert in new[member]]
                spare = [local for local, present in enumerate(new[rank]) if held.count(present) > 1]
                if spare:
                    new[rank][random.choice(spare)] = expert
        layers.append(tuple(tuple(row) for row in new))
    return tuple(layers)


async def ask_until(talk: MonitorTalk, url: str, num_moves: int, every_s: float, end: float) -> None:
    """One migration after the other; without moves only the questions, which cost the machine something too."""
    random = Random(num_moves)
    while time.monotonic() < end:
        started = time.monotonic()
        view = await asyncio.to_thread(talk.view)
        if num_moves:
            talk.send(talk.plan(view, shuffled(view, num_moves, random)))
        while time.monotonic() < min(end, started + _GIVE_UP_S):
            placement = (await asyncio.to_thread(fetch_cluster, url))["placement"]
            is_done = placement["version"] > view.placement.version or not num_moves
            if is_done and time.monotonic() - started >= max(every_s, _POLL_S):
                break
            await asyncio.sleep(_POLL_S)


def gaps_in(records: list[dict[str, Any]], window: tuple[float, float]) -> list[float]:
    """Between tokens of one stream, which come after every round, both in the window, in seconds."""
    start, end = window
    return [b - a for record in records for a, b in pairwise(record["times"]) if start <= a and b <= end]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    windows: list[tuple[bool, tuple[float, float]]] = []
    with tempfile.TemporaryDirectory(prefix="regrow-migration-") as directory:
        base = Path(directory)
        (base / "bodies.json").write_text(json.dumps(bodies_for(arguments.model.name, arguments.streams, MAX_TOKENS)))
        (base / "config.toml").write_text(CONFIG.format(bandwidth=arguments.bandwidth_bytes_per_s))
        with temporary_cluster(base / "run", arguments.model, 4, 1, "--config", str(base / "config.toml")) as url:
            talk = MonitorTalk(monitor_address(base / "run"))
            calm = LoadGenerator(url, base / "bodies.json", base / "calm.json", arguments.streams)
            time.sleep(arguments.calm_s)
            expected = {record["body"]: record for record in calm.finish()}
            load = LoadGenerator(url, base / "bodies.json", base / "load.json", arguments.streams)
            time.sleep(2.0)
            for number in range(2 * arguments.windows):
                start = time.monotonic()
                end = start + arguments.window_s
                num_moves = arguments.moves if number % 2 else 0
                asyncio.run(ask_until(talk, url, num_moves, arguments.every_s, end))
                windows.append((bool(number % 2), (start, time.monotonic())))
            records = load.finish()
            placement = fetch_cluster(url)["placement"]
            talk.close()
    return summary(records, expected, windows, placement)


def summary(
    records: list[dict[str, Any]],
    expected: dict[int, dict[str, Any]],
    windows: list[tuple[bool, tuple[float, float]]],
    placement: dict[str, Any],
) -> dict[str, Any]:
    """Percentiles are over all gaps of the windows of a kind; also window by window, since machines are noisy."""
    figures: dict[str, Any] = {
        "requests": len(records),
        "completed": sum(not record["error"] for record in records),
        "equal_to_undisturbed": sum(_same(record, expected.get(record["body"])) for record in records),
        "migrations_in_force": placement["migrations"]["in_force"],
        "migrations_abandoned": placement["migrations"]["abandoned"],
        "moved_experts": placement["moved_experts"],
        "copied_bytes": placement["expert_bytes_copied"],
        "bad_copies": placement["bad_expert_copies"],
    }
    for name, kind in (("without", False), ("with", True)):
        gaps = [gaps_in(records, window) for has_moves, window in windows if has_moves is kind]
        flat = np.array([gap for window in gaps for gap in window])
        figures[name] = {
            "tokens": len(flat),
            "gap_p50_ms": round(1e3 * float(np.percentile(flat, 50)), 2),
            "gap_p99_ms": round(1e3 * float(np.percentile(flat, 99)), 2),
            "largest_gap_ms": round(1e3 * float(flat.max()), 2),
            "p99_of_windows_ms": [round(1e3 * float(np.percentile(window, 99)), 2) for window in gaps],
        }
    moving_s = sum(end - start for has_moves, (start, end) in windows if has_moves)
    figures["migrations_per_s"] = round(placement["migrations"]["in_force"] / moving_s, 2)
    figures["p99_ratio"] = round(figures["with"]["gap_p99_ms"] / figures["without"]["gap_p99_ms"], 3)
    figures["largest_gap_difference_ms"] = round(
        figures["with"]["largest_gap_ms"] - figures["without"]["largest_gap_ms"], 2
    )
    return figures


def _same(record: dict[str, Any], undisturbed: dict[str, Any] | None) -> bool:
    keys = ("text", "logprobs", "finish")
    return undisturbed is not None and all(record[key] == undisturbed[key] for key in keys)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=5, help="of each kind")
    parser.add_argument("--window-s", type=float, default=8.0)
    parser.add_argument("--calm-s", type=float, default=15.0, help="length of the run that streams are compared with")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--moves", type=int, default=4, help="experts that each rank gets in each layer, per migration")
    parser.add_argument("--every-s", type=float, default=0.0, help="from one migration to the next; 0: back to back")
    parser.add_argument("--bandwidth-bytes-per-s", type=float, default=64e6)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "fixtures" / "tiny-random")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/migration_cpu.json"))
    arguments = parser.parse_args()
    origin = provenance()
    figures = measure(arguments)
    names = ("windows", "window_s", "streams", "moves", "every_s", "bandwidth_bytes_per_s")
    settings = {name: getattr(arguments, name) for name in names}
    body = {**origin, "model": arguments.model.name, **settings, "figures": figures}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    return 0 if figures["requests"] == figures["completed"] == figures["equal_to_undisturbed"] else 1


if __name__ == "__main__":
    sys.exit(main())
