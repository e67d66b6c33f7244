"""Choosing a token: a pure function of logits, parameters, seed and output index.

No generator state exists, so nothing can be lost: a request that goes on elsewhere draws the same numbers. The uniform
number of (seed, output index) is a SplitMix64 hash (Steele, Lea, Flood, OOPSLA 2014). Sums run in fp64 over one row
in a fixed order (kernels/cpu/choose.c), so the result does not depend on a batch.

Legend: R rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kernels.cpu.choose import RowDraw, choose_tokens

_MASK = (1 << 64) - 1
_GREEDY = RowDraw()


def sample(
    logits_V: npt.NDArray[np.float32],
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int = 0,
    output_index: int = 0,
) -> tuple[int, float]:
    """(token id, log-probability of it) for one row of finite fp32 logits (-inf allowed, not for all).

    temperature 0 takes the largest logit, the lowest id among equals. Otherwise tokens are ordered by falling
    probability (equal ones by id); those with at least min_p times the largest probability are kept, of these the
    first top_k (0 = all), of these the fewest whose probabilities reach top_p, and one is drawn. `seed` is any integer
    (64 bits count); output_index is 0 for a request's first output token. The log-probability is that of the
    unfiltered distribution at temperature 1. Raises ValueError when the logits are not finite.
    """
    want = Draw(temperature, top_p, top_k, min_p, seed, output_index)
    return sample_rows(logits_V[None], [want])[0]


class Draw(NamedTuple):
    """How one row is sampled: see `sample`."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    output_index: int = 0


def sample_rows(logits_RV: npt.NDArray[np.float32], draws: Sequence[Draw]) -> list[tuple[int, float]]:
    """`sample` of each row, which has the same bits whatever rows stand beside it."""
    return choose_tokens(logits_RV, [_row_draw(draw) for draw in draws])


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1), 53 bits, independent for each (seed, index)."""
    return (_mix(_mix(seed & _MASK) + index) >> 11) * 2.0**-53


def _row_draw(draw: Draw) -> RowDraw:
    temperature, top_p, top_k, min_p, seed, index = draw
    if temperature <= 0:
        return _GREEDY
    least = -math.inf if min_p <= 0.0 else math.log(min_p)
    return RowDraw(temperature, top_p, least, uniform(seed, index), top_k)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
