"""Choosing a token: a pure function of logits, parameters, seed and output index.

No generator state exists, so nothing can be lost: a request that goes on elsewhere draws the same numbers. The uniform
number of (seed, output index) is a SplitMix64 hash (Steele, Lea, Flood, OOPSLA 2014). Sums run in fp64 over one row
in a fixed order, so the result does not depend on a batch. numpy only.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1


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
    logits = logits_RV.astype(np.float64)
    greedy_R = logits.argmax(axis=1)
    top_R = logits[np.arange(len(logits)), greedy_R]
    if not np.isfinite(top_R).all():
        raise ValueError("logits of a row are not finite; the weights or the KV cache are damaged")
    shifted_RV = logits - top_R[:, None]
    total_R = np.exp(shifted_RV).sum(axis=1)
    chosen = []
    for shifted, total, token, draw in zip(shifted_RV, total_R, greedy_R.tolist(), draws, strict=True):
        if draw.temperature > 0:
            number = uniform(draw.seed, draw.output_index)
            token = _draw(shifted / draw.temperature, draw.top_p, draw.top_k, draw.min_p, number)
        chosen.append((token, float(shifted[token]) - float(np.log(total))))
    return chosen


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1), 53 bits, independent for each (seed, index)."""
    return (_mix(_mix(seed & _MASK) + index) >> 11) * 2.0**-53


def _draw(scaled_V: npt.NDArray[np.float64], top_p: float, top_k: int, min_p: float, number: float) -> int:
    """The token at a random place of the order by falling value, equal ones by id.

    Only values are sorted, and only those kept: the sums that place a token do not depend on which of the equal ones
    comes first, and its id follows from how many are larger. A stable sort of ids costs ten times as much.
    """
    kept = scaled_V if min_p <= 0.0 else scaled_V[scaled_V >= np.log(min_p)]
    if 0 < top_k < len(kept):
        kept = np.partition(kept, len(kept) - top_k)[-top_k:]
    falling = np.sort(kept)[::-1].copy()
    cumulative = np.cumsum(np.exp(falling))
    if top_p < 1.0:
        num_kept = int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1
        cumulative = cumulative[:num_kept]
    chosen = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    place = min(chosen, len(cumulative) - 1)
    num_larger = int(np.count_nonzero(scaled_V > falling[place]))
    return int(np.flatnonzero(scaled_V == falling[place])[place - num_larger])


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
