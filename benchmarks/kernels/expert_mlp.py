"""The expert MLP of one rank against the bandwidth of its memory: ``python -m benchmarks.kernels.expert_mlp``.

The bound is the time to read the weights of the experts that have rows, once, at the copy bandwidth measured in the
same run (bytes read and written). Memory that is only read is some percent faster, so the share of the read bandwidth
stands beside it: that one cannot pass 100%. Weight sets take turns, so that what a run reads was not read for more than
four times the size of the cache.

Legend: N entries, H hidden_size.
"""

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.expert_baselines import grouped_mm, matmul_loop
from benchmarks.kernels.expert_rig import MAX_TOKENS, ExpertSet, Shape, bandwidths, capture, repeated, time_graph
from benchmarks.provenance import provenance
from kernels.reference_experts import mlp

SHAPES = (
    Shape("DeepSeek-V2-Lite, EP2", 2048, 1408, 64, 6, num_ranks=2, num_sets=6),
    Shape("Qwen3-30B-A3B, EP2", 2048, 768, 128, 8, num_ranks=2, num_sets=6),
    Shape("DeepSeek-V3, EP8", 7168, 2048, 256, 8, num_ranks=8, num_sets=3),
    Shape("DeepSeek-V3, EP2", 7168, 2048, 256, 8, num_ranks=2, num_sets=2, tuned=False),
)
TOKENS = (1, 16, 64, 128)
NUM_ROUTINGS = 3
GOAL = 0.8
MAX_RELATIVE_ERROR = 0.01


