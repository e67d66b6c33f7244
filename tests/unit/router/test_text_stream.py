import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.router.text_stream import TextStream

EOS = 0


class _Letters:
    """Token n is the n-th letter; what follows an upper-case one (n > 26) is held back by one token, as bytes of an
    unfinished character are."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, ids: Sequence[int]) -> str:
        text = self._held + "".join(chr(96 + id) if id <= 26 else chr(64 + id - 26) for id in ids)
        self._held = text[-1] if text and text[-1].isupper() else ""
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _ids(text: str) -> tuple[int, ...]:
    return tuple(ord(c) - 96 if c.islower() else ord(c) - 64 + 26 for c in text)


def test_tokens_become_text_and_are_counted() -> None:
    stream = TextStream(_Letters(), ())
    delta = stream.push(_ids("abC"), (-1.0, -2.0, -3.0), "")
    assert (delta.text, delta.ids, delta.logprobs, delta.finish) == ("ab", _ids("abC"), (-1.0, -2.0, -3.0), "")
    assert stream.push(_ids("d"), (), "length").text == "Cd"
    assert stream.num_tokens == 4


def test_the_end_of_the_sequence_counts_and_is_not_shown() -> None:
    stream = TextStream(_Letters(), ())
    delta = stream.push((*_ids("aB"), EOS), (-1.0, -2.0, -3.0), "stop")
    assert (delta.text, delta.finish, stream.num_tokens) == ("aB", "stop", 3)
    assert delta.logprobs == (-1.0, -2.0, -3.0)


def test_tokens_after_a_stop_string_do_not_count() -> None:
    stream = TextStream(_Letters(), ("cd",))
    assert stream.push(_ids("abc"), (1.0, 2.0, 3.0), "").text == "ab"
    delta = stream.push(_ids("def"), (4.0, 5.0, 6.0), "length")
    assert (delta.text, delta.finish, delta.ids, delta.logprobs) == ("", "stop", _ids("d"), (4.0,))
    assert stream.num_tokens == 4


def test_a_stop_string_may_end_with_held_back_text() -> None:
    stream = TextStream(_Letters(), ("bC",))
    assert stream.push(_ids("abC"), (), "length").text == "a"


def test_held_back_text_is_shown_when_nothing_follows() -> None:
    stream = TextStream(_Letters(), ("cde",))
    assert stream.push(_ids("abcd"), (), "").text == "ab"
    delta = stream.push((EOS,), (), "stop")
    assert (delta.text, delta.finish) == ("cd", "stop")


def test_what_stopped_the_text_is_told_and_alternatives_are_cut_with_their_tokens() -> None:
    stream = TextStream(_Letters(), ("cd", "d"))
    tops = (((1, -1.0),), ((2, -2.0),), ((3, -3.0),))
    delta = stream.push(_ids("bce"), (), "", tops, ((-1.0, ()),))
    assert (delta.stop, delta.top_logprobs, delta.prompt_logprobs) == (None, tops, ((-1.0, ()),))
    delta = stream.push(_ids("xdz"), (), "length", tops)
    assert (delta.stop, delta.finish, delta.top_logprobs) == ("d", "stop", tops[:2])
    assert TextStream(_Letters(), ()).push((EOS,), (), "stop").stop is None


def test_stop_strings_count_from_min_tokens_on() -> None:
    stream = TextStream(_Letters(), ("ab",), min_tokens=3)
    assert stream.push(_ids("ab"), (), "").text == "ab"
    assert stream.push(_ids("ab"), (), "").text == "ab", "the a is one of the first three"
    delta = stream.push(_ids("xab"), (), "")
    assert (delta.text, delta.finish, stream.num_tokens) == ("x", "stop", 7)
    assert TextStream(_Letters(), ("bC",), min_tokens=2).push(_ids("bC"), (), "length").text == "bC"


@given(st.text("abC", max_size=20), st.lists(st.integers(0, 20), max_size=5), st.sampled_from([(), ("ab",), ("aCb",)]))
def test_batches_of_tokens_do_not_matter(text: str, cuts: list[int], stops: tuple[str, ...]) -> None:
    """After a re-dispatch tokens come in other batches, doubled ones cut off; the text is the same."""

    def read(batches: list[str]) -> tuple[str, int, str]:
        stream, shown, finish = TextStream(_Letters(), stops), "", ""
        for number, batch in enumerate(batches):
            delta = stream.push(_ids(batch), (), "length" if number == len(batches) - 1 else "")
            shown, finish = shown + delta.text, delta.finish
            if finish:
                break
        return shown, stream.num_tokens, finish

    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    batches = [text[a:b] for a, b in itertools.pairwise(edges)] or [""]
    assert read(batches) == read(list(text) or [""])
