"""Choosing tokens from rows of logits (choose.c).

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.cpu.library import POINTER, SIZE, CountingFunction, counting_function

_DRAW = np.dtype([(name, np.float64) for name in ("temperature", "top_p", "least", "number")] + [("top_k", np.int64)])


class RowDraw(NamedTuple):
    """How a row's token is chosen: the largest at ``temperature`` 0. Otherwise from the values, less the largest one,
    over ``temperature``: of those of at least ``least`` (0 or less) the ``top_k`` largest (0: all), of these the fewest
    whose exponentials reach ``top_p`` of their sum. ``number`` in [0, 1) says which."""

    temperature: float = 0.0
    top_p: float = 1.0
    least: float = 0.0
    number: float = 0.0
    top_k: int = 0


def choose_tokens(logits_RV: npt.NDArray[np.float32], draws: Sequence[RowDraw]) -> list[tuple[int, float]]:
    """Each row's token and its log-probability among all at temperature 1. Raises ValueError when a row's largest value
    is not finite, or one is no number."""
    num_rows, size = logits_RV.shape
    rows = np.ascontiguousarray(logits_RV, dtype=np.float32)
    wanted = np.array(draws, dtype=_DRAW)
    if wanted.shape != (num_rows,) or not size:
        raise ValueError(f"{num_rows} rows of {size} logits, {len(wanted)} draws")
    token_R, logprob_R = np.empty(num_rows, np.int64), np.empty(num_rows)
    outputs = token_R.ctypes.data, logprob_R.ctypes.data
    status = _choose()(wanted.ctypes.data, rows.ctypes.data, num_rows, size, *outputs)
    if status < 0:
        raise MemoryError("no memory to choose a token")
    if status:
        raise ValueError("logits of a row are not finite; the weights or the KV cache are damaged")
    return list(zip(token_R.tolist(), logprob_R.tolist(), strict=True))


@cache
def _choose() -> CountingFunction:
    return counting_function("regrow_choose", POINTER, POINTER, SIZE, SIZE, POINTER, POINTER)
