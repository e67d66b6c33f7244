"""Shapes of clusters and loads of experts that plans are measured on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.planner.cluster_shape import ClusterShape, FloatArray

TRACE = Path(__file__).parent / "traces" / "abacus_mixes.json"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    num_layers: int
    num_experts: int
    num_slots: int
    num_ranks: int
    num_hosts: int = 1
    num_groups: int = 1

    @property
    def shape(self) -> ClusterShape:
        hosts = tuple(rank * self.num_hosts // self.num_ranks for rank in range(self.num_ranks))
        return ClusterShape((self.num_slots // self.num_ranks,) * self.num_ranks, hosts, self.num_groups)

    @property
    def greedy_hosts(self) -> int:
        """Greedy knows hosts for the sake of groups only."""
        return self.num_hosts if self.num_groups > 1 else 1


DSV3 = Case("DSV3 288/32", 58, 256, 288, 32)
CASES = (
    DSV3,
    Case("DSV3 288/32, 4 hosts", 58, 256, 288, 32, 4),
    Case("DSV3 288/32, 4 hosts, 8 groups", 58, 256, 288, 32, 4, 8),
    Case("58x256 320/64, 8 hosts", 58, 256, 320, 64, 8),
    Case("Qwen3-30B-A3B 144/8", 48, 128, 144, 8),
    Case("V2-Lite 72/8", 26, 64, 72, 8),
    Case("V2-Lite 64/8, no redundancy", 26, 64, 64, 8),
    Case("V2-Lite 144/8, 2 hosts", 26, 64, 144, 8, 2),
)


def lognormal(case: Case, rng: np.random.Generator) -> FloatArray:
    return rng.lognormal(0.0, 1.0, (case.num_layers, case.num_experts))


def zipf(case: Case, rng: np.random.Generator) -> FloatArray:
    """The n-th expert of a layer has 1 / n of the load of its first; a little noise, so that no two are equal."""
    ranked = 1.0 / np.arange(1, case.num_experts + 1)
    loads = np.stack([rng.permutation(ranked) for _ in range(case.num_layers)])
    return np.asarray(loads * rng.lognormal(0.0, 0.01, loads.shape))


def drifted(load_LE: FloatArray, sigma: float, rng: np.random.Generator) -> FloatArray:
    """Every load times its own exp(normal(0, sigma))."""
    return load_LE * rng.lognormal(0.0, sigma, load_LE.shape)


LOADS: dict[str, Callable[[Case, np.random.Generator], FloatArray]] = {"lognormal": lognormal, "zipf": zipf}


def trace() -> tuple[list[str], FloatArray]:
    """(phase of each window, tokens [windows, layers, experts]) recorded from the embedded model."""
    recorded = json.loads(TRACE.read_text())
    return recorded["phase"], np.array(recorded["tokens"], dtype=np.float64)
