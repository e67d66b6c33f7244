import pytest

from benchmarks.failover_ranks import order_of
from benchmarks.failover_report import (
    Fault,
    Window,
    gap_around,
    gaps_by_group,
    is_perfect,
    join_pauses,
    percentile,
    rate,
    summary,
    table,
    verdict,
    window_figures,
)
from benchmarks.failover_routers import RouterFault
from benchmarks.failover_routers import figures as router_figures


def _record(id: str, times: list[float], logprobs: tuple[str, ...] = ("a", "b"), body: int = 0) -> dict[str, object]:
    return {
        "body": body,
        "id": id,
        "text": "".join(logprobs),
        "logprobs": list(logprobs),
        "times": times,
        "sizes": [1] * len(times),
        "finish": "length",
        "error": "",
    }


FAULT = Fault("kill", 1, at=10.0, removed_at=10.05, rejoined_at=14.0, victims=("v",))


def test_the_gap_that_the_fault_falls_into_counts_and_earlier_ones_do_not() -> None:
    assert gap_around([0.0, 5.0, 9.0, 9.9, 10.4, 10.5], 10.0) == pytest.approx(0.9)
    assert gap_around([9.8, 9.9, 11.9, 12.0], 10.0) == pytest.approx(2.0)


def test_a_stream_that_was_not_open_at_the_fault_has_no_gap() -> None:
    assert gap_around([1.0, 2.0, 9.8], 10.0) is None
    assert gap_around([10.1, 10.2], 10.0) is None


def test_victims_and_survivors_are_kept_apart() -> None:
    records = [_record("v", [9.9, 10.6, 10.7]), _record("s", [9.9, 10.1, 10.2])]
    groups = gaps_by_group(records, [FAULT])
    assert groups["kill victims"] == [pytest.approx(0.7)] and groups["kill survivors"] == [pytest.approx(0.2)]


def test_the_pause_of_a_join_is_the_longest_wait_around_it() -> None:
    records = [_record("s", [13.0, 13.8, 14.2, 15.5, 17.0])]
    assert join_pauses(records, [FAULT]) == [pytest.approx(1.3)]


def test_a_lost_token_and_a_doubled_one_show_as_such() -> None:
    expected = [_record("e0", [0.0, 1.0], body=0), _record("e1", [0.0, 1.0], body=1)]
    records = [_record("v", [9.0, 11.0], ("a",), body=0), _record("s", [9.0, 11.0], ("a", "b", "b"), body=1)]
    figures = summary(records, expected, [FAULT], (8.0, 16.0))
    assert (figures["requests"], figures["completed"], figures["equal_to_fault_free"]) == (2, 2, 0)
    assert (figures["tokens_lost"], figures["tokens_doubled"]) == (1, 1)
    assert figures["kill_to_view_s p50"] == pytest.approx(0.05)
    assert "| kill to view p50 | 50 ms |" in table(figures)


def test_rate_and_percentile() -> None:
    assert rate([_record("s", [0.0, 0.5, 1.0, 1.5])], 0.0, 1.0) == 2.0
    assert percentile([], 0.5) == 0.0 and percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile(list(range(100)), 0.99) == 99


def test_windows_with_a_fault_are_kept_apart_from_the_quiet_ones_beside_them() -> None:
    windows = [
        Window("stop x", False, 0.0, 10.0),
        Window("stop x", True, 10.0, 20.0),
        Window("kill y", True, 30.0, 40.0),
    ]
    records = [_record("a", [1.0, 2.0, 9.0, 9.5]), _record("b", [9.9, 10.5, 31.0, 31.5])]
    figures = window_figures(records, windows)
    assert figures["stop x: gap without it_s max"] == pytest.approx(7.0)
    assert figures["stop x: gap_s max"] == figures["kill y: gap_s max"] == figures["all: gap_s max"] == 20.5
    assert figures["kill y: gap without it_s max"] == 0.0


def test_a_run_is_perfect_only_when_every_stream_is_complete_and_equal() -> None:
    expected = [_record("e", [0.0], body=0)]
    assert is_perfect(verdict([_record("a", [0.0]), _record("b", [5.0])], expected))
    assert not is_perfect(verdict([_record("a", [0.0]), _record("b", [5.0], ("a", "c"))], expected))
    assert not is_perfect(verdict([{**_record("a", [0.0]), "error": "HTTP 503"}], expected))


def test_streams_that_ended_with_their_router_must_begin_right_and_be_answered_when_asked_again() -> None:
    expected = [{**_record("e.1", [0.0]), "sent": 0.0, "ended": 1.0}]
    kill = RouterFault("kill", at=5.0, back_at=7.0, nonce="k")
    broken = {**_record("k.1", [4.0, 4.5], ("a",)), "sent": 4.0, "ended": 5.0, "error": "ClientPayloadError"}
    again = {**_record("o.1", [5.5, 6.0]), "sent": 5.0, "ended": 6.0}
    figures = router_figures([broken, again], expected, [kill])
    assert is_perfect(figures) and figures["first_token_of_the_second_ask_s max"] == 0.5
    assert not is_perfect(router_figures([broken], expected, [kill])), "never asked again"
    assert not is_perfect(router_figures([{**broken, "id": "o.2"}, again], expected, [kill])), "of another router"
    assert not is_perfect(router_figures([{**broken, "logprobs": ["b"]}, again], expected, [kill])), "a wrong token"


def test_stops_lie_between_kills_and_none_is_forgotten() -> None:
    assert order_of(5, 2) == ["kill", "kill", "stop", "kill", "kill", "stop", "kill"]
    for kills in range(6):
        for stops in range(6):
            order = order_of(kills, stops)
            assert (order.count("kill"), order.count("stop")) == (kills, stops)
