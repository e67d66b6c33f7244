"""``python -m tests.simulation.run SEED``: tells the story of one seed. With ``--to SEED``: runs a range of them.

Exit code 0: every promise was kept; 1: the first seed that broke one is told.
"""

import argparse
import sys
import time
import traceback

import torch

from tests.simulation.plots import PLOTS
from tests.simulation.story import Story


def run_seed(seed: int, plot: str = "") -> tuple[Story, str]:
    """The story, and what broke, "" if nothing."""
    story = Story(seed, plot)
    try:
        story.run()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return story, f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}:{where.lineno})"
    return story, ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.run", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--to", type=int, help="run the seeds from SEED to here, both included")
    parser.add_argument("--plot", choices=PLOTS, default="", help="what the stories are about; without: anything")
    parser.add_argument("--quiet", action="store_true", help="no story of what failed")
    parser.add_argument("--all", action="store_true", help="go on after a failure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, failures, last = time.process_time(), 0, args.seed if args.to is None else args.to
    for seed in range(args.seed, last + 1):
        story, broken = run_seed(seed, args.plot)
        if args.to is None or (broken and not args.quiet):
            print("\n".join(story.world.story()))
        if broken:
            print(f"seed {seed} at {story.world.now:.3f}: {broken}", flush=True)
            failures += 1
            if not args.all:
                break
    print(f"{seed - args.seed + 1} seeds, {failures} broken, {time.process_time() - started:.1f} s of processor time")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
