"""What passes the check can be computed: no request may take down the process that serves it."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Sampling
from common.model.token_choice import choose
from common.sampling_bounds import sampling_fault

VOCAB_SIZE = 8
SOUND = Sampling(1.0, 1.0, 0, 7, 4)
# Logits of a sound model; what a client adds must not carry them beyond fp32.
LOGITS_V = np.linspace(-1e4, 1e4, VOCAB_SIZE, dtype=np.float32)

numbers = st.one_of(st.floats(0.0, 2.0), st.floats(), st.sampled_from([0.01, 100.0, -100.0]))
ids = st.integers(-2, VOCAB_SIZE + 1)
samplings = st.builds(
    Sampling,
    temperature=numbers,
    top_p=numbers,
    top_k=st.integers(-2, VOCAB_SIZE + 2),
    seed=st.integers(),
    max_tokens=st.just(4),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
    min_tokens=st.integers(0, 3),
    min_p=numbers,
    presence_penalty=numbers,
    frequency_penalty=numbers,
    repetition_penalty=numbers,
    logit_bias=st.lists(st.tuples(ids, numbers), max_size=2).map(tuple),
    num_top_logprobs=st.integers(0, VOCAB_SIZE + 2),
)


@given(samplings, st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a temperature near zero overflows to what is meant
def test_what_passes_can_be_computed(sampling: Sampling, outputs: list[int]) -> None:
    if not sampling_fault(sampling, VOCAB_SIZE):
        assert 0 <= choose(LOGITS_V, sampling, (1, 2), outputs).token < VOCAB_SIZE


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("logit_bias", ((VOCAB_SIZE, 1.0),)),
        ("logit_bias", ((0, 1e308),)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_what_is_out_of_bounds_is_named(name: str, value: object) -> None:
    assert sampling_fault(SOUND, VOCAB_SIZE) == ""
    assert name in sampling_fault(msgspec.structs.replace(SOUND, **{name: value}), VOCAB_SIZE)
