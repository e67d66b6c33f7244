"""Elastic EP kernels on the GPUs of this host: correctness, faults, timing.

    python -m benchmarks.kernels.elastic [--section correctness|faults|timing|tune] [--provider vmm|nvshmem] [--ranks N]

One process a rank; with fewer GPUs than ranks they share them (then timings mean nothing: the contexts take turns, and
NVSHMEM is left out).
"""

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.kernels.bench_group import SHAPES, BenchGroup, show
from benchmarks.kernels.fault_section import NUM_CYCLES, require, run_faults
from benchmarks.kernels.rank_pool import call_all
from benchmarks.kernels.timing_section import run_timing, run_tune
from kernels.symmetric_memory.fd_holder import FdHolder

SECTIONS = ("correctness", "faults", "timing")
COUNTS = ((1, 1), (16, 16), (128, 128), (77, 3), (0, 128), (128, 0))
LARGEST_ERROR = 0.01


def run_correctness(group: BenchGroup) -> None:
    for shape in SHAPES:
        group.form(shape, ["views", "fp8", "alone"])
        worst: dict[str, float] = {}
        num_checked = 0
        for variant in ("views", "fp8", "alone"):
            for counts in COUNTS:
                for drop in (0.0, 0.3):
                    for rank, process in enumerate(group.ranks):
                        process.start("check", num_tokens=counts[rank % 2], drop=drop, variant=variant)
                    for found in [process.finish() for process in group.ranks]:
                        worst |= {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
                        exact = all(value == 0 for name, value in found.items() if name.startswith("wrong"))
                        good = exact and max(found["reduced"], found["ordered"]) < LARGEST_ERROR
                        require(good, f"{shape} {variant} {counts} dropped {drop}: {found}")
                    num_checked += 1
        graphs = call_all(group.ranks, "check_graph", num_tokens=32)
        require(all(found["wrong_bits"] == 0 for found in graphs), f"one graph, other tokens each replay: {graphs}")
        rounded = {name: round(value, 5) for name, value in worst.items()}
        show("correctness", provider=group.provider, shape=shape, checked=num_checked, graph_replays=5, **rounded)


def run_section(section: str, provider: str, options: argparse.Namespace, num_devices: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        holder = FdHolder(Path(directory, "holder"))
        began = time.monotonic()
        group = BenchGroup(provider, str(holder.path), options.ranks, num_devices)
        try:
            match section:
                case "correctness":
                    run_correctness(group)
                case "faults":
                    run_faults(group, options.cycles)
                case "timing":
                    run_timing(group)
                case _:
                    run_tune(group, json.loads(options.plans.read_text()))
            show(f"section {section} done", provider=provider, seconds=round(time.monotonic() - began, 1))
        finally:
            group.close()
            holder.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=(*SECTIONS, "tune"), action="append")
    parser.add_argument("--provider", choices=("vmm", "nvshmem"), action="append")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cycles", type=int, default=NUM_CYCLES, help="of kill and rejoin")
    parser.add_argument("--plans", type=Path, help="for tune: JSON of launch plans")
    options = parser.parse_args()
    num_devices = min(options.ranks, torch.cuda.device_count())
    if not num_devices:
        parser.error("no NVIDIA GPU here")
    has_nvshmem = importlib.util.find_spec("nvshmem") is not None and num_devices == options.ranks
    providers = options.provider or ["vmm", *(["nvshmem"] if has_nvshmem else [])]
    for section in options.section or SECTIONS:
        for provider in providers:
            run_section(section, provider, options, num_devices)


if __name__ == "__main__":
    main()
