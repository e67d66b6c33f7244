"""Rebalancing policies by the name that a configuration gives. Pure.

keep            repair only: orphans are placed, nothing else moves
balanced        balance, and coverage where it costs little (the default)
balance_only    balance alone, where slots are too few to cover every expert
coverage_first  the fewest orphans that a single loss can leave, then balance
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from services.planner.cluster_shape import Budget, ClusterShape, FloatArray, IntArray
from services.planner.rebalance import BALANCE_ONLY, COVERAGE_FIRST, DEFAULT, Plan, rebalance

Policy = Callable[[FloatArray, ClusterShape, IntArray | None, Budget], Plan]


def _keep(load_LE: FloatArray, shape: ClusterShape, current_LRS: IntArray | None, budget: Budget) -> Plan:
    del budget  # repairs are made regardless
    return rebalance(load_LE, shape, current_LRS, Budget(total=0))


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "keep": _keep,
        "balanced": partial(rebalance, settings=DEFAULT),
        "balance_only": partial(rebalance, settings=BALANCE_ONLY),
        "coverage_first": partial(rebalance, settings=COVERAGE_FIRST),
    }
)


def policy_named(name: str) -> Policy:
    """Raises ValueError that lists the names there are."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ValueError(f"no policy {name!r}; there are {', '.join(sorted(POLICIES))}") from None
