"""Drawing tokens from rows of scaled logits (draw.c).

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.cpu.library import POINTER, SIZE, CountingFunction, counting_function

_DRAW = np.dtype(
    [(name, np.float64) for name in ("temperature", "top_p", "least", "number")]
    + [(name, np.int64) for name in ("row", "top_k")]
)


class RowDraw(NamedTuple):
    """How a token is drawn from a row: of the values divided by ``temperature`` those of at least ``least``, of these
    the ``top_k`` largest (0: all), of these the fewest whose exponentials reach ``top_p`` of their sum. ``number`` in
    [0, 1) says which."""

    temperature: float
    top_p: float
    least: float
    number: float
    row: int
    top_k: int


def draw_tokens(shifted_RV: npt.NDArray[np.float64], draws: Sequence[RowDraw]) -> list[int]:
    """A token for each draw. ``shifted_RV``: contiguous; the largest value of each row is 0; ``least`` is at most 0."""
    num_rows, size = shifted_RV.shape
    wanted = np.array(draws, dtype=_DRAW)
    if shifted_RV.dtype != np.float64 or not shifted_RV.flags.c_contiguous or wanted["row"].max() >= num_rows:
        raise ValueError(f"rows must be float64 [{num_rows}, {size}], in one piece, one for each draw")
    token_D = np.empty(len(wanted), np.int64)
    if _draw()(wanted.ctypes.data, len(wanted), shifted_RV.ctypes.data, size, token_D.ctypes.data):
        raise MemoryError("no memory to draw a token")
    tokens: list[int] = token_D.tolist()
    return tokens


@cache
def _draw() -> CountingFunction:
    return counting_function("regrow_draw", POINTER, SIZE, POINTER, SIZE, POINTER)
