"""``python -m tests.simulation.campaign``: thousands of stories on all cores, and every mutant. Can be interrupted.

Results are lines of a file named after the digest of everything that a story depends on, so a second run goes on where
the first one ended, and code that has changed starts anew.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tests.simulation.mutant_list import MUTANTS
from tests.simulation.mutants import ROOT, catch

_CHUNK = 10
_COUNTS = "counts-"  # and the first seed of a chunk
_SOURCES = ("common", "kernels", "services", "tests/simulation")


def digest_of_sources(root: Path) -> str:
    digest = hashlib.sha256()
    for package in _SOURCES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def run_chunk(seeds: list[int]) -> tuple[list[tuple[int, str]], dict[str, int]]:
    """What broke in each, and what happened in all of them together."""
    import torch

    from tests.simulation.run import run_seed

    torch.set_num_threads(1)
    results = []
    counts: Counter[str] = Counter()
    for seed in seeds:
        story, broken = run_seed(seed)
        counts += story.checker.counts
        counts.update({f"fault: {kind}": number for kind, number in story.world.num_faults.items()})
        results.append((seed, f"at {story.world.now:.3f}: {broken}".replace("\n", " ") if broken else ""))
    return results, dict(counts)


def run_mutant(name: str) -> tuple[str, str]:
    return name, catch(next(mutant for mutant in MUTANTS if mutant.name == name))


def read_results(file: Path) -> dict[str, str]:
    """key -> what was found there; the last line may be half a one."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return {key: text for key, _, text in (line.partition(" ") for line in lines)}


def _chunks(seeds: Iterable[int]) -> Iterator[list[int]]:
    iterator = iter(seeds)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


class Campaign:
    def __init__(self, file: Path, jobs: int) -> None:
        self._file, self._jobs = file, jobs
        self.results = read_results(file)

    def run(self, num_seeds: int, mutants: list[str]) -> None:
        todo = [seed for seed in range(num_seeds) if str(seed) not in self.results]
        missing = [name for name in mutants if name not in self.results]
        started, num_done = time.monotonic(), 0
        context = multiprocessing.get_context("spawn")
        with context.Pool(self._jobs, _ignore_interrupts) as pool, self._file.open("a") as out:
            for found, counts in pool.imap_unordered(run_chunk, _chunks(todo)):
                self._note(out, f"{_COUNTS}{found[0][0]}", json.dumps(counts))
                for seed, broken in found:
                    self._note(out, str(seed), broken)
                    if broken:
                        print(f"seed {seed} {broken}", flush=True)
                num_done += len(found)
                if num_done % (50 * _CHUNK) == 0:
                    print(f"{num_done} of {len(todo)} stories, {time.monotonic() - started:.0f} s", flush=True)
            for name, caught in pool.imap_unordered(run_mutant, missing):
                self._note(out, name, caught)
                print(f"mutant {name}: {caught or 'NOT CAUGHT'}", flush=True)

    @property
    def num_stories(self) -> int:
        return sum(key.isdecimal() for key in self.results)

    def _note(self, out: TextIO, key: str, text: str) -> None:
        self.results[key] = text
        print(f"{key} {text}", file=out, flush=True)


def summary(results: dict[str, str]) -> list[str]:
    """What happened in all stories that have been run."""
    total: Counter[str] = Counter()
    for key, text in results.items():
        if key.startswith(_COUNTS):
            total.update(json.loads(text))
    return [f"{number:9d} {what}" for what, number in sorted(total.items())]


def _ignore_interrupts() -> None:
    """Ctrl-C is for the parent, which ends the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.campaign", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-mutants", action="store_true")
    args = parser.parse_args()
    directory = ROOT / "build" / "chaos-sim"
    directory.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(directory / f"{digest_of_sources(ROOT)}.txt", args.jobs)
    names = [] if args.no_mutants else [mutant.name for mutant in MUTANTS]
    try:
        campaign.run(args.seeds, names)
    except KeyboardInterrupt:
        print("\n".join(summary(campaign.results)))
        print(f"interrupted after {campaign.num_stories} stories; the same command goes on from here")
        return 1
    print("\n".join(summary(campaign.results)))
    broken = [seed for seed in range(args.seeds) if campaign.results[str(seed)]]
    missed = [name for name in names if not campaign.results[name]]
    for seed in broken:
        print(f"seed {seed} {campaign.results[str(seed)]}")
    print(f"{args.seeds} stories, {len(broken)} broken; {len(names) - len(missed)} of {len(names)} mutants caught")
    if missed:
        print(f"not caught: {', '.join(missed)}")
    return 1 if broken or missed else 0


if __name__ == "__main__":
    sys.exit(main())
