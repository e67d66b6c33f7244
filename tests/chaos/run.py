"""Faults against a live cluster under load: every stream must be the one of the fault-free run, bit for bit.

    python -m tests.chaos.run --seed 1 --seconds 120 [--seeds 5]

The random checkpoint, greedy and seeded requests, log-probability bits compared. A signal that cannot be proven (the
pid is not gone, not in state T) fails the run, and so does a cluster that is not whole again at the end. A seed that
fails prints its story, the cluster's last events, and the command that gives the same schedule again.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from services.cli.chat_client import Stream
from services.cli.run_directory import monitor_address
from tests.chaos.injector import Injector
from tests.chaos.schedule import Fault, schedule
from tests.cluster.harness import Cluster, outcome, stream_all, varied_bodies

NUM_STREAMS, MAX_TOKENS, NUM_RANKS, NUM_PREFILL = 12, 120, 4, 2
CLUSTER_OPTIONS = ("--decode-ranks", str(NUM_RANKS), "--prefill-workers", str(NUM_PREFILL))
_WHOLE_S = 90.0
_LONG_GAP_S = 8.0  # longer than a deadline and its roll call: worth a look, though nothing was wrong


@dataclass(frozen=True)
class Gap:
    """Between two pieces of a stream, or in front of the first one; seconds since the start of the run."""

    seconds: float
    from_s: float
    stream: str = ""


@dataclass
class Tally:
    """``broken``: streams that ended because their router died. ``asked_again``: answers to the same requests."""

    injector: Injector
    num_streams: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def num_faults(self) -> int:
        return sum(self.injector.num_done.values())

    def compare(self, streams: list[Stream], expected: list[Stream]) -> None:
        started, at = self.injector.witness.started, self.injector.witness.now_s
        for number, (stream, fault_free) in enumerate(zip(streams, expected, strict=True)):
            self.num_streams += 1
            self.gaps.append(_largest_gap(stream, started))
            if stream.error or outcome(stream) != outcome(fault_free):
                what = stream.error or f"differs from the fault-free run after {_num_same(stream, fault_free)} tokens"
                self.wrong.append(f"stream {number} of the round that ended at {at:.2f} s: {what}")


def _num_same(stream: Stream, fault_free: Stream) -> int:
    pairs = zip(stream.logprobs, fault_free.logprobs, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _largest_gap(stream: Stream, started: float) -> Gap:
    gaps = [Gap(after - before, before - started, stream.id) for before, after in pairwise(stream.times)]
    return max(gaps, key=lambda gap: gap.seconds, default=Gap(0.0, 0.0, stream.id))


def is_whole(status: dict[str, Any]) -> bool:
    serving = [entry for entry in status["ranks"] if entry["state"] == "serving"]
    return len(serving) == NUM_RANKS and len(status["prefill"]) == NUM_PREFILL


async def run_chaos(cluster: Cluster, seed: int, seconds: float, tally: Tally) -> None:
    """Rounds of the same requests while faults go on; ends with the first round that ends after ``seconds``."""
    bodies = varied_bodies(NUM_STREAMS, MAX_TOKENS)
    expected = await stream_all(cluster.url, bodies)
    for stream in expected:
        assert (stream.error, stream.finish, len(stream.logprobs)) == ("", "length", MAX_TOKENS)
    async with tally.injector.witness.watching(monitor_address(cluster.run_dir)):
        disturbing = asyncio.create_task(_disturb(tally.injector, schedule(seed), time.monotonic() + seconds))
        try:
            while not disturbing.done():
                tally.compare(await stream_all(cluster.url, bodies), expected)
            await disturbing
        finally:
            disturbing.cancel()
        await tally.injector.undo_all()
        await cluster.wait_status(is_whole, _WHOLE_S)


async def _disturb(injector: Injector, groups: Iterator[list[Fault]], end: float) -> None:
    """The faults of a group overlap; the next group comes when all of them are undone."""
    while time.monotonic() < end:
        async with asyncio.TaskGroup() as together:
            for fault in next(groups):
                await asyncio.sleep(fault.after_s)
                together.create_task(injector.inject(fault))


def report(seed: int, tally: Tally) -> str:
    gaps = sorted(gap.seconds for gap in tally.gaps) or [0.0]
    faults = ", ".join(f"{count} x {name}" for name, count in sorted(tally.injector.num_done.items()))
    return (
        f"seed {seed}: {tally.num_streams} streams, {len(tally.wrong)} wrong; largest gap of a stream: "
        f"median {gaps[len(gaps) // 2]:.2f} s, largest {gaps[-1]:.2f} s; {faults}; "
        f"{tally.injector.num_refused} events refused"
    )


def new_tally(cluster: Cluster) -> Tally:
    return Tally(Injector(cluster, (NUM_RANKS, NUM_PREFILL)))


def run_seed(seed: int, seconds: float) -> bool:
    """Whether all was well."""
    with tempfile.TemporaryDirectory(prefix="regrow-chaos-") as directory:
        cluster, failure = Cluster(Path(directory).resolve() / "run", *CLUSTER_OPTIONS), ""
        try:
            cluster.wait_ready()
            tally = new_tally(cluster)
            try:
                asyncio.run(run_chaos(cluster, seed, seconds, tally))
            except (AssertionError, ExceptionGroup) as error:
                failure = f"seed {seed}: {error!r}"
            if failure or tally.wrong:
                print("\n".join(["story:", *tally.injector.witness.story(), cluster.logs(4000)]))
            print("\n".join(explain_gaps(cluster, tally)))
        finally:
            cluster.stop()
    print("\n".join(filter(None, [failure, *tally.wrong, report(seed, tally)])), flush=True)
    if failure or tally.wrong:
        print(f"again: python -m tests.chaos.run --seed {seed} --seconds {seconds:g}", flush=True)
    return not failure and not tally.wrong


def explain_gaps(cluster: Cluster, tally: Tally) -> list[str]:
    """What happened around the longest gap, and what the routers say of that stream, if it is worth a look."""
    gap = max(tally.gaps, key=lambda gap: gap.seconds, default=Gap(0.0, 0.0))
    if gap.seconds < _LONG_GAP_S:
        return []
    request = gap.stream.partition("-")[2]
    logs = [line for path in cluster.run_dir.glob("logs/router-*") for line in path.read_text().splitlines()]
    heading = f"a stream waited {gap.seconds:.2f} s, from {gap.from_s:.2f} s on:"
    story = tally.injector.witness.story(gap.from_s, gap.from_s + gap.seconds)
    return [heading, *story, *[line for line in logs if request and request in line]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--seeds", type=int, default=1, help="so many, from --seed on, each against a cluster of its own"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="for each seed")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    return 0 if all([run_seed(seed, arguments.seconds) for seed in seeds]) else 1


if __name__ == "__main__":
    sys.exit(main())
