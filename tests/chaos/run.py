"""Faults against a live cluster under load: every stream must be the one of the fault-free run, bit for bit.

    python -m tests.chaos.run --seed 1 --seconds 120 [--seeds 5]

The random checkpoint, greedy and seeded requests, log-probability bits compared. A signal that cannot be proven (the
pid is not gone, not in state T) fails the run, and so does a cluster that is not whole again at the end. A seed that
fails prints its story, with the cluster's events, and the command that gives the same schedule again.

Two routers share the port. When one is killed its streams end, as far as they came equal to the fault-free run; each
client asks again, and must get the whole answer. No other stream may end early.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from services.cli.chat_client import Stream
from services.cli.run_directory import monitor_address
from tests.chaos.injector import Injector
from tests.chaos.schedule import Fault, router_schedule, schedule
from tests.cluster.harness import Cluster, outcome, stream_all, varied_bodies

NUM_STREAMS, MAX_TOKENS, NUM_RANKS, NUM_PREFILL, NUM_ROUTERS = 12, 300, 4, 2, 2
CLUSTER_OPTIONS = (
    *("--decode-ranks", str(NUM_RANKS), "--prefill-workers", str(NUM_PREFILL), "--routers", str(NUM_ROUTERS)),
)
CONFIG = "[router]\ndrain_s = 120.0\n"  # a router that is replaced ends its streams, also those that wait for a repair
_RESTARTED_S = 30.0  # until then nobody may listen, if the other router is leaving
_WHOLE_S = 90.0
_CONNECTION_LOST = ("Client", "Server", "the stream ended without")  # names of aiohttp's errors
_LONG_GAP_S = 8.0  # longer than a deadline and its roll call: worth a look, though nothing was wrong


@dataclass(frozen=True)
class Gap:
    """Between two pieces of a stream, or in front of the first one; seconds since the start of the run."""

    seconds: float
    from_s: float
    stream: str = ""


@dataclass
class Tally:
    """``broken_of``: by router (what its request ids begin with), streams that ended because it was killed; those that
    had no answer yet are under ""."""

    injector: Injector
    num_streams: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    broken_of: Counter[str] = field(default_factory=Counter)

    @property
    def num_faults(self) -> int:
        return sum(self.injector.num_done.values())

    def compare(self, streams: list[Stream], expected: list[Stream], since_s: float) -> list[Stream]:
        """Of requests sent after ``since_s``. Returns the fault-free ones of those to be asked again."""
        started, at = self.injector.witness.started, self.injector.witness.now_s
        again: list[Stream] = []
        for number, (stream, fault_free) in enumerate(zip(streams, expected, strict=True)):
            self.num_streams += 1
            self.gaps.append(_largest_gap(stream, started))
            if stream.error and self._lost_its_router(stream, since_s) and _is_begun(stream, fault_free):
                again.append(fault_free)
            elif stream.error or outcome(stream) != outcome(fault_free):
                what = stream.error or f"differs from the fault-free run after {_num_same(stream, fault_free)} tokens"
                self.wrong.append(f"stream {number} of the round that ended at {at:.2f} s: {what}")
        return again

    def _lost_its_router(self, stream: Stream, since_s: float) -> bool:
        """Its connection broke, a router was killed while it was open, and no more routers lost streams than died. (Who
        had no answer yet may have been refused, too.)"""
        router = stream.id.partition("-")[2].partition(".")[0]
        since_s -= 0.0 if router else _RESTARTED_S
        num_kills = len(self.injector.router_kills)
        if not stream.error.startswith(_CONNECTION_LOST) or not any(at >= since_s for at in self.injector.router_kills):
            return False
        self.broken_of[router] += 1
        return len(self.broken_of.keys() - {""}) <= num_kills


def _is_begun(stream: Stream, fault_free: Stream) -> bool:
    num_same = _num_same(stream, fault_free)
    return num_same == len(stream.logprobs) and fault_free.text.startswith(stream.text)


def _num_same(stream: Stream, fault_free: Stream) -> int:
    pairs = zip(stream.logprobs, fault_free.logprobs, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _largest_gap(stream: Stream, started: float) -> Gap:
    gaps = [Gap(after - before, before - started, stream.id) for before, after in pairwise(stream.times)]
    return max(gaps, key=lambda gap: gap.seconds, default=Gap(0.0, 0.0, stream.id))


def is_whole(status: dict[str, Any]) -> bool:
    serving = [entry for entry in status["ranks"] if entry["state"] == "serving"]
    routers = [entry for entry in status["services"] if entry["kind"] == "router" and entry["state"] == "up"]
    return (len(serving), len(status["prefill"]), len(routers)) == (NUM_RANKS, NUM_PREFILL, NUM_ROUTERS)


async def run_chaos(cluster: Cluster, seed: int, seconds: float, tally: Tally) -> None:
    """Rounds of the same requests while faults go on; ends with the first round that ends after ``seconds``."""
    bodies = varied_bodies(NUM_STREAMS, MAX_TOKENS)
    expected = await stream_all(cluster.url, bodies)
    for stream in expected:
        assert (stream.error, stream.finish, len(stream.logprobs)) == ("", "length", MAX_TOKENS)
    async with tally.injector.witness.watching(monitor_address(cluster.run_dir)):
        end = time.monotonic() + seconds
        disturbing = asyncio.gather(
            *(_disturb(tally.injector, faults, end) for faults in (schedule(seed), router_schedule(seed)))
        )
        try:
            while not disturbing.done():
                await _ask_until_answered(cluster, expected, tally)
            await disturbing
        finally:
            disturbing.cancel()
        await tally.injector.undo_all()
        await cluster.wait_status(is_whole, _WHOLE_S)


async def _ask_until_answered(cluster: Cluster, expected: list[Stream], tally: Tally) -> None:
    wanted = expected
    while wanted:
        since_s = tally.injector.witness.now_s
        streams = await stream_all(cluster.url, [stream.body for stream in wanted])
        wanted = tally.compare(streams, wanted, since_s)
        await asyncio.sleep(0.1 if wanted else 0.0)


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
        f"{tally.injector.num_refused} events refused; "
        f"{sum(tally.broken_of.values())} streams ended with their router and were asked again"
    )


def new_tally(cluster: Cluster) -> Tally:
    return Tally(Injector(cluster, (NUM_RANKS, NUM_PREFILL)))


def run_seed(seed: int, seconds: float, num_standbys: int = 0) -> tuple[bool, list[str]]:
    """Whether all was well, and what there is to say of it."""
    config, failure = f"{CONFIG}[decode]\nnum_standbys = {num_standbys}\n", ""
    with tempfile.TemporaryDirectory(prefix="regrow-chaos-") as directory:
        cluster = Cluster(Path(directory).resolve() / "run", *CLUSTER_OPTIONS, config=config)
        try:
            cluster.wait_ready()
            tally = new_tally(cluster)
            try:
                asyncio.run(run_chaos(cluster, seed, seconds, tally))
            except (AssertionError, ExceptionGroup) as error:
                failure = f"seed {seed}: {error!r}"
            if failure or tally.wrong:
                print("\n".join(["story:", *tally.injector.witness.story(), cluster.logs(4000)]))
            said = [failure, *tally.wrong, report(seed, tally), *explain_gaps(cluster, tally)]
        finally:
            cluster.stop()
    print("\n".join(filter(None, said)), flush=True)
    if failure or tally.wrong:
        again = f"--seed {seed} --seconds {seconds:g} --standbys {num_standbys}"
        print(f"again: python -m tests.chaos.run {again}", flush=True)
    return not failure and not tally.wrong, list(filter(None, said))


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
    parser.add_argument("--standbys", type=int, default=0, help="decode processes kept warm beside the ranks")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="keep what was found")
    arguments = parser.parse_args()
    origin, is_well, found = provenance(), True, []
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        is_well_too, said = run_seed(seed, arguments.seconds, arguments.standbys)
        is_well = is_well and is_well_too
        found += ["", said[0], "", "```", *said[1:], "```"] if said[1:] else ["", *said]
    if arguments.output:
        text = [f"- {key.replace('_', ' ')}: {value}" for key, value in origin.items()]
        arguments.output.write_text("\n".join(["# Chaos", "", *text, *found, ""]))
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
