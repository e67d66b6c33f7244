"""What follows from the headers of a round."""

from hypothesis import given
from hypothesis import strategies as st

from services.decode.round_header import NEWCOMER_HEADER, NUM_HEADER_WORDS, RoundHeader, RoundPlan

words32 = st.integers(0, 2**32 - 1)


@given(st.builds(RoundHeader, words32, st.booleans(), words32, words32))
def test_words_round_trip(header: RoundHeader) -> None:
    assert len(header.words()) == NUM_HEADER_WORDS
    assert RoundHeader.from_words(header.words()) == header


def test_all_must_be_ready_for_the_same_view() -> None:
    ready = RoundHeader(staged_epoch=7)
    assert RoundPlan.of({0: ready, 1: ready}).next_epoch == 7
    assert RoundPlan.of({0: ready, 1: RoundHeader(staged_epoch=8)}).next_epoch == 0
    assert RoundPlan.of({0: ready, 1: NEWCOMER_HEADER}).next_epoch == 0


def test_one_with_work_keeps_all_awake() -> None:
    plan = RoundPlan.of({0: RoundHeader(num_tokens=3, idle=False), 1: NEWCOMER_HEADER})
    assert (plan.num_tokens, plan.all_idle) == (3, False)
    assert RoundPlan.of({0: NEWCOMER_HEADER, 1: NEWCOMER_HEADER}).all_idle