class Case:
    """One shape: its weight sets and one captured graph of ours, which all numbers of tokens share."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.rigs = [ExpertSet(shape, seed) for seed in range(shape.num_sets)]
        self.experts = [rig.experts() for rig in self.rigs]
        pairs = list(zip(self.experts, self.rigs, strict=True))
        operations = [partial(experts.run, rig.rows_WMKH) for experts, rig in pairs]
        self.one = capture(operations[:1])
        launches = repeated(operations)
        self.graph, self.num_operations = capture(launches), len(launches)

    def reused_after_bytes(self) -> int:
        """What other sets read before a set is read again."""
        active = [rig.num_active() for rig in self.rigs]
        return (sum(active) - max(active)) * self.shape.expert_bytes

    def measure(self, num_tokens: int, bandwidth: dict[str, float]) -> dict[str, Any]:
        shares, times, active, rows = [], [], [], []
        for _ in range(NUM_ROUTINGS):
            for rig in self.rigs:
                rig.leave_rows(num_tokens)
            us = time_graph(self.graph, self.num_operations)
            num_active = statistics.mean(rig.num_active() for rig in self.rigs)
            bound_us = num_active * self.shape.expert_bytes / bandwidth["copy"] * 1e6
            times += us
            shares += [bound_us / one for one in us]
            active.append(num_active)
            rows.append(statistics.mean(len(rig.entries()) for rig in self.rigs))
        of_read = bandwidth["copy"] / bandwidth["read"]
        if max(shares) * of_read > 1:
            print(f"ERROR OF THE MEASUREMENT: {max(shares) * of_read:.3f} of the read bandwidth", flush=True)
        cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        if self.reused_after_bytes() <= 4 * cache_bytes:
            print("ERROR OF THE MEASUREMENT: weights may come from the cache", flush=True)
        return {
            "tokens": num_tokens,
            "active": round(statistics.mean(active), 1),
            "rows": round(statistics.mean(rows), 1),
            "us": round(statistics.median(times), 1),
            "us_range": [round(min(times), 1), round(max(times), 1)],
            "share": round(statistics.median(shares), 3),
            "share_of_read": round(statistics.median(shares) * of_read, 3),
            "share_range": [round(min(shares), 3), round(max(shares), 3)],
            "reused_after_mb": self.reused_after_bytes() // 10**6,
            "loop_us": self._baseline([matmul_loop(rig) for rig in self.rigs]),
            "grouped_mm_us": self._baseline([grouped_mm(rig) for rig in self.rigs]),
        }

    def _baseline(self, operations: Sequence[Callable[[], None] | None]) -> float | None:
        runs = [operation for operation in operations if operation is not None]
        if not runs:
            return None
        try:
            return round(statistics.median(time_graph(capture(runs), len(runs))), 1)
        except RuntimeError as error:
            print("a baseline cannot run:", str(error)[:200], flush=True)
            return None

    def check(self, num_tokens: int, drop: float) -> dict[str, Any]:
        """The captured graph on fresh rows: error against float64, what was written, and bits of rows alone."""
        rig = self.rigs[0]
        rig.leave_rows(num_tokens, drop)
        rig.rows_WMKH.fill_(float("nan"))
        self.one.replay()
        torch.cuda.synchronize()
        entries = rig.entries()
        rows, written = rig.rows_WMKH.clone(), torch.zeros(rig.rows_WMKH.shape[:3], dtype=torch.bool, device="cuda")
        written[tuple(entries[:, :3].T)] = True
        right_rows = bool((rows.isnan().any(-1) == ~written).all() and (rows.isnan().all(-1) == ~written).all())
        chosen = entries[torch.randperm(len(entries), device="cuda", generator=rig.generator)[:40]]
        worst, wrong_bits = 0.0, 0
        x, header = rig.group.row_x_WMH.clone(), rig.group.row_header_WMC.clone()
        for source, row, k, expert in chosen.tolist():
            exact = mlp(x[source, row, None].double(), rig.gate_up[expert], rig.down[expert])[0]
            worst = max(worst, float((rows[source, row, k].double() - exact).norm() / exact.norm()))
            rig.group.num_rows_W.zero_()
            rig.group.num_rows_W[0] = 1
            rig.group.row_x_WMH[0, 0] = x[source, row]
            rig.group.row_header_WMC[0, 0] = header[source, row]
            rig.rows_WMKH.fill_(float("nan"))
            self.one.replay()
            wrong_bits += int(not torch.equal(rig.rows_WMKH[0, 0, k], rows[source, row, k]))
        good = right_rows and worst < MAX_RELATIVE_ERROR and not wrong_bits
        facts = {"tokens": num_tokens, "dropped": drop, "entries": len(entries), "compared": len(chosen)}
        return {**facts, "relative_error": round(worst, 5), "rows_with_other_bits_alone": wrong_bits, "good": good}

    def check_crowded(self) -> dict[str, Any]:
        """Every row of every rank to one expert: many blocks of rows."""
        rig = self.rigs[0]
        rig.leave_rows(MAX_TOKENS)
        rig.group.row_header_WMC[..., 1] = 3
        rig.rows_WMKH.fill_(float("nan"))
        self.one.replay()
        x_NH = rig.group.row_x_WMH.reshape(-1, self.shape.hidden_size)
        exact = mlp(x_NH[-50:].double(), rig.gate_up[3], rig.down[3])
        found = rig.rows_WMKH[:, :, 0].reshape(-1, self.shape.hidden_size)
        error = float((found[-50:].double() - exact).norm() / exact.norm())
        good = error < MAX_RELATIVE_ERROR and not bool(found.isnan().any())
        return {"rows of one expert": len(found), "relative_error": round(error, 5), "good": good}


def table(name: str, shape: Shape, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"\n{name}: {shape.num_local} local experts, hidden {shape.hidden_size}, intermediate "
        f"{shape.intermediate_size}, top-{shape.top_k}, {shape.expert_bytes / 1e6:.1f} MB an expert\n",
        "| tokens a rank | active experts | entries | us | of the bound | of reading | torch loop us | grouped_mm us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        us, share = row["us_range"], row["share_range"]
        lines.append(
            f"| {row['tokens']} | {row['active']} | {row['rows']} | {row['us']} [{us[0]}, {us[1]}] "
            f"| {row['share']:.1%} [{share[0]:.1%}, {share[1]:.1%}] | {row['share_of_read']:.1%} "
            f"| {row['loop_us']} | {row['grouped_mm_us']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("expert_mlp.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here")
    bandwidth = bandwidths()
    gpu = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    results: dict[str, Any] = {
        "provenance": {**provenance(), "gpu": gpu.stdout.strip(), "torch": torch.__version__},
        "bandwidth_tb_s": {name: round(value / 1e12, 3) for name, value in bandwidth.items()},
    }
    print(json.dumps(results), flush=True)
    tables = []
    for shape in SHAPES:
        case = Case(shape)
        checks = [case.check(num_tokens, drop) for num_tokens in (128, 3, 1) for drop in (0.0, 0.3)]
        checks.append(case.check_crowded())
        for check in checks:
            print(shape.name, json.dumps(check), flush=True)
        rows = [case.measure(num_tokens, bandwidth) for num_tokens in TOKENS]
        tables.append(table(shape.name, shape, rows))
        print(tables[-1], flush=True)
        results[shape.name] = {"checks": checks, "timings": rows}
        del case
        torch.cuda.empty_cache()
    results["goal_met"] = all(row["share"] >= GOAL for shape in SHAPES for row in results[shape.name]["timings"])
    options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
