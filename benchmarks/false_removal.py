"""Does anybody lose its place for being slow? Full load while every core is busy with something else as well.

    python -m benchmarks.false_removal [--seconds 600] [--streams 32] [--hogs 2] [--output PREFIX]

No fault is injected, so every removal is a false one, and fails the run; so does a stream that differs from the first
run. ``--hogs`` processes compute without a pause at the same priority, one for each core by default.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.failover import MAX_TOKENS, NUM_BODIES, ROOT
from benchmarks.failover_report import Window, gaps_within, is_perfect, percentile, rate, table, verdict
from benchmarks.load_generator import LoadGenerator, bodies_for
from benchmarks.provenance import provenance, results_path
from common.bus import BusSubscriber
from common.monitor_address import MonitorAddress
from common.transport import open_context
from services.cli.run_directory import monitor_address
from services.cli.temporary_cluster import temporary_cluster

_ALARMING = ("removed", "roll_call", "late_tick", "exited", "restarted", "degraded", "term")


def _hog() -> None:
    while True:
        sum(range(10_000))


@contextlib.contextmanager
def hogs(number: int) -> Iterator[None]:
    processes = [multiprocessing.get_context("spawn").Process(target=_hog, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


async def count_events(address: MonitorAddress, seconds: float) -> dict[str, int]:
    """How many events of each alarming kind the monitor told in that time."""
    counts = dict.fromkeys(_ALARMING, 0)
    with open_context(address.key) as context, contextlib.suppress(TimeoutError):
        bus = BusSubscriber(context, address, ("event",))
        async with asyncio.timeout(seconds):
            while True:
                event = msgspec.msgpack.decode((await bus.receive_raw())[1])
                if event.get("kind") in counts:
                    counts[event["kind"]] += 1
                    print(event, flush=True)
    return counts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    origin, model = provenance(), ROOT / "tests" / "fixtures" / "tiny-random"
    with tempfile.TemporaryDirectory(prefix="regrow-soak-") as directory:
        base = Path(directory).resolve()
        bodies = base / "bodies.json"
        bodies.write_text(json.dumps(bodies_for(model.name, NUM_BODIES, MAX_TOKENS)))
        with temporary_cluster(base / "run", model, 4, 2) as url:
            calm = LoadGenerator(url, bodies, base / "calm.json", options.streams)
            time.sleep(options.calm_s)
            expected = calm.finish()
            assert {record["body"] for record in expected} == set(range(NUM_BODIES)), "raise --calm-s"
            with hogs(options.hogs):
                start = time.monotonic()
                load = LoadGenerator(url, bodies, base / "load.json", options.streams)
                events = asyncio.run(count_events(monitor_address(base / "run"), options.seconds))
                loadavg = os.getloadavg()[0]
                records = load.finish()
                span = (start, time.monotonic())
    gaps = gaps_within(records, Window("soak", True, *span))
    figures = {
        **verdict(records, expected),
        **{f"events {kind}": number for kind, number in events.items()},
        "seconds": round(span[1] - span[0]),
        "load_average_at_the_end": loadavg,
        "tokens_per_s_without_hogs": rate(expected, expected[0]["sent"], expected[-1]["times"][-1]),
        "tokens_per_s": rate(records, *span),
        "gap_s p99": percentile(gaps, 0.99),
        "gap_s max": max(gaps),
    }
    text = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in origin.items())
    report = f"# False removals\n\n{text}\n- {options.streams} streams, {options.hogs} hogs\n\n{table(figures)}\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(report)
    options.output.with_suffix(".json").write_text(json.dumps({**origin, "figures": figures}, indent=1) + "\n")
    print(report)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--hogs", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--calm-s", type=float, default=30.0, help="length of the run that is compared with")
    parser.add_argument("--output", type=Path, default=results_path("false_removal_cpu"))
    figures = measure(parser.parse_args())
    return 0 if is_perfect(figures) and figures["events removed"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
