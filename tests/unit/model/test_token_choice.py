"""What a request's parameters do to its logits, against a reading of the rules that takes one token at a time."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Sampling
from common.model.sampling import sample
from common.model.token_choice import Choosing, adjust, choose, choose_rows, token_logprobs

PLAIN = Sampling(temperature=1.0, top_p=1.0, top_k=0, seed=7, max_tokens=50)
LOGITS = np.array([0.5, -1.0, 2.0, 0.25, -0.75, 1.5], dtype=np.float32)
IDS = st.lists(st.integers(0, 5), max_size=12)


def _with(**fields: object) -> Sampling:
    return msgspec.structs.replace(PLAIN, **fields)


def _slowly(sampling: Sampling, prompt: Sequence[int], outputs: Sequence[int]) -> list[float]:
    """The documentation of vLLM, read out one token at a time."""
    result = []
    for id, logit in enumerate(LOGITS.tolist()):
        logit += dict(sampling.logit_bias).get(id, 0.0)
        if id in sampling.stop_ids and len(outputs) < sampling.min_tokens:
            logit = -math.inf
        if id in prompt or id in outputs:
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        count = list(outputs).count(id)
        logit -= sampling.frequency_penalty * count
        logit -= sampling.presence_penalty * (count > 0)
        result.append(logit)
    return result


SAMPLINGS = st.builds(
    _with,
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    logit_bias=st.sampled_from([(), ((2, -100.0), (4, 3.0))]),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.sampled_from([(), (1,)]),
    extra_stop_token_ids=st.sampled_from([(), (3, 5)]),
    ignore_eos=st.booleans(),
)


@given(SAMPLINGS, IDS, IDS)
def test_rules_are_those_of_the_slow_reading(sampling: Sampling, prompt: list[int], outputs: list[int]) -> None:
    assert adjust(LOGITS, sampling, prompt, outputs) == pytest.approx(_slowly(sampling, prompt, outputs), abs=1e-5)


@given(SAMPLINGS, IDS, IDS, st.data())
def test_where_the_outputs_were_made_does_not_matter(
    sampling: Sampling, prompt: list[int], outputs: list[int], data: st.DataObject
) -> None:
    """A replaced request brings its outputs along as a tuple; one that stayed has them in its list."""
    expected = choose(LOGITS, sampling, prompt, outputs)
    assert choose(LOGITS.copy(), sampling, tuple(prompt), tuple(outputs)) == expected
    permuted = data.draw(st.permutations(outputs))
    assert choose(LOGITS, sampling, prompt, permuted) == expected, "penalties count, they do not order"


def test_without_rules_nothing_is_touched() -> None:
    assert adjust(LOGITS, PLAIN, (0, 1), (2, 3)) is LOGITS
    assert choose(LOGITS, PLAIN, (0,), (2, 2)) == (*sample(LOGITS, temperature=1.0, seed=7, output_index=2), ())


def test_reported_logprobs_are_those_of_the_model() -> None:
    exact = LOGITS.astype(np.float64) - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    choice = choose(LOGITS, _with(temperature=0.0, logit_bias=((1, 50.0),), num_top_logprobs=3), (0,), ())
    assert choice.token == 1
    assert choice.logprob == pytest.approx(exact[1])
    assert [id for id, _ in choice.top] == [2, 5, 0]
    assert [value for _, value in choice.top] == pytest.approx(exact[[2, 5, 0]])
    # What one call says twice is the same to the last bit, and so is what two kinds of requests are told.
    plain, _ = choose(LOGITS, _with(temperature=0.0), (0,), ())[1:]
    assert dict(choose(LOGITS, _with(temperature=0.0, num_top_logprobs=1), (0,), ()).top)[2] == plain


def test_of_equals_the_lower_id_comes_first() -> None:
    logits = np.array([1, 3, 3, 2, 3, 3], dtype=np.float32)
    assert [id for id, _ in token_logprobs(logits, 0, 3)[1]] == [1, 2, 4]
    assert [id for id, _ in token_logprobs(logits, 0, 99)[1]] == [1, 2, 4, 5, 3, 0]
    assert token_logprobs(logits, 0, 0)[1] == ()


def test_a_ban_of_everything_bans_nothing() -> None:
    sampling = _with(temperature=0.0, min_tokens=5, extra_stop_token_ids=tuple(range(6)))
    assert choose(LOGITS, sampling, (0,), ()).token == 2
    beyond = _with(temperature=0.0, min_tokens=5, stop_token_ids=(2, 999))
    assert choose(LOGITS, beyond, (0,), ()).token == 5


def test_min_p_is_relative_to_the_likeliest_after_the_temperature() -> None:
    logits = np.log(np.array([0.4, 0.2, 0.3, 0.1], dtype=np.float32))

    def drawn(**fields: object) -> set[int]:
        sampling = _with(**fields)
        return {choose(logits, sampling, (0,), [0] * index).token for index in range(300)}

    assert drawn(min_p=0.6) == {0, 2}
    assert drawn(min_p=0.45) == {0, 1, 2}
    assert drawn(min_p=1.0) == {0}
    assert drawn(min_p=0.2, temperature=0.5) == {0, 1, 2}, "squared, the last one is a sixteenth of the first"
    assert drawn(min_p=0.6, top_k=1) == {0}
    assert drawn(min_p=0.45, top_p=0.5) == {0, 2}, "top_p is of what min_p has left"


def test_damaged_logits_are_still_noticed() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            choose(np.array([1.0, value], dtype=np.float32), _with(presence_penalty=1.0), (0,), (0,))


@given(
    st.integers(0, 1 << 30),
    st.sampled_from([1, 3, 8, 31, 262, 1023, 5000]),
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0]),
            st.sampled_from([1.0, 0.7]),
            st.sampled_from([0, 3]),
            st.sampled_from([0.0, 0.1]),
            st.sampled_from([0, 2]),
            st.sampled_from([0.0, 0.5]),
        ),
        min_size=1,
        max_size=9,
    ),
)
def test_a_row_has_the_same_bits_whoever_stands_beside_it(
    seed: int, vocabulary: int, wanted: list[tuple[float, float, int, float, int, float]]
) -> None:
    generator = np.random.default_rng(seed)
    logits_RV = (8 * generator.standard_normal((len(wanted), vocabulary))).astype(np.float32)
    rows = [
        Choosing(
            _with(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                num_top_logprobs=top,
                seed=seed + number,
                presence_penalty=penalty,
            ),
            (0,),
            (0,) * number,
        )
        for number, (temperature, top_p, top_k, min_p, top, penalty) in enumerate(wanted)
    ]
    together = choose_rows(logits_RV, rows)
    assert together == [choose(logits_V.copy(), *row) for logits_V, row in zip(logits_RV, rows, strict=True)]
    for logits_V, choice in zip(logits_RV, together, strict=True):
        shifted = logits_V.astype(np.float64) - logits_V.max()
        expected = float(shifted[choice.token]) - float(np.log(np.exp(shifted).sum()))
        # Sums in another order differ by no more than one rounding for each number that is added.
        rounding = np.finfo(np.float64).eps * (vocabulary + 8)
        assert choice.logprob == pytest.approx(expected, rel=1e-13, abs=rounding)
