import json
from typing import Any

import msgspec
import pytest

from common.messages import Sampling
from services.router.api_error import ApiError
from services.router.model_limits import ModelLimits
from services.router.request_parsing import ParsedRequest, parse_request

LIMITS = ModelLimits("abacus", max_model_len=100, vocab_size=50, eos_token_ids=(1, 2), temperature=0.9, top_k=40)
MESSAGES = [{"role": "user", "content": "hi"}]


def _completion(**fields: Any) -> ParsedRequest:
    return parse_request(json.dumps({"model": "abacus", "prompt": "hi", **fields}).encode(), False, LIMITS)


def _chat(**fields: Any) -> ParsedRequest:
    return parse_request(json.dumps({"model": "abacus", "messages": MESSAGES, **fields}).encode(), True, LIMITS)


def test_defaults_come_from_the_model() -> None:
    parsed = _completion()
    assert (parsed.template.temperature, parsed.template.top_p, parsed.template.top_k) == (0.9, 1.0, 40)
    assert (parsed.seed, parsed.n, parsed.echo, parsed.stream, parsed.include_usage) == (None, 1, False, False, False)
    assert msgspec.structs.replace(parsed.template, stop_token_ids=()) == Sampling(0.9, 1.0, 40, 0, 0)
    assert parsed.sampling(LIMITS, 4, 123).max_tokens == 16
    assert parsed.sampling(LIMITS, 95, 123).max_tokens == 5
    sampling = _chat().sampling(LIMITS, 4, 123)
    assert (sampling.max_tokens, sampling.seed, sampling.stop_token_ids) == (96, 123, (1, 2))


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("hi", ("hi",)),
        (["hi"], ("hi",)),
        ([3, 4], ((3, 4),)),
        ([[3, 4]], ((3, 4),)),
        ("", ("",)),
        ([], ((),)),
        ([49], ((49,),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [2]], ("a", (2,))),
    ],
)
def test_prompts(prompt: object, parsed: object) -> None:
    assert _completion(prompt=prompt).prompts == parsed


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
        (
            {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
            "continuous_usage",
            True,
        ),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "continuous_usage", False),
        ({"n": 3, "best_of": 3}, "n", 3),
        ({"suffix": "", "tools": [], "response_format": {"type": "text"}, "best_of": 1}, "n", 1),
        ({"presence_penalty": -2}, "presence_penalty", -2.0),
        ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
        ({"repetition_penalty": 1.1}, "repetition_penalty", 1.1),
        ({"min_p": 0.05}, "min_p", 0.05),
        ({"min_tokens": 3}, "min_tokens", 3),
        ({"stop_token_ids": [7, 8, 7]}, "extra_stop_token_ids", (7, 8)),
        ({"logit_bias": {"5": 1, "07": -100.0}}, "logit_bias", ((5, 1.0), (7, -100.0))),
        ({"user": "me", "nobody_knows": {"a": 1}}, "stream", False),
    ],
)
def test_parameters(fields: dict[str, Any], attribute: str, value: object) -> None:
    for parsed in (_completion(**fields), _chat(**fields)):
        holder: object = parsed if hasattr(parsed, attribute) else parsed.template
        assert getattr(holder, attribute) == value


def test_an_ignored_end_leaves_the_stops_of_the_request() -> None:
    assert _completion(stop_token_ids=[7]).template.stop_ids == (7, 1, 2)
    assert _completion(stop_token_ids=[7], ignore_eos=True).template.stop_ids == (7,)


def test_choices_count_on_from_the_seed() -> None:
    parsed = _completion(seed=2**64 - 1, n=3)
    assert [parsed.sampling(LIMITS, 4, 9, choice).seed for choice in range(3)] == [2**64 - 1, 0, 1]
    assert _completion(n=2).sampling(LIMITS, 4, 9, 1).seed == 10


def test_only_an_echo_may_be_all() -> None:
    assert _completion(max_tokens=0, echo=True).sampling(LIMITS, 4, 9).max_tokens == 1
    with pytest.raises(ApiError, match="max_tokens"):
        _completion(max_tokens=0)
    assert not _completion(echo=True).template.prompt_logprobs
    assert _completion(echo=True, logprobs=0).template.prompt_logprobs


def test_logprobs_are_a_number_for_completions_and_a_switch_for_chat() -> None:
    wanted = [
        (_completion(logprobs=0), (True, 0)),
        (_completion(logprobs=5), (True, 5)),
        (_completion(top_logprobs=0), (False, 0)),
        (_chat(logprobs=True), (True, 0)),
        (_chat(logprobs=True, top_logprobs=20), (True, 20)),
        (_chat(logprobs=False, top_logprobs=0), (False, 0)),
    ]
    for parsed, pair in wanted:
        assert (parsed.template.logprobs, parsed.template.num_top_logprobs) == pair


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
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"echo": 1}, "echo"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e9}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": "0"}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 1.5}, "min_tokens"),
        ({"stop_token_ids": 7}, "stop_token_ids"),
        ({"stop_token_ids": [50]}, "stop_token_ids"),
        ({"stop_token_ids": ["7"]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {"50": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"5": True}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "continuous_usage_stats"),
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
    "prompt", [None, 3, {"a": 1}, [3, "a"], [3, 50], [-1], [True], [1.5], [None], ["a", 1], [[1], [50]], [[["a"]]]]
)
def test_wrong_prompts(prompt: object) -> None:
    with pytest.raises(ApiError) as caught:
        _completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("parse", "fields", "param"),
    [
        (_completion, {"logprobs": 6}, "logprobs"),
        (_completion, {"logprobs": True}, "logprobs"),
        (_chat, {"logprobs": 1}, "logprobs"),
        (_chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (_chat, {"echo": True}, "echo"),
    ],
)
def test_what_is_wrong_for_one_kind_is_named(parse: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


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
    assert _chat(messages=[{"role": "user", "content": parts}]).messages == [{"role": "user", "content": "a\nb"}]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b'"x"', b"\xff", b'{"a": NaN}', b"[" * 200_000])
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(body, False, LIMITS)
    assert caught.value.status == 400


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError) as caught:
        _completion(model="gpt-4")
    assert (caught.value.status, caught.value.param) == (404, "model")
    assert parse_request(b'{"prompt": "hi"}', False, LIMITS).prompts == ("hi",)


@pytest.mark.parametrize(
    ("fields", "num_prompt_tokens", "param"),
    [
        ({}, 0, "prompt"),
        ({}, 100, "prompt"),
        ({"max_tokens": 1}, 100, "prompt"),
        ({"max_tokens": 51}, 50, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, 50, "min_tokens"),
        ({"min_tokens": 17}, 50, "min_tokens"),
    ],
)
def test_prompt_and_answer_must_fit(fields: dict[str, Any], num_prompt_tokens: int, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        _completion(**fields).sampling(LIMITS, num_prompt_tokens, 0)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert _completion(max_tokens=50).sampling(LIMITS, 50, 0).max_tokens == 50
