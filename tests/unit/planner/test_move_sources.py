"""Whose memory a moved expert is read from."""

import numpy as np
import pytest

from common.placement import EMPTY
from services.planner.cluster_shape import ClusterShape
from services.planner.move_sources import move_sources

_SHAPE = ClusterShape((2, 2, 2, 2), (0, 0, 1, 1))
# Expert 0 on ranks 0, 1 and 2; expert 1 on rank 3 alone; expert 2 nowhere.
_BEFORE = np.array([[[0, EMPTY], [0, EMPTY], [0, EMPTY], [1, EMPTY]]])


def sources(moves: list[tuple[int, int, int]], readable: tuple[int, ...]) -> list[int]:
    """Of (rank, local, expert) in layer 0."""
    found: list[int] = move_sources(np.array([(0, *move) for move in moves]), _BEFORE, readable, _SHAPE).tolist()
    return found


@pytest.mark.parametrize(
    ("moves", "readable", "expected"),
    [
        ([(3, 1, 0)], (0, 1, 2, 3), [2]),  # on the same host
        ([(3, 1, 0)], (0, 1, 3), [0]),  # not readable there: another host
        ([(3, 0, 0), (3, 1, 0)], (0, 1, 3), [0, 1]),  # reads in turn
        ([(0, 1, 1)], (0, 1, 2, 3), [3]),
        ([(0, 1, 1)], (0, 1, 2), [EMPTY]),  # its only holder is gone
        ([(0, 1, 2)], (0, 1, 2, 3), [EMPTY]),  # nobody ever held it
        ([(1, 1, 0)], (1,), [EMPTY]),  # never from itself
    ],
)
def test_source(moves: list[tuple[int, int, int]], readable: tuple[int, ...], expected: list[int]) -> None:
    assert sources(moves, readable) == expected


def test_no_moves_need_no_sources() -> None:
    assert len(move_sources(np.zeros((0, 4), dtype=np.int64), _BEFORE, (0,), _SHAPE)) == 0
