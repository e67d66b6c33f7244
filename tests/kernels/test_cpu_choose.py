"""Choosing tokens: the same on every instruction set, with exponentials and logarithms right to the last bits."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.cpu.choose import RowDraw, choose_tokens
from tests.kernels.cpu_levels import HERE, at_level


def row(*values: float) -> npt.NDArray[np.float32]:
    return np.array([values], dtype=np.float32)


@given(
    seed=st.integers(0, 1 << 30),
    size=st.integers(1, 300),
    temperature=st.sampled_from([0.0, 1.0, 0.05, 0.7, 50.0]),
    top_p=st.floats(1e-6, 1.0),
    top_k=st.integers(0, 310),
    least=st.sampled_from([-math.inf, -3.0, 0.0]),
)
def test_every_level_chooses_the_same(
    seed: int, size: int, temperature: float, top_p: float, top_k: int, least: float
) -> None:
    random = np.random.default_rng(seed)
    logits_RV = random.normal(0, 4, (5, size)).astype(np.float32)
    draws = [RowDraw(temperature, top_p, least, random.random(), top_k) for _ in range(5)]
    got = []
    for level in HERE:
        with at_level(level):
            got.append(choose_tokens(logits_RV, draws))
    assert all(chosen == got[0] for chosen in got)
    alone = [choose_tokens(logits_RV[[number]], [draw])[0] for number, draw in enumerate(draws)]
    assert alone == got[0]
    for logits_V, (token, logprob) in zip(logits_RV.astype(np.float64), got[0], strict=True):
        exact = math.fsum(math.exp(value - logits_V[token]) for value in logits_V)
        assert logprob == pytest.approx(-math.log(exact), rel=1e-14, abs=np.finfo(np.float64).eps * (size + 8))


@pytest.mark.parametrize("level", HERE)
def test_exponentials_are_right(level: str) -> None:
    """Two values, 0 and x: the second is drawn from the number 1 / (1 + e^x) on, which is found by halving."""
    with at_level(level):
        for x in (-1e-30, -(2.0**-30), -0.3125, -0.34375, -0.6875, -1.0, -5.5, -20.0, -30.0):
            low, high = 0.0, 1.0
            for _ in range(60):
                number = (low + high) / 2
                token = choose_tokens(row(0.0, x), [RowDraw(1.0, 1.0, -math.inf, number)])[0][0]
                low, high = (low, number) if token else (number, high)
            assert high == pytest.approx(1 / (1 + math.exp(np.float32(x))), rel=4e-16)
        rare = [RowDraw(1.0, 1.0, -math.inf, 1 - 2**-53)]
        assert choose_tokens(row(-math.inf, 0.0, -800.0, -708.5), rare) == [(1, 0.0)]


@pytest.mark.parametrize("values", [(0.0, math.nan), (math.nan, 0.0), (math.inf, 0.0), (-math.inf, -math.inf)])
def test_rows_without_a_finite_largest_value_are_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="not finite"):
        choose_tokens(np.concatenate((row(0.0, 1.0), row(*values))), [RowDraw()] * 2)


def test_each_row_needs_a_draw() -> None:
    with pytest.raises(ValueError, match="2 rows of 3 logits, 1 draws"):
        choose_tokens(np.zeros((2, 3), np.float32), [RowDraw()])
