import json
from typing import Any

import pytest

from services.router.request_parsing import ApiError, ModelLimits, ParsedRequest, parse_request

LIMITS = ModelLimits("abacus", max_model_len=100, vocab_size=50, eos_token_ids=(1, 2), temperature=0.9, top_k=40)
MESSAGES = [{"role": "user", "content": "hi"}]


def _completion(**fields: Any) -> ParsedRequest:
    return parse_request(json.dumps({"model": "abacus", "prompt": "hi", **fields}).encode(), False, LIMITS)


def _chat(**fields: Any) -> ParsedRequest:
    return parse_request(json.dumps({"model": "abacus", "messages": MESSAGES, **fields}).encode(), True, LIMITS)


def test_defaults_come_from_the_model() -> None:
    parsed = _completion()
    assert (parsed.temperature, parsed.top_p, parsed.top_k, parsed.seed) == (0.9, 1.0, 40, None)
    assert not (parsed.stream or parsed.logprobs or parsed.ignore_eos or parsed.include_usage or parsed.stops)
    assert parsed.sampling(LIMITS, 4, 123).max_tokens == 16
    assert parsed.sampling(LIMITS, 95, 123).max_tokens == 5
    sampling = _chat().sampling(LIMITS, 4, 123)
    assert (sampling.max_tokens, sampling.seed, sampling.stop_token_ids) == (96, 123, (1, 2))


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [("hi", "hi"), (["hi"], "hi"), ([3, 4], (3, 4)), ([[3, 4]], (3, 4)), ("", ""), ([], ()), ([49], (49,))],
)
def test_prompts(prompt: object, parsed: object) -> None:
    assert _completion(prompt=prompt).prompt == parsed


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"max_tokens": 7}, "max_tokens", 7),
        ({"max_completion_tokens": 8}, "max_tokens", 8),
        ({"max_tokens": 7, "max_completion_tokens": 8}, "max_tokens", 8),
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 0}, "top_k", 0),
        ({"top_k": 7}, "top_k", 7),
        ({"top_k": 10**30}, "top_k", 50),
        ({"seed": 5}, "seed", 5),
        ({"seed": -1}, "seed", 2**64 - 1),
        ({"seed": 2**64 + 3}, "seed", 3),
        ({"stop": "x"}, "stops", ("x",)),
        ({"stop": ["x", "y"]}, "stops", ("x", "y")),
        ({"stop": []}, "stops", ()),
        ({"stop": None, "seed": None, "stream": None, "temperature": None}, "temperature", 0.9),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"stream": True, "stream_options": {"include_usage": True}}, "include_usage", True),
        ({"stream": True, "stream_options": {}}, "include_usage", False),
        ({"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}, "stream", False),
        ({"user": "me", "nobody_knows": {"a": 1}}, "stream", False),
    ],
)
def test_parameters(fields: dict[str, Any], attribute: str, value: object) -> None:
    assert getattr(_completion(**fields), attribute) == value
    assert getattr(_chat(**fields), attribute) == value


def test_logprobs_are_a_number_for_completions_and_a_switch_for_chat() -> None:
    assert _completion(logprobs=0).logprobs
    assert _completion(logprobs=5).logprobs
    assert _chat(logprobs=True, top_logprobs=0).logprobs
    assert not _chat(logprobs=False).logprobs


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 3}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.0}, "top_k"),
        ({"seed": "x"}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
        ({"ignore_eos": "no"}, "ignore_eos"),
        ({"n": 2}, "n"),
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
@pytest.mark.parametrize("parse", [_completion, _chat])
def test_what_is_wrong_is_named(parse: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message


@pytest.mark.parametrize(
    "prompt", [None, 3, {"a": 1}, [3, "a"], [3, 50], [-1], [True], [1.5], ["a", "b"], [[1], [2]], [[]] * 2, [None]]
)
def test_wrong_prompts(prompt: object) -> None:
    with pytest.raises(ApiError) as caught:
        _completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        ["hi"],
        [{"content": "hi"}],
        [{"role": 3, "content": "hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 3}]}],
    ],
)
def test_wrong_messages(messages: object) -> None:
    with pytest.raises(ApiError) as caught:
        _chat(messages=messages)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _chat(messages=[{"role": "user", "content": parts}]).prompt == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'"x"', b"\xff", b'{"a": NaN}', b"[" * 200_000])
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(body, False, LIMITS)
    assert caught.value.status == 400


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError) as caught:
        _completion(model="gpt-4")
    assert (caught.value.status, caught.value.param) == (404, "model")
    assert parse_request(b'{"prompt": "hi"}', False, LIMITS).prompt == "hi"


@pytest.mark.parametrize(
    ("fields", "num_prompt_tokens", "param"),
    [
        ({}, 0, "prompt"),
        ({}, 100, "prompt"),
        ({"max_tokens": 1}, 100, "prompt"),
        ({"max_tokens": 51}, 50, "max_tokens"),
    ],
)
def test_prompt_and_answer_must_fit(fields: dict[str, Any], num_prompt_tokens: int, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        _completion(**fields).sampling(LIMITS, num_prompt_tokens, 0)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert _completion(max_tokens=50).sampling(LIMITS, 50, 0).max_tokens == 50
