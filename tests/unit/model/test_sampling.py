"""Sampling: a pure function; what it draws, and that filters and log-probabilities are what they are called."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.model.sampling import sample, uniform

LOGITS = np.log(np.array([0.5, 0.05, 0.25, 0.15, 0.05], dtype=np.float32)) + np.float32(3.0)


def draws(count: int, logits: npt.NDArray[np.float32] = LOGITS, **parameters: float) -> npt.NDArray[np.float64]:
    """Relative frequencies of the tokens over output indices 0..count-1."""
    settings: dict[str, float] = {"temperature": 1.0, "seed": 11, **parameters}
    tokens = [
        sample(
            logits,
            temperature=settings["temperature"],
            top_p=settings.get("top_p", 1.0),
            top_k=int(settings.get("top_k", 0)),
            seed=int(settings["seed"]),
            output_index=i,
        )[0]
        for i in range(count)
    ]
    frequencies: npt.NDArray[np.float64] = np.bincount(tokens, minlength=len(logits)) / count
    return frequencies


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals() -> None:
    token, logprob = sample(LOGITS, temperature=0.0)
    assert token == 0
    assert logprob == pytest.approx(np.log(0.5), abs=1e-6)
    assert sample(np.array([1, 7, 7, 7], dtype=np.float32), temperature=0.0, seed=9)[0] == 1


def test_frequencies_follow_the_probabilities() -> None:
    assert draws(6000) == pytest.approx([0.5, 0.05, 0.25, 0.15, 0.05], abs=0.02)
    squared = np.array([0.5, 0.05, 0.25, 0.15, 0.05]) ** 2
    assert draws(6000, temperature=0.5) == pytest.approx(squared / squared.sum(), abs=0.02)


def test_filters_keep_the_likeliest() -> None:
    assert draws(3000, top_k=2) == pytest.approx([2 / 3, 0, 1 / 3, 0, 0], abs=0.03)
    assert draws(3000, top_p=0.6) == pytest.approx([2 / 3, 0, 1 / 3, 0, 0], abs=0.03)
    assert draws(200, top_p=0.3) == pytest.approx([1, 0, 0, 0, 0])
    assert draws(200, top_k=1, seed=3) == pytest.approx([1, 0, 0, 0, 0])
    # Of the two equally likely tokens the lower id stays.
    assert draws(3000, top_k=4)[4] == 0
    assert draws(3000, top_k=4)[1] > 0


def test_the_logprob_is_of_the_unfiltered_distribution_at_temperature_one() -> None:
    for index in range(20):
        token, logprob = sample(LOGITS, temperature=3.0, top_k=3, top_p=0.9, seed=5, output_index=index)
        assert logprob == pytest.approx(float(LOGITS[token]) - 3.0, abs=1e-5)


def test_seed_and_index_both_matter() -> None:
    numbers = {uniform(seed, index) for seed in (0, 1, 2**64 - 1, -5) for index in range(500)}
    assert len(numbers) == 2000
    assert all(0 <= number < 1 for number in numbers)
    assert np.mean(sorted(numbers)) == pytest.approx(0.5, abs=0.03)
    assert uniform(2**64 + 7, 1) == uniform(7, 1)


@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    temperature=st.floats(1e-12, 1e12),
    top_p=st.floats(1e-9, 1.0),
    top_k=st.integers(0, 50),
    seed=st.integers(),
    index=st.integers(0, 2**31),
    offset=st.integers(0, 15),
)
def test_any_parameters_give_the_same_finite_answer_wherever_the_row_lies(
    logits: list[float], temperature: float, top_p: float, top_k: int, seed: int, index: int, offset: int
) -> None:
    row = np.array(logits, dtype=np.float32)
    elsewhere = np.zeros(len(row) + offset, dtype=np.float32)[offset:]
    elsewhere[:] = row
    first, second = (
        sample(x, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, output_index=index)
        for x in (row, elsewhere)
    )
    assert first == second
    assert 0 <= first[0] < len(row)
    assert first[1] <= 0 or first[1] == pytest.approx(0, abs=1e-12)
    if top_k:
        assert int((row > row[first[0]]).sum()) < top_k


def sample_by_full_sort(
    logits_V: npt.NDArray[np.float32], temperature: float, top_p: float, top_k: int, min_p: float, seed: int, index: int
) -> int:
    """What `sample` is to draw, spelled out: all tokens in order, cut, and walked until the number is reached."""
    logits = logits_V.astype(np.float64)
    scaled = (logits - logits.max()) / temperature
    order = np.argsort(-scaled, kind="stable")
    if min_p:
        order = order[: int((scaled >= np.log(min_p)).sum())]
    order = order[: top_k or len(order)]
    cumulative = np.cumsum(np.exp(scaled[order]))
    if top_p < 1.0:
        cumulative = cumulative[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]
    chosen = int(np.searchsorted(cumulative, uniform(seed, index) * cumulative[-1], side="right"))
    return int(order[min(chosen, len(cumulative) - 1)])


@given(
    # Few distinct values: equal ones lie across every cut.
    logits=st.lists(st.sampled_from([-np.inf, -80.0, -1.5, -1.0, -0.0, 0.0, 0.5, 2.0]), min_size=1, max_size=60),
    temperature=st.floats(0.05, 20.0),
    top_p=st.floats(1e-6, 1.0),
    top_k=st.integers(0, 65),
    min_p=st.sampled_from([0.0, 0.0, 1e-3, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    offset=st.floats(-1e4, 1e4, width=32),
)
def test_the_token_is_that_of_a_full_sort(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float, seed: int, offset: float
) -> None:
    row = np.array([*logits, 1.0], dtype=np.float32) + np.float32(offset)
    for index in range(5):
        token, _ = sample(
            row, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, output_index=index
        )
        assert token == sample_by_full_sort(row, temperature, top_p, top_k, min_p, seed, index)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.9), (1, 1.0), (50, 1.0), (50, 0.8), (31999, 0.999)])
def test_the_token_of_a_large_vocabulary_is_that_of_a_full_sort(top_k: int, top_p: float) -> None:
    rng = np.random.default_rng(top_k)
    for index in range(12):
        # Rounded to bf16's precision, as logits of many models are: thousands of equal values.
        row = (rng.standard_normal(32000) * 3).astype(np.float32)
        row = (row.view(np.uint32) & 0xFFFF0000).view(np.float32)
        token, _ = sample(row, temperature=0.9, top_p=top_p, top_k=top_k, seed=7, output_index=index)
        assert token == sample_by_full_sort(row, 0.9, top_p, top_k, 0.0, 7, index)


@pytest.mark.parametrize("size", [128, 260, 511, 32000])
def test_bits_do_not_depend_on_alignment(size: int) -> None:
    row = np.random.default_rng(size).standard_normal(size).astype(np.float32) * 5
    expected = sample(row, temperature=1.0, seed=3)
    for offset in range(1, 17):
        elsewhere = np.zeros(size + offset, dtype=np.float32)[offset:]
        elsewhere[:] = row
        assert sample(elsewhere, temperature=1.0, seed=3) == expected


def test_masked_tokens_are_never_drawn_and_damage_is_reported() -> None:
    row = np.array([-np.inf, 1.0, -np.inf, 1.0], dtype=np.float32)
    assert draws(200, row)[[0, 2]] == pytest.approx([0, 0])
    for damaged in ([1.0, np.nan], [-np.inf, -np.inf], [np.inf, 0.0]):
        with pytest.raises(ValueError, match="not finite"):
            sample(np.array(damaged, dtype=np.float32), temperature=1.0)
