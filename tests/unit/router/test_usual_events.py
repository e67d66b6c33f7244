"""Events that are put together from templates are, byte for byte, those of the general way."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.messages import Sampling
from services.router.answer import Answer
from services.router.choices import Choice, Prompt
from services.router.model_limits import ModelLimits
from services.router.openai_format import ResponseHead
from services.router.request_parsing import ParsedRequest, parse_request
from services.router.text_stream import TextDelta

LIMITS = ModelLimits("m", 512, 100, (99,), 1.0, 1.0, 0)
TEXTS = ("a", "\u00e9", '"text":"","logprobs":null', "\\", "", "\u2028\U0001f600", "\n")


class Texts:
    def shown(self, id: int) -> tuple[str, int]:
        text = TEXTS[id % len(TEXTS)]
        return text, len(text) if id % 3 else 0


def parsed(chat: bool, **fields: object) -> ParsedRequest:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": [1, 2]}
    return parse_request(msgspec.json.encode({"model": "m", "stream": True, **prompt, **fields}), chat, LIMITS)


def answer(request: ParsedRequest, chat: bool, name: str) -> Answer:
    choices = [Choice(Prompt((1, 2), "xy"), Sampling(1.0, 1.0, 0, 0, 9)) for _ in range(request.n)]
    return Answer(ResponseHead("id-1", name, 12, chat), request, choices, Texts())


def delta(number: int, text: str, logprob: float | None) -> TextDelta:
    return TextDelta(text, (number,), () if logprob is None else (logprob,))


DELTAS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, 98),
        st.sampled_from(TEXTS) | st.text(max_size=3),
        st.floats(-50.0, 0.0) | st.just(-1e-9),
        st.sampled_from(["", "", "", "", "length", "two", "missed", "top"]),
    ),
    max_size=12,
)


@given(
    st.booleans(),
    st.booleans(),
    st.sampled_from([{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]),
    st.sampled_from(["m", '"text":"","logprobs":null', "\u00fc"]),
    DELTAS,
)
def test_the_short_way_gives_the_same_bytes(
    chat: bool, logprobs: bool, options: dict[str, bool], name: str, deltas: list[tuple[int, int, str, float, str]]
) -> None:
    wanted = ({"logprobs": True} if chat else {"logprobs": 0}) if logprobs else {}
    request = parsed(chat, n=2, stream_options=options, **wanted)
    short, long = answer(request, chat, name), answer(request, chat, name)
    ended: set[int] = set()
    for index, id, text, logprob, kind in deltas:
        if index in ended:
            continue
        one = delta(id, text, logprob if logprobs else None)
        if kind == "length":
            ended.add(index)
            one = msgspec.structs.replace(one, finish="length")
        elif kind == "two":
            one = msgspec.structs.replace(one, ids=one.ids * 2, logprobs=one.logprobs * 2)
        elif kind == "missed":
            one = msgspec.structs.replace(one, missed_experts=True)
        elif kind == "top" and logprobs:
            one = msgspec.structs.replace(one, top_logprobs=(((id, logprob), (3, -7.0)),))
        event = short.usual_event(index, one)
        if event is None:
            event = events(short, index, one)
        assert event == events(long, index, one)
    assert short.usage == long.usage
    assert short.whole() == long.whole()


def events(answer: Answer, index: int, one: TextDelta) -> bytes:
    return b"".join(b"data: " + msgspec.json.encode(body) + b"\n\n" for body in answer.chunks(index, one))


@pytest.mark.parametrize("chat", [False, True])
def test_the_short_way_is_taken_for_tokens_in_the_middle_only(chat: bool) -> None:
    making = answer(parsed(chat), chat, "m")
    first = delta(1, "a", None)
    assert making.usual_event(0, first) is None, "the first may echo a prompt"
    making.chunks(0, first)
    assert making.usual_event(0, first) is not None
    unasked = msgspec.structs.replace(first, ids=(1, 2), logprobs=(-1.0, -2.0))
    assert making.usual_event(0, unasked) is not None, "nobody asked for log-probabilities"
    assert making.usual_event(0, msgspec.structs.replace(first, finish="stop")) is None
    assert making.usual_event(0, msgspec.structs.replace(first, missed_experts=True)) is None
    assert making.usage.completion_tokens == 4
