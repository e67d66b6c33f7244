"""Elastic EP kernels on the GPUs of this host: correctness, faults, timing.

    python -m benchmarks.kernels.elastic [--section correctness|faults|timing|tune] [--ranks N]

One process a rank; with one GPU the ranks share it (then timings mean nothing: the contexts take turns).
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.rank_pool import RankProcess, call_all
from kernels.symmetric_memory.fd_holder import FdHolder

SHAPES = {
    "h7168 e256 k8": ({"max_tokens": 128, "top_k": 8, "hidden_size": 7168}, 256),
    "h2048 e64 k6": ({"max_tokens": 128, "top_k": 6, "hidden_size": 2048}, 64),
}
TOKENS = (1, 16, 64, 128)
GOALS = {
    "dispatch": (7.0, 7.5, 9.0, 12.0),
    "reduced": (8.0, 9.0, 11.0, 13.5),
    "ordered": (12.0, 14.0, 20.0, 33.0),
}
NUM_CYCLES = 20
KILL_DEADLINE_S = 0.3
SHARED_KILL_DEADLINE_S = 2.0


def show(title: str, **facts: Any) -> None:
    print(title, json.dumps(facts), flush=True)


class Bench:
    def __init__(self, holder: Path, num_ranks: int, num_devices: int) -> None:
        self.holder, self.num_ranks, self.num_devices = holder, num_ranks, num_devices
        self.ranks = [self.spawn(rank) for rank in range(num_ranks)]
        self.num_made = 0
        self.epoch = 0

    def spawn(self, rank: int) -> RankProcess:
        return RankProcess(rank % self.num_devices, self.holder)

    def settings(self, shape: str, rank: int, attach: bool = False) -> dict[str, Any]:
        sizes, num_experts = SHAPES[shape]
        return {
            "shape": {"max_ranks": self.num_ranks, **sizes},
            "rank": rank,
            "num_ranks": self.num_ranks,
            "num_experts": num_experts,
            "name": f"heap{self.num_made}-",
            "attach": attach,
        }

    def form(self, shape: str) -> None:
        """New heaps and groups of all ranks, in the next epoch, past the first header."""
        self.num_made += 1
        for rank, process in enumerate(self.ranks):
            process.start("make", **self.settings(shape, rank))
        for process in self.ranks:
            process.finish()
        for rank, process in enumerate(self.ranks):
            for peer in range(self.num_ranks):
                if peer != rank:
                    process.call("map_rank", rank=peer)
        self.enter(list(range(self.num_ranks)))

    def enter(self, members: list[int]) -> None:
        self.epoch += 1
        chosen = [self.ranks[member] for member in members]
        call_all(chosen, "adopt", epoch=self.epoch, members=members)
        headers = call_all(chosen, "allgather")
        wanted = [[100 * r, 100 * r + 1] if r in members else [0, 0] for r in range(self.num_ranks)] * 2
        if any(header != wanted for header in headers):
            raise RuntimeError(f"wrong headers {headers}")

    def correctness(self) -> None:
        for shape in SHAPES:
            self.form(shape)
            for counts in ((1, 1), (16, 16), (128, 128), (77, 3), (0, 128), (128, 0)):
                for drop in (0.0, 0.3):
                    for rank, process in enumerate(self.ranks):
                        process.start("check", num_tokens=counts[rank % 2], drop=drop)
                    found = [process.finish() for process in self.ranks]
                    worst = {name: max(f[name] for f in found) for name in found[0]}
                    good = worst["reduced"] < 0.01 and worst["ordered"] < 0.01 and worst["wrong_bits"] == 0
                    rounded = {name: round(value, 5) for name, value in worst.items()}
                    show("correctness", shape=shape, tokens=counts, dropped=drop, good=good, **rounded)

    def timing(self) -> None:
        for shape in SHAPES:
            self.form(shape)
            for operation, goals in GOALS.items():
                for num_tokens, goal in zip(TOKENS, goals, strict=True):
                    us, spread = self.slowest("time_operation", operation=operation, num_tokens=num_tokens, plan=None)
                    facts = {"goal": goal, "met": us <= goal} if shape == next(iter(SHAPES)) else {}
                    show("timing", shape=shape, operation=operation, tokens=num_tokens, us=us, range=spread, **facts)
            for num_tokens in TOKENS:
                pair, spread = self.slowest("time_pair", num_tokens=num_tokens, ordered=True)
                show("timing", shape=shape, operation="dispatch + ordered", tokens=num_tokens, us=pair, range=spread)
        self.form(next(iter(SHAPES)))
        for num_tokens in TOKENS:
            found = call_all(self.ranks, "slowest_single", num_tokens=num_tokens, number=1000)
            show("single replays, dispatch + reduced", tokens=num_tokens, median_max_us=found)
        for num_tokens in TOKENS:
            us, spread = self.slowest("time_nccl", port=29517, num_tokens=num_tokens)
            show("nccl all_to_all_single", tokens=num_tokens, us=us, range=spread)

    def slowest(self, name: str, /, **arguments: Any) -> tuple[float, list[float]]:
        """Median over replays, of the slowest rank; and that rank's least and most."""
        found = call_all(self.ranks, name, **arguments)
        times = max(found, key=statistics.median)
        return round(statistics.median(times), 2), [round(min(times), 2), round(max(times), 2)]

    def tune(self, plans: dict[str, Any]) -> None:
        """plans: operation -> tokens -> list of (part, programs, warps, overlap); compiled by helpers beforehand."""
        todo = [
            (operation, int(tokens), tuple(plan))
            for operation, by_tokens in plans.items()
            for tokens, several in by_tokens.items()
            for plan in several
        ]
        distinct = list({(op, plan[0], plan[2], plan[3]): (op, t, plan) for op, t, plan in todo}.values())
        helpers = [RankProcess(i % self.num_devices, self.holder) for i in range(min(16, len(distinct)))]
        self.num_made += 1
        for i, helper in enumerate(helpers):
            settings = self.settings(next(iter(SHAPES)), i % self.num_ranks)
            helper.start("make", **{**settings, "name": f"helper{i}-"})
        for i, helper in enumerate(helpers):
            helper.finish()
            helper.call("adopt", epoch=1, members=[i % self.num_ranks])
        for i, helper in enumerate(helpers):
            helper.start("compile_plans", plans=distinct[i :: len(helpers)])
        for helper in helpers:
            helper.finish()
            helper.kill()
        self.form(next(iter(SHAPES)))
        for operation, num_tokens, plan in todo:
            try:
                us, spread = self.slowest("time_operation", operation=operation, num_tokens=num_tokens, plan=plan)
            except RuntimeError as error:
                show("tune", operation=operation, tokens=num_tokens, plan=plan, error=str(error)[:200])
                self.form(next(iter(SHAPES)))
                continue
            show("tune", operation=operation, tokens=num_tokens, plan=plan, us=us, range=spread)

    def faults(self) -> None:
        shape, victim = next(iter(SHAPES)), self.num_ranks - 1
        deadline_s = KILL_DEADLINE_S if self.num_devices >= self.num_ranks else SHARED_KILL_DEADLINE_S
        standbys = [self.spawn(victim) for _ in range(NUM_CYCLES)]
        self.form(shape)
        call_all(self.ranks, "prepare_layers", num_tokens=32, deadline_s=deadline_s)
        everyone, survivors = list(range(self.num_ranks)), list(range(self.num_ranks - 1))
        normal = call_all(self.ranks, "replay_layers", number=100)
        show("32 layers", replay_ms=[round(ms, 3) for ms in normal])
        for cycle, standby in enumerate(standbys):
            began = time.monotonic()
            for process in self.ranks:
                process.start("replay_until_void", limit_s=20.0)
            time.sleep(0.05 + 0.007 * cycle)
            self.ranks[victim].kill()
            found = [self.ranks[rank].finish() for rank in survivors]
            if cycle < 3 or cycle == NUM_CYCLES - 1:
                show("SIGKILL", cycle=cycle, survivors=found)
            self.enter(survivors)
            for rank in survivors:
                self.ranks[rank].call("reroute", members=survivors)
            alone = [self.ranks[rank].call("replay_layers", number=50) for rank in survivors]
            for rank in survivors:
                self.ranks[rank].call("drop_mapping", rank=victim)
            standby.call("make", **self.settings(shape, victim, attach=True))
            self.ranks[victim] = standby
            for rank in survivors:
                standby.call("map_rank", rank=rank)
                self.ranks[rank].call("map_rank", rank=victim)
            standby.call("prepare_layers_alone", num_tokens=32, deadline_s=deadline_s)
            self.enter(everyone)
            call_all(self.ranks, "reroute", members=everyone)
            together = call_all(self.ranks, "replay_layers", number=50)
            if cycle < 3 or cycle == NUM_CYCLES - 1:
                show(
                    "rejoined",
                    cycle=cycle,
                    alone_ms=[round(ms, 3) for ms in alone],
                    together_ms=[round(ms, 3) for ms in together],
                    memory_mib=self.ranks[0].call("memory_used_mib"),
                    cycle_s=round(time.monotonic() - began, 2),
                )
        call_all(self.ranks, "set_deadline", deadline_s=5.0)
        show("host poison, deadline 5 s", **self.ranks[0].call("poisoned_by_host", after_s=0.2))

    def close(self) -> None:
        for process in self.ranks:
            process.kill()


def run_section(section: str, options: argparse.Namespace, num_devices: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        holder = FdHolder(Path(directory, "holder"))
        bench = Bench(holder.path, options.ranks, num_devices)
        began = time.monotonic()
        try:
            match section:
                case "correctness":
                    bench.correctness()
                case "faults":
                    bench.faults()
                case "timing":
                    bench.timing()
                case _:
                    bench.tune(json.loads(options.plans.read_text()))
            show(f"section {section} done", seconds=round(time.monotonic() - began, 1))
        finally:
            bench.close()
            holder.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=("correctness", "faults", "timing", "tune"), action="append")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plans", type=Path, help="for tune: JSON of launch plans")
    options = parser.parse_args()
    num_devices = min(options.ranks, torch.cuda.device_count())
    if not num_devices:
        parser.error("no NVIDIA GPU here")
    for section in options.section or ["correctness", "faults", "timing"]:
        run_section(section, options, num_devices)


if __name__ == "__main__":
    main()
