"""Drawing: the same token on every instruction set, and exponentials that are right to the last bits."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.cpu.draw import RowDraw, draw_tokens
from tests.kernels.cpu_levels import HERE, at_level


@given(
    seed=st.integers(0, 1 << 30),
    size=st.integers(1, 300),
    temperature=st.floats(0.05, 50.0),
    top_p=st.floats(1e-6, 1.0),
    top_k=st.integers(0, 310),
    least=st.sampled_from([-math.inf, -3.0, 0.0]),
)
def test_every_level_draws_the_same(
    seed: int, size: int, temperature: float, top_p: float, top_k: int, least: float
) -> None:
    random = np.random.default_rng(seed)
    shifted_RV = random.normal(0, 4, (3, size))
    shifted_RV -= shifted_RV.max(axis=1)[:, None]
    draws = [RowDraw(temperature, top_p, least, random.random(), row % 3, top_k) for row in range(7)]
    got = []
    for level in HERE:
        with at_level(level):
            got.append(draw_tokens(shifted_RV, draws))
    assert all(tokens == got[0] for tokens in got)
    alone = [draw_tokens(shifted_RV[draw.row][None], [draw._replace(row=0)])[0] for draw in draws]
    assert alone == got[0]


@pytest.mark.parametrize("level", HERE)
def test_exponentials_are_right(level: str) -> None:
    """Two values, 0 and x: the second is drawn from the number 1 / (1 + e^x) on, which is found by halving."""
    with at_level(level):
        for x in (-1e-300, -1e-9, -0.3, -0.34657, -0.7, -1.0, -5.5, -20.0, -30.0):
            low, high = 0.0, 1.0
            for _ in range(60):
                number = (low + high) / 2
                token = draw_tokens(np.array([[0.0, x]]), [RowDraw(1.0, 1.0, -math.inf, number, 0, 0)])[0]
                low, high = (low, number) if token else (number, high)
            assert high == pytest.approx(1 / (1 + math.exp(x)), rel=4e-16)
        rare = [RowDraw(1.0, 1.0, -math.inf, 1 - 2**-53, 0, 0)]
        assert draw_tokens(np.array([[-math.inf, 0.0, -800.0, -708.5]]), rare) == [1]


def test_what_is_no_row_is_refused() -> None:
    draw = RowDraw(1.0, 1.0, -math.inf, 0.5, 2, 0)
    with pytest.raises(ValueError, match="rows must be"):
        draw_tokens(np.zeros((2, 5)), [draw])
    with pytest.raises(ValueError, match="rows must be"):
        draw_tokens(np.zeros((2, 10))[:, ::2], [draw._replace(row=0)])
