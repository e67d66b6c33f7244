"""What no plan by groups can exceed after a drift: ``python -m benchmarks.planner.group_bound``.

Where each group of experts stays on one host, the heaviest rank bears at least the mean over its host's ranks. Three
bounds of balancedness: groups stay where they are; groups are packed onto hosts anew, at any price; and as many layers
are packed anew as a budget of 5% of all slots can pay for, where two groups that change places cost at least their
experts.

Shapes: L layers, H hosts, G groups, E experts.
"""

from itertools import combinations

import numpy as np

from benchmarks.planner.cases import CASES, LOADS, Case, drifted
from services.planner.cluster_shape import Budget, FloatArray, IntArray
from services.planner.placement_array import balancedness, held_by
from services.planner.rebalance import rebalance

_DRIFT, _BUDGET = 0.3, 0.05


def least_heaviest(load_G: FloatArray, num_hosts: int) -> float:
    """The least load that the heaviest host can have with equally many groups on each."""
    size = len(load_G) // num_hosts

    def best(left: tuple[int, ...]) -> float:
        if not left:
            return 0.0
        # The first group left goes somewhere: with which others?
        return min(
            max(
                float(load_G[[left[0], *others]].sum()),
                best(tuple(group for group in left[1:] if group not in others)),
            )
            for others in combinations(left[1:], size - 1)
        )

    return best(tuple(range(len(load_G))))


def host_loads(case: Case, load_LE: FloatArray, placement_LRS: IntArray) -> FloatArray:
    """[L, H], each expert on the one host that holds it."""
    held_LRE = held_by(placement_LRS, case.num_experts)[:, :, : case.num_experts]
    host_R = np.array(case.shape.host_R)
    on_host_LHE = np.stack([held_LRE[:, host_R == host].any(axis=1) for host in range(case.num_hosts)], axis=1)
    assert (on_host_LHE.sum(axis=1) == 1).all()
    return np.asarray((on_host_LHE * load_LE[:, None, :]).sum(axis=2))


def main() -> None:
    case = next(case for case in CASES if case.num_groups > 1)
    num_slots = case.num_layers * case.num_slots
    for name, make_load in LOADS.items():
        rng = np.random.default_rng(0)
        before = make_load(case, rng)
        load = drifted(before, _DRIFT, rng)
        old = rebalance(before, case.shape).placement_LRS
        plan = rebalance(load, case.shape, old, Budget(total=int(_BUDGET * num_slots)))
        mean_L = load.sum(axis=1) / case.num_hosts
        kept_L = host_loads(case, load, old).max(axis=1)
        load_LG = load.reshape(case.num_layers, case.num_groups, -1).sum(axis=2)
        anew_L = np.array([least_heaviest(load_G, case.num_hosts) for load_G in load_LG])
        num_anew = int(_BUDGET * num_slots) // (2 * case.num_experts // case.num_groups)
        mixed = kept_L.sum() - np.sort(kept_L - anew_L)[-num_anew:].sum()
        print(
            f"{case.name}, {name}: reached {balancedness(load, plan.placement_LRS):.3f}; bounds: groups kept "
            f"{mean_L.sum() / kept_L.sum():.3f}, {num_anew} layers packed anew {mean_L.sum() / mixed:.3f}, all packed "
            f"anew {mean_L.sum() / anew_L.sum():.3f}"
        )


if __name__ == "__main__":
    main()
