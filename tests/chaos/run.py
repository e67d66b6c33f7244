"""Faults against a live cluster under load: every stream must be the one of the fault-free run, bit for bit.

    python -m tests.chaos.run --seed 1 --seconds 120

The random checkpoint, greedy and seeded requests, log-probability bits compared. A fault that cannot be proven (the pid
is not gone, not in state T) fails the run, and so does a cluster that is not whole again at the end.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.cli.chat_client import Stream
from tests.chaos.schedule import Fault, schedule
from tests.cluster.harness import Cluster, outcome, processes_of, stream_all, varied_bodies

NUM_STREAMS, MAX_TOKENS, NUM_RANKS = 12, 120, 4
_WHOLE_S, _PROOF_S = 90.0, 5.0


@dataclass
class Tally:
    faults: dict[str, int] = field(default_factory=dict)
    num_streams: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)


def serving(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in status["ranks"] if entry["state"] == "serving"]


def is_whole(status: dict[str, Any]) -> bool:
    return len(serving(status)) == NUM_RANKS and len(status["prefill"]) == 2


def targets(cluster: Cluster, kind: str) -> list[int]:
    """Pids, from the command lines of the cluster's processes: the monitor need not be there to ask."""
    found = []
    for pid, command in processes_of(cluster.run_dir):
        module = next((word for word in command.split() if word.startswith("services.")), "")
        # The router's streams live in its process; regrow up is the operator.
        if module in ("services.router", "services.cli"):
            continue
        if module == f"services.{kind}" or (kind == "everything" and module):
            found.append(pid)
    return sorted(found)


def state_of(pid: int) -> str:
    """The kernel's letter for the process (T = stopped), "" when it is gone or a zombie."""
    with contextlib.suppress(OSError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if letter == "Z" else letter
    return ""


async def inject(cluster: Cluster, fault: Fault, tally: Tally) -> None:
    pids = targets(cluster, fault.kind)
    if not pids:
        return
    chosen = pids if fault.kind == "everything" else [pids[int(fault.pick * len(pids))]]
    wanted, number = ("", signal.SIGKILL) if fault.action == "kill" else ("T", signal.SIGSTOP)
    hit = []
    for pid in chosen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            hit.append(pid)
    deadline = time.monotonic() + _PROOF_S
    while any(state_of(pid) not in (wanted, "") for pid in hit):
        assert time.monotonic() < deadline, f"{fault} did not take effect on {hit}"
        await asyncio.sleep(0.005)
    name = f"{fault.action} {fault.kind}"
    tally.faults[name] = tally.faults.get(name, 0) + 1
    if fault.action == "stop":
        await asyncio.sleep(fault.stop_s)
        for pid in hit:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def run_chaos(cluster: Cluster, seed: int, seconds: float) -> Tally:
    """Rounds of the same requests while faults go on; ends with the first round that ends after ``seconds``."""
    bodies = varied_bodies(NUM_STREAMS, MAX_TOKENS)
    expected = await stream_all(cluster.url, bodies)
    assert all(stream.finish == "length" for stream in expected), [stream.error for stream in expected]
    tally, faults, end = Tally(), schedule(seed), time.monotonic() + seconds

    async def disturb(streams: list[Stream]) -> None:
        while not all(stream.is_over for stream in streams):
            fault = next(faults)
            await asyncio.sleep(fault.after_s)
            await inject(cluster, fault, tally)

    while time.monotonic() < end:
        streams = await stream_all(cluster.url, bodies, disturb)
        for number, (stream, fault_free) in enumerate(zip(streams, expected, strict=True)):
            tally.num_streams += 1
            tally.gaps_s.append(stream.largest_gap_s(0.0))
            if stream.error or outcome(stream) != outcome(fault_free):
                tally.wrong.append(f"stream {number}: {stream.error or 'differs from the fault-free run'}")
    await cluster.wait_status(is_whole, _WHOLE_S)
    return tally


def report(seed: int, tally: Tally) -> str:
    gaps = sorted(tally.gaps_s)
    faults = ", ".join(f"{count} x {name}" for name, count in sorted(tally.faults.items()))
    return (
        f"seed {seed}: {tally.num_streams} streams, {len(tally.wrong)} wrong; largest gap of a stream: "
        f"median {gaps[len(gaps) // 2]:.2f} s, largest {gaps[-1]:.2f} s; {faults}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="regrow-chaos-") as directory:
        cluster = Cluster(Path(directory) / "run", "--decode-ranks", str(NUM_RANKS), "--prefill-workers", "2")
        try:
            cluster.wait_ready()
            tally = asyncio.run(run_chaos(cluster, arguments.seed, arguments.seconds))
            if tally.wrong:
                print(cluster.logs(4000))
        finally:
            cluster.stop()
    print("\n".join([*tally.wrong, report(arguments.seed, tally)]))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
