import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.stop_strings import StopStrings


def _read(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    finder, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stop = finder.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + finder.flush(), None


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stop"),
    [
        ((), ["a", "b"], "ab", None),
        (("END",), ["one END two"], "one ", "END"),
        (("END",), ["one E", "N", "D two"], "one ", "END"),
        (("END",), ["one EN", "OUGH"], "one ENOUGH", None),
        (("END",), ["EEN", "END"], "EEN", "END"),
        (("aab",), ["a", "a", "a", "b"], "a", "aab"),
        (("END",), ["EN"], "EN", None),
        (("abc", "b"), ["abc"], "a", "b"),
        (("c", "bc", "abc"), ["abc"], "", "abc"),
        (("\n\n",), ["x\n", "\ny"], "x", "\n\n"),
    ],
)
def test_examples(stops: tuple[str, ...], pieces: list[str], shown: str, stop: str | None) -> None:
    assert _read(stops, pieces) == (shown, stop)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopStrings(("END",))
    assert finder.push("oneE") == ("one", None)
    assert finder.push("N") == ("", None)
    assert finder.push("T") == ("ENT", None)
    assert finder.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("END", ""))


_TEXT = st.text("ab", max_size=12)


@given(pieces=st.lists(_TEXT, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple))
def test_the_cut_does_not_matter_and_nothing_of_a_stop_string_is_shown(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    text = "".join(pieces)
    shown, stop = _read(stops, pieces)
    assert (shown, stop) == _read(stops, list(text))
    assert not any(other in shown for other in stops)
    if stop is None:
        assert shown == text
    else:
        assert text.startswith(shown + stop)
