from hypothesis import given
from hypothesis import strategies as st

from common.allegiance import Allegiance


def test_a_second_monitor_of_the_same_term_is_refused() -> None:
    allegiance = Allegiance()
    assert allegiance.accepts(1024, "a")
    assert not allegiance.accepts(1024, "b")
    assert allegiance.accepts(1024, "a")


def test_after_a_higher_term_the_lower_one_is_refused_for_good() -> None:
    allegiance = Allegiance()
    assert allegiance.accepts(1024, "a") and allegiance.accepts(2048, "b")
    assert not allegiance.accepts(1024, "a")


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from("abc")), max_size=40))
def test_no_two_monitors_of_one_term_are_ever_obeyed(words: list[tuple[int, str]]) -> None:
    allegiance = Allegiance()
    obeyed = [word for word in words if allegiance.accepts(*word)]
    assert [term for term, _ in obeyed] == sorted(term for term, _ in obeyed)
    assert len({term for term, _ in obeyed}) == len(set(obeyed))
