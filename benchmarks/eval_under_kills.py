"""The accuracy of the embedded model while ranks are killed: ``regrow eval --kill-every`` with a cluster of its own.

python -m benchmarks.eval_under_kills [--count 1000] [--kill-every 5] [--ranks 4] [--output FILE.md]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.provenance import provenance, results_path
from services.cli.temporary_cluster import temporary_cluster

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "abacus"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="problems of each kind")
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--output", type=Path, default=results_path("eval_under_kills_cpu", ".md"))
    options = parser.parse_args()
    origin, started = provenance(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="regrow-eval-") as directory:
        run_dir = Path(directory).resolve() / "run"
        with temporary_cluster(run_dir, MODEL, options.ranks, 2):
            command = [sys.executable, "-m", "services.cli", "eval", "--run-dir", str(run_dir)]
            command += ["--count", str(options.count), "--concurrency", str(options.concurrency)]
            command += ["--kill-every", f"{options.kill_every:g}"]
            environment = os.environ | {"COLUMNS": "100"}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in origin.items()]
    lines += [f"- took: {time.monotonic() - started:.0f} s, first without kills, then with them", ""]
    report = "\n".join(["# Accuracy while ranks are killed", "", *lines, "```", done.stdout.rstrip(), "```", ""])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report)
    print(report)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
