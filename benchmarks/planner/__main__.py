"""`make bench-planner`: the planner against greedy replicate-and-pack; table and JSON go to benchmarks/results."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.planner.frontier_picture import frontier_picture
from benchmarks.planner.measure import Row, drifting, fresh_plans, frontier, losses, recorded
from benchmarks.provenance import provenance

_MS = "{:.1f}"
_FORMATS = {"cpu_ms": _MS, "wall_ms": _MS, "moved": "{:.1%}", "budget": "{:.1%}", "moves": "{:.0f}"}
_FORMATS |= {"orphans_per_rank_loss": _MS, "orphans_per_host_loss": _MS, "without_slot": "{:.0f}"}
_TITLES = {
    "fresh": "Plans from nothing, judged on the loads planned for",
    "drift": "After a drift of 0.3 (each load times exp(normal(0, 0.3))); next_window drifts by another 0.1",
    "frontier": "Balancedness against slots moved: DSV3, 288 slots on 32 ranks, lognormal, drift 0.3, three seeds",
    "losses": "Repair after the loss of each single rank in turn: the worst",
    "recorded": "Recorded loads of the embedded model under changing traffic, 32 experts in 40 slots on 8 ranks",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the planner.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=7, help="times are the least of so many calls")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    source = {**provenance(), "command": f"python -m benchmarks.planner {' '.join(sys.argv[1:])}".strip()}
    tables = {
        "fresh": fresh_plans(args.seed, args.repeats),
        "drift": drifting(args.seed, args.repeats),
        "frontier": frontier(args.seed, args.repeats),
        "losses": losses(args.seed, args.repeats),
        "recorded": recorded(),
    }
    head = {**source, "seed": args.seed, "repeats": args.repeats, "threads": 1}
    stem = args.out / f"planner_{source['date']}"
    stem.with_suffix(".json").write_text(json.dumps({**head, **_finite(tables)}, indent=1) + "\n")
    lines = [f"# Expert placement: measurements, {source['date']}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in head.items()]
    for name, rows in tables.items():
        lines += ["", f"## {_TITLES[name]}", "", *_table(rows)]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    args.out.joinpath(f"planner_frontier_{source['date']}.svg").write_text(frontier_picture(tables["frontier"]))
    print("\n".join(lines))


def _finite(tables: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Without figures that do not exist for a case: JSON knows no NaN."""
    return {
        name: [{key: value for key, value in row.items() if value == value} for row in rows]
        for name, rows in tables.items()
    }


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return lines + [f"| {' | '.join(_cell(column, row.get(column)) for column in columns)} |" for row in rows]


def _cell(column: str, value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return "" if math.isnan(value) else _FORMATS.get(column, "{:.4f}").format(value)


if __name__ == "__main__":
    main()
