"""Fault-free serving: tokens/s, time to first token, time of a token, against one process without services.

    python -m benchmarks.serving [--model DIR] [--ranks 1 2 4] [--streams 1 8 32 64] [--seconds 8] [--routers 1]
        [--output PREFIX]

The load generator runs in a process of its own; the baseline is the same model code in one process, one batch, at its
best number of threads, measured in the same run. Writes PREFIX.json and PREFIX.md.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.failover_report import percentile, rate
from benchmarks.load_generator import ROOT, LoadGenerator, bodies_for
from benchmarks.provenance import provenance, results_path
from common.process_table import processes_of
from services.cli.temporary_cluster import temporary_cluster

MAX_TOKENS = 240
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def baseline(model: Path, num_streams: int, seconds: float) -> dict[str, float]:
    """Tokens per second by number of threads."""
    result = {}
    for threads in (1, 2):
        command = [sys.executable, "-m", "benchmarks.one_process_baseline", str(model)]
        command += ["--streams", str(num_streams), "--threads", str(threads), "--seconds", str(seconds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
        result[str(threads)] = float(done.stdout)
    return result


def processor_seconds(run_dir: Path) -> dict[str, float]:
    """Processor time so far of each kind of process: the largest of one process."""
    used: dict[str, float] = {}
    for process in processes_of(run_dir):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        used[process.kind] = max(used.get(process.kind, 0.0), seconds)
    return used


def measure(url: str, run_dir: Path, base: Path, num_streams: int, seconds: float) -> dict[str, Any]:
    """One row: ``seconds`` in the middle of a run of that many streams. A piece has the tokens of all rounds since the
    last one (``decode.delivery_interval_s``); "a token" is the mean time of a stream's tokens but the first."""
    load = LoadGenerator(url, base / "bodies.json", base / "records.json", num_streams)
    time.sleep(1.5)
    start, used = time.monotonic(), processor_seconds(run_dir)
    time.sleep(seconds)
    end, used_after = time.monotonic(), processor_seconds(run_dir)
    records = load.finish()
    errors = [record["error"] for record in records if record["error"]]
    if errors:
        raise RuntimeError(f"a request failed without a fault: {errors[0]}")
    times = [record["times"] for record in records]
    whole = [record for record in records if start <= record["times"][0] and record["times"][-1] <= end] or records
    paces = [(r["times"][-1] - r["times"][0]) / (sum(r["sizes"]) - r["sizes"][0]) for r in whole]
    gaps = [b - a for of_one in times for a, b in itertools.pairwise(of_one) if start <= a and b <= end]
    # The first request of each stream starts with all others at once: later ones show the steady state.
    first = [record["times"][0] - record["sent"] for record in records if record["sent"] >= start] or [
        record["times"][0] - record["sent"] for record in records
    ]
    share = {kind: (used_after[kind] - used.get(kind, 0.0)) / (end - start) for kind in used_after}
    return {
        "tokens_per_s": rate(records, start, end),
        "first_token_ms_p50": 1000 * percentile(first, 0.5),
        "first_token_ms_p99": 1000 * percentile(first, 0.99),
        "a_token_ms_p50": 1000 * percentile(paces, 0.5),
        "between_pieces_ms_p50": 1000 * percentile(gaps, 0.5),
        "between_pieces_ms_p99": 1000 * percentile(gaps, 0.99),
        "cores": {kind: round(value, 3) for kind, value in sorted(share.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "abacus")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=results_path("serving_cpu"))
    arguments = parser.parse_args()
    origin = provenance()
    alone = {count: baseline(arguments.model, count, arguments.seconds / 2) for count in arguments.streams}
    rows = []
    for num_ranks in arguments.ranks:
        with tempfile.TemporaryDirectory(prefix="regrow-serving-") as directory:
            base = Path(directory)
            (base / "bodies.json").write_text(json.dumps(bodies_for(arguments.model.name, 64, MAX_TOKENS)))
            routers = ("--routers", str(arguments.routers))
            with temporary_cluster(base / "run", arguments.model, num_ranks, 1, *routers) as url:
                for count in arguments.streams:
                    row = measure(url, base / "run", base, count, arguments.seconds)
                    best = max(alone[count].values())
                    rows.append({"ranks": num_ranks, "streams": count, **row, "share": row["tokens_per_s"] / best})
                    print(rows[-1], flush=True)
    text = report(origin, alone, rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text(text)
    body = {**origin, "baseline_tokens_per_s": alone, "rows": rows}
    arguments.output.with_suffix(".json").write_text(json.dumps(body, indent=1) + "\n")
    print(text)


def report(origin: dict[str, str], alone: dict[int, dict[str, float]], rows: list[dict[str, Any]]) -> str:
    lines = ["# Serving without faults", "", *(f"- {key.replace('_', ' ')}: {value}" for key, value in origin.items())]
    lines += ["", "One process, one batch, no services (tokens/s by number of threads):", ""]
    lines += [f"- {count} streams: " + ", ".join(f"{n}: {v:.0f}" for n, v in of.items()) for count, of in alone.items()]
    lines += [
        "",
        "| ranks | streams | tokens/s | share of one process | first token p50, p99 | a token | pieces p50, p99 |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        first = f"{row['first_token_ms_p50']:.0f}, {row['first_token_ms_p99']:.0f} ms"
        between = f"{row['between_pieces_ms_p50']:.1f}, {row['between_pieces_ms_p99']:.1f} ms"
        pace = f"{row['a_token_ms_p50']:.1f} ms"
        speed = f"{row['tokens_per_s']:.0f} | {row['share']:.2f}"
        lines.append(f"| {row['ranks']} | {row['streams']} | {speed} | {first} | {pace} | {between} |")
    lines += ["", "Cores used by the busiest process of each kind:", ""]
    lines += [f"- {row['ranks']} ranks, {row['streams']} streams: {row['cores']}" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
