"""The client of demo and eval against a server that misbehaves in every way a server can; and how runs are compared."""

import json
from collections.abc import AsyncIterator, Sequence

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from common.abacus_tasks import Problem
from common.monitor_address import MonitorAddress
from services.cli.chat_client import Stream, run_streams
from services.cli.cluster_state import event_line
from services.cli.demo import _first_difference
from services.cli.evaluate import _compare, _report
from services.cli.kill_loop import KillLoop


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"text": text, "finish_reason": finish, "logprobs": {"token_logprobs": [-0.5] if text else []}}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


SCRIPTS: dict[str, Sequence[bytes]] = {
    "good": [chunk("a"), chunk("b"), chunk("", "stop"), b"data: [DONE]\n\n"],
    "cut": [chunk("a")],
    "error": [chunk("a"), b'data: {"error": {"message": "no rank left"}}\n\n'],
    "noise": [b"data: {]\n\n"],
    "strange": [b'data: {"choices": [{"delta": 3}]}\n\n'],
    "usage": [chunk("a", "length"), b'data: {"choices": [], "usage": {}}\n\n', b": comment\n\n"],
}


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    assert body["stream"] is True
    if body["prompt"] == "busy":
        return web.json_response({"error": {"message": "too many requests"}}, status=429)
    response = web.StreamResponse()
    await response.prepare(request)
    for data in SCRIPTS[body["prompt"]]:
        await response.write(data)
    return response


async def chat(request: web.Request) -> web.Response:
    content = {"content": [{"token": "x", "logprob": -0.25}]}
    first = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    second = {"choices": [{"delta": {"content": "x"}, "logprobs": content, "finish_reason": "stop"}]}
    return web.Response(text=f"data: {json.dumps(first)}\n\ndata: {json.dumps(second)}\n\ndata: [DONE]\n\n")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_post("/v1/completions", complete)
    application.router.add_post("/v1/chat/completions", chat)
    async with TestServer(application) as server:
        yield str(server.make_url("")).rstrip("/")


async def test_what_each_stream_received_or_why_not(url: str) -> None:
    prompts = ("good", "cut", "error", "usage", "busy", "noise", "strange")
    streams = [Stream({"prompt": prompt}) for prompt in prompts]
    await run_streams(url, streams, concurrency=2, deadline_s=20.0)
    good, cut, error, usage, busy, noise, strange = streams
    assert (good.text, good.logprobs, good.finish, good.error, len(good.times)) == ("ab", [-0.5, -0.5], "stop", "", 2)
    assert (good.sizes, good.num_tokens) == ([1, 1], 2)
    assert cut.error == "the stream ended without a reason"
    assert error.error == "no rank left"
    assert (usage.finish, usage.error) == ("length", "")
    assert "no OpenAI chunk" in noise.error and "no OpenAI chunk" in strange.error
    assert busy.error == "HTTP 429: too many requests"


async def test_chat_streams(url: str) -> None:
    stream = Stream({"messages": [{"role": "user", "content": "hi"}]})
    await run_streams(url, [stream], concurrency=1, deadline_s=20.0)
    assert (stream.text, stream.logprobs, stream.finish, stream.error) == ("x", [-0.25], "stop", "")


async def test_no_server_is_an_error_of_the_stream() -> None:
    stream = Stream({"prompt": "good"})
    await run_streams("http://127.0.0.1:9", [stream], concurrency=1, deadline_s=20.0)
    assert "ClientConnectorError" in stream.error


def test_streams_are_the_same_only_to_the_last_bit() -> None:
    expected = Stream({}, text="12 13", logprobs=[-0.1, -0.2], finish="stop")
    assert Stream({}, text="12 13", logprobs=[-0.1, -0.2], finish="stop").is_same(expected)
    assert not Stream({}, text="12 14", logprobs=[-0.1, -0.2], finish="stop").is_same(expected)
    assert not Stream({}, text="12 13", logprobs=[-0.1, -0.20000000000000004], finish="stop").is_same(expected)
    assert not Stream({}, text="12 13", logprobs=[-0.1, -0.2], finish="length").is_same(expected)
    assert not Stream({}, text="12 13", logprobs=[-0.1, -0.2], finish="stop", error="x").is_same(expected)


def test_the_largest_gap_counts_from_the_fault_on() -> None:
    stream = Stream({}, times=[0.0, 5.0, 6.0, 8.0, 8.5])
    assert stream.largest_gap_s(0.0) == 5.0
    assert stream.largest_gap_s(5.5) == 2.0
    assert stream.largest_gap_s(7.0) == 2.0, "the gap that spans the fault counts whole"
    assert stream.largest_gap_s(9.0) == 0.0


def test_differences_are_shown_where_they_begin() -> None:
    assert _first_difference("12 14", "12 34") == "differs at character 3: '12 14' in place of '12 34'"
    assert "at character 2" in _first_difference("12", "12 13")
    assert _first_difference("12", "12") == "same text, other log-probabilities"


def test_accuracy_is_by_kind_and_failed_requests_fail(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [Problem("addition", "1 + 1", "2", "1 1"), Problem("sorting", "sort 2 1", "1 2", "1 2")]
    right = [Stream({}, text=" 2\n", finish="stop"), Stream({}, text="1 2", finish="stop")]
    wrong = [Stream({}, text="3", finish="stop"), Stream({}, text="1 2", finish="stop")]
    failed = [Stream({}, text="2", error="HTTP 503"), Stream({}, text="1 2", finish="stop")]
    kinds = ("addition", "sorting")
    assert _report(kinds, problems, right, 1.0) == 0
    assert _report(kinds, problems, wrong, 0.98) == 1
    assert "expected '2', got '3'" in capsys.readouterr().out
    assert _report(kinds, problems, failed, 0.0) == 1


def test_with_kills_answers_are_compared_one_by_one(capsys: pytest.CaptureFixture[str]) -> None:
    problems = [Problem("addition", "1+1", "2", "1 1"), Problem("addition", "2+2", "4", "2 2")]
    calm = [Stream({}, text="3", finish="stop"), Stream({}, text="4", finish="stop")]
    other = [Stream({}, text="2", finish="stop"), Stream({}, text="5", finish="stop")]  # as many are right
    kills = KillLoop("http://x", MonitorAddress("x", 1), 5.0)
    assert _compare(problems, calm, calm, kills) == 1, "nobody was killed"
    kills.num_killed = 3
    assert _compare(problems, calm, calm, kills) == 0
    assert "3 ranks killed; 2 of 2 answers equal" in capsys.readouterr().out
    assert _compare(problems, calm, other, kills) == 1
    assert "'1+1': '3' without kills, '2' with them" in capsys.readouterr().out
    assert _compare(problems, calm, [calm[0], Stream({}, text="4", error="HTTP 503")], kills) == 1
    kills.failures.append("kill of rank 2: no proof")
    assert _compare(problems, calm, calm, kills) == 1


def test_an_event_is_one_line() -> None:
    line = event_line({"type": "event", "seq": 1, "time": 0.25, "kind": "removed", "rank": 2, "reason": "signal KILL"})
    assert line.endswith(".250 removed rank=2 reason='signal KILL'")
    assert event_line({"kind": "odd"}).endswith("odd")
