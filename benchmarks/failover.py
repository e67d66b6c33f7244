"""What a failure costs: 32 streams on 4 decode ranks while parts of the cluster go, all seen by the clients.

    python -m benchmarks.failover [--sections ranks,services,scaling,routers] [--kills 20] [--stops 10] [--streams 32]
                                  [--repeats 3] [--standbys 0] [--model DIR] [--output PREFIX]

    ranks      decode ranks killed and stopped
    services   monitor, planner and agent killed and stopped
    scaling    4 -> 6 -> 3 -> 4 ranks, 2 -> 3 -> 1 -> 2 prefill workers
    routers    one of two routers killed and replaced, in a cluster of its own; its clients ask again

Every stream is compared, text and log-probability bits, with the same request of the fault-free run before. A fault
counts only with proof. Writes PREFIX.json, PREFIX.md and, of the ranks, PREFIX.svg.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import failover_ranks, failover_routers, failover_scaling, failover_services
from benchmarks.failover_report import Window, is_perfect, picture, summary, table, verdict, window_figures
from benchmarks.load_generator import LoadGenerator, bodies_for
from benchmarks.provenance import provenance, results_path
from services.cli.temporary_cluster import temporary_cluster

ROOT = Path(__file__).resolve().parent.parent
MAX_TOKENS, NUM_BODIES = 240, 64
SECTIONS = ("ranks", "services", "scaling", "routers")
SCALING_STEPS = [(6, 3), (3, 1), (4, 2)]
_WARM_UP_S = 3.0

Records = list[dict[str, Any]]
Happened = TypeVar("Happened")


class Bench:
    """A running cluster, the fault-free run, and loads upon request."""

    def __init__(self, options: argparse.Namespace, url: str, base: Path) -> None:
        self.options, self.url, self.base = options, url, base
        self._bodies = base / "bodies.json"
        self._bodies.write_text(json.dumps(bodies_for(options.model.name, NUM_BODIES, MAX_TOKENS)))
        self.expected, _, _ = self.under_load(lambda: time.sleep(options.calm_s))
        assert {record["body"] for record in self.expected} == set(range(NUM_BODIES)), "raise --calm-s"
        print(f"fault-free: {len(self.expected)} requests", flush=True)

    def under_load(self, act: Callable[[], Happened]) -> tuple[Records, Happened, tuple[float, float]]:
        """The records of all streams, what ``act`` returned, and the span of time."""
        start = time.monotonic()
        load = LoadGenerator(self.url, self._bodies, self.base / "records.json", self.options.streams)
        time.sleep(_WARM_UP_S)
        happened = act()
        return load.finish(), happened, (start, time.monotonic())

    def ranks(self) -> dict[str, Any]:
        actions = failover_ranks.order_of(self.options.kills, self.options.stops)
        records, faults, span = self.under_load(
            lambda: asyncio.run(failover_ranks.run_faults(self.url, self.base / "run", actions))
        )
        self.options.output.with_suffix(".svg").write_text(picture(records, faults, span))
        return summary(records, self.expected, faults, span)

    def services(self) -> dict[str, Any]:
        def act() -> list[Window]:
            return failover_services.run_faults(self.base / "run", failover_services.KINDS, self.options.repeats)

        return self._windows(act)

    def scaling(self) -> dict[str, Any]:
        return self._windows(lambda: failover_scaling.run_scalings(self.base / "run", SCALING_STEPS))

    def routers(self) -> dict[str, Any]:
        def act() -> list[failover_routers.RouterFault]:
            return failover_routers.run_faults(self.url, self.base / "run", self.options.repeats)

        records, faults, _ = self.under_load(act)
        return failover_routers.figures(records, self.expected, faults)

    def _windows(self, act: Callable[[], list[Window]]) -> dict[str, Any]:
        records, windows, _ = self.under_load(act)
        return verdict(records, self.expected) | window_figures(records, windows)


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    origin = provenance()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, Any]] = {}
    for num_routers in (1, 2):
        sections = [section for section in options.sections if (section == "routers") == (num_routers == 2)]
        if not sections:
            continue
        with tempfile.TemporaryDirectory(prefix="regrow-failover-") as directory:
            base = Path(directory).resolve()
            config = base / "routers.toml"
            standbys = f"[decode]\nnum_standbys = {options.standbys}\n"
            config.write_text(standbys + (failover_routers.CONFIG if num_routers > 1 else ""))
            more = ("--routers", str(num_routers), "--config", str(config))
            with temporary_cluster(base / "run", options.model, 4, 2, *more) as url:
                bench = Bench(options, url, base)
                figures |= {section: getattr(bench, section)() for section in sections}
    text = "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in origin.items())
    tables = "\n\n".join(f"## {section}\n\n{table(values)}" for section, values in figures.items())
    report = f"# Failover\n\n{text}\n- streams: {options.streams} of {MAX_TOKENS} tokens\n\n{tables}\n"
    options.output.with_suffix(".md").write_text(report)
    options.output.with_suffix(".json").write_text(json.dumps({**origin, "figures": figures}, indent=1) + "\n")
    print(report)
    return figures


def _sections(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", type=_sections, default=list(SECTIONS), help="comma-separated")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="of each fault of a service")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--standbys", type=int, default=0, help="decode processes kept warm beside the ranks")
    parser.add_argument("--calm-s", type=float, default=45.0, help="length of the fault-free run")
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "fixtures" / "tiny-random")
    parser.add_argument("--output", type=Path, default=results_path("failover_cpu"))
    figures = measure(parser.parse_args())
    return 0 if all(is_perfect(values) for values in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
