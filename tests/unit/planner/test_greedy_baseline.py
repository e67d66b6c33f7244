"""The baseline of the benchmark does what its publisher's example says, number for number."""

import numpy as np

from benchmarks.planner.greedy import greedy_placement, naive_repair

_LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def test_published_example() -> None:
    placement = greedy_placement(np.array(_LOADS, dtype=np.float64), 16, 8, num_groups=4, num_hosts=2)
    assert placement.reshape(2, -1).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_groups_that_do_not_divide_over_hosts_do_not_count() -> None:
    loads = np.array(_LOADS, dtype=np.float64)
    placement = greedy_placement(loads, 16, 8, num_groups=3, num_hosts=2)
    assert placement.tolist() == greedy_placement(loads, 16, 8).tolist()


def test_naive_repair_takes_the_first_spare_slot() -> None:
    left, num_moves = naive_repair(np.array([[[0, 1], [2, 3], [2, 3]]]), lost_rank=0, num_logical_experts=4)
    assert (left.tolist(), num_moves) == ([[[0, 1], [2, 3]]], 2)
