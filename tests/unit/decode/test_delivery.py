"""Requests of a decode rank: PROTOCOL section 6, bounds, and no block lost whatever comes in whatever order."""

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Directory,
    Have,
    Refused,
    Release,
    Sampling,
    Tokens,
    Unknown,
    Worker,
)
from services.decode.actions import Send
from services.decode.delivery import FINISHED_KEPT_S, REPEAT_S
from services.decode.early_kv import MAX_KEPT, EarlyKv
from services.decode.tombstones import MAX_TOMBSTONES, Tombstones
from tests.unit.decode.delivery_driver import (
    ROUTER,
    STOP,
    announce,
    frames,
    kv,
    make,
    news,
    part,
    run,
    tokens,
)


def test_parameters_that_no_token_can_be_chosen_with_are_refused() -> None:
    """The request would take this rank down, then the next one, for it would be placed again."""
    hot = msgspec.structs.replace(announce(), sampling=Sampling(float("nan"), 1.0, 0, 1, 3))
    assert make().on_announce(hot, 0.0) == [Send(ROUTER, Refused(RequestId("a"), 1, "temperature is out of bounds"))]


def test_from_announcement_to_release() -> None:
    delivery = make()
    assert delivery.on_announce(announce(), 0.0) == []
    assert delivery.on_kv(kv(), frames(), 0.0) == []
    assert news(delivery) == [tokens(0, 10, first_logprob=-0.5)]
    (admission,) = delivery.admit()
    assert (admission.request, len(admission.block_table)) == ("a", 1)
    assert [(piece.start, piece.num_tokens) for piece in admission.pieces] == [(0, 2)]
    (step,) = delivery.steps()
    assert (step.token_ids, step.position, step.output_index) == ((10,), 2, 1)
    delivery.commit(step, 11, -1.0, 1.0)
    assert news(delivery) == [tokens(1, 11)]
    (step,) = delivery.steps()
    assert (step.token_ids, step.position, step.output_index) == ((11,), 3, 2)
    delivery.commit(step, 12, -1.0, 1.0)
    assert news(delivery) == [tokens(2, 12, finish="length")]
    assert list(delivery.steps()) == []
    delivery.on_tick(1.0 + REPEAT_S)
    assert news(delivery) == [tokens(2, 12, finish="length")]
    delivery.on_message(ROUTER, Release(RequestId("a"), 1), (), 2.0)
    delivery.on_tick(10.0)
    assert news(delivery) == []
    assert delivery.on_announce(announce(), 3.0) == [] and delivery.on_kv(kv(), frames(), 3.0) == []
    assert news(delivery) == [], "a released attempt does not come to life again"
    delivery.check_invariants()


def test_stop_token_ends_and_is_delivered() -> None:
    delivery = make()
    delivery.on_announce(announce(), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    news(delivery)
    run(delivery, token=STOP)
    assert news(delivery) == [tokens(1, STOP, finish="stop")]


def test_a_first_token_can_be_the_last() -> None:
    delivery = make()
    delivery.on_announce(announce(max_tokens=1), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    assert news(delivery) == [tokens(0, 10, finish="length", first_logprob=-0.5)]
    assert delivery.admit() == []


def test_outputs_of_an_earlier_attempt_are_continued() -> None:
    delivery = make()
    delivery.on_announce(announce(outputs=(10, 11), attempt=2), 0.0)
    delivery.on_kv(kv(attempt=2, num_tokens=4, token=12), frames(4), 0.0)
    assert news(delivery) == [tokens(2, 12, finish="length", attempt=2, first_logprob=-0.5)]


def test_no_room_is_refused_and_too_long_a_request_too() -> None:
    delivery = make(num_blocks=2, max_waiting=1)
    for name in "ab":
        delivery.on_announce(announce(name), 0.0)
        assert delivery.on_kv(kv(name), frames(), 0.0) == []
        delivery.admit()
    delivery.on_announce(announce("c"), 0.0)
    assert delivery.on_kv(kv("c"), frames(), 0.0) == [], "waits"
    delivery.on_announce(announce("d"), 0.0)
    (refusal,) = delivery.on_kv(kv("d"), frames(), 0.0)
    assert isinstance(refusal.message, Refused)
    delivery.on_announce(announce("e", max_tokens=15), 0.0)
    (refusal,) = delivery.on_kv(kv("e"), frames(), 0.0)
    assert isinstance(refusal.message, Refused) and "KV cache has 8" in refusal.message.reason
    delivery.check_invariants()


def test_announcements_that_the_model_cannot_serve_are_refused() -> None:
    for bad in (announce(outputs=(100,)), announce(outputs=(1, 2, 3)), announce(max_tokens=0)):
        (refusal,) = make().on_announce(bad, 0.0)
        assert isinstance(refusal.message, Refused)


def test_have_is_answered_with_all_from_there() -> None:
    delivery = make()
    have = Have(RequestId("a"), 1, 0)
    assert delivery.on_have(have, ROUTER) == [Send(ROUTER, Unknown(RequestId("a"), 1))]
    delivery.on_announce(announce(), 0.0)
    assert delivery.on_have(have, ROUTER) == []
    assert news(delivery) == [tokens(0)], "alive, nothing yet"
    delivery.on_kv(kv(), frames(), 0.0)
    run(delivery)
    news(delivery)
    delivery.on_have(have, ROUTER)
    assert news(delivery) == [Tokens(RequestId("a"), 1, 0, (10, 11), (-0.5, -1.0))]
    delivery.on_have(Have(RequestId("a"), 1, 2), ROUTER)
    assert news(delivery) == [tokens(2)]
    for wrong in (Have(RequestId("a"), 2, 0), Have(RequestId("a"), 1, 3)):
        (answer,) = delivery.on_have(wrong, ROUTER)
        assert isinstance(answer.message, Unknown)


def test_a_higher_attempt_replaces_a_lower_one() -> None:
    delivery = make()
    delivery.on_announce(announce(), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    run(delivery)
    news(delivery)
    delivery.on_announce(announce(attempt=2, outputs=(10,)), 1.0)
    assert list(delivery.steps()) == []
    delivery.on_kv(kv(), frames(), 1.0)
    assert news(delivery) == [], "KV of the old attempt"
    delivery.on_announce(announce(), 1.0)
    delivery.on_kv(kv(attempt=2, num_tokens=3, token=11), frames(3), 1.0)
    assert news(delivery) == [tokens(1, 11, attempt=2, first_logprob=-0.5)]
    delivery.check_invariants()


def test_abort_frees_blocks_at_once() -> None:
    delivery = make()
    delivery.on_announce(announce(), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    run(delivery)
    delivery.on_message(ROUTER, Abort(RequestId("a"), 1), (), 1.0)
    assert list(delivery.steps()) == []
    delivery.check_invariants()
    (answer,) = delivery.on_have(Have(RequestId("a"), 1, 0), ROUTER)
    assert isinstance(answer.message, Unknown)


def test_requests_of_a_router_that_is_gone_are_dropped() -> None:
    delivery = make()
    delivery.on_announce(announce(), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    delivery.admit()
    assert list(delivery.steps())
    other = Worker(ProcessId("router-1-b"), "router", "router-1", "127.0.0.1", 1, "")
    delivery.on_message(ROUTER, Directory(ProcessId("m"), 1024, 1, (other,)), (), 0.0)
    delivery.on_tick(1.0)
    delivery.on_tick(10.9)
    assert list(delivery.steps()), "it may be away for a moment"
    delivery.on_tick(11.0)
    assert not list(delivery.steps())
    delivery.check_invariants()
    assert isinstance(delivery.on_have(Have(RequestId("a"), 1, 1), ROUTER)[0].message, Unknown)


def test_finished_requests_are_not_kept_for_ever() -> None:
    delivery = make()
    delivery.on_announce(announce(max_tokens=1), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    delivery.on_tick(FINISHED_KEPT_S + 1)
    (answer,) = delivery.on_have(Have(RequestId("a"), 1, 0), ROUTER)
    assert isinstance(answer.message, Unknown)


def test_bounds() -> None:
    early, tombstones = EarlyKv(), Tombstones()
    for number in range(MAX_KEPT + 5):
        early.keep(kv(str(number)), (), 0.0)
    assert len(early) == MAX_KEPT and early.num_dropped == 5
    for number in range(MAX_TOMBSTONES + 5):
        tombstones.bury(RequestId(str(number)), 1)
    assert len(tombstones) == MAX_TOMBSTONES
    assert not tombstones.covers(RequestId("0"), 1) and tombstones.covers(RequestId("10"), 1)
    assert not tombstones.covers(RequestId("10"), 2)


operations = st.tuples(
    st.sampled_from(
        ["announce", "compute", "kv", "part", "end", "have", "abort", "release", "round", "void", "tick", "open"]
    ),
    st.sampled_from("abcdefg"),
    st.integers(1, 3),
    st.integers(1, 8),
)


@given(st.lists(operations, max_size=80))
@example([("compute", "a", 1, 1), ("round", "a", 1, 1), ("compute", "a", 2, 1), ("round", "a", 1, 1)])
def test_outputs_only_grow_and_no_block_is_lost(history: list[tuple[str, str, int, int]]) -> None:
    """``void`` is a round whose tokens are thrown away: nothing may be told of it."""
    delivery = make(num_blocks=5, max_batch=3, max_waiting=2)
    told: dict[tuple[str, int], dict[int, int]] = {}
    outputs_of: dict[tuple[str, int], tuple[int, ...]] = {}  # an attempt is announced with the same ones each time
    now = 0.0
    for kind, name, attempt, number in history:
        now += 0.1
        outputs: tuple[int, ...] = ()
        if kind in ("announce", "compute"):
            told_before = tuple(told.get((name, attempt - 1), {}).values())[:1] if kind == "compute" else ()
            outputs = outputs_of.setdefault((name, attempt), told_before)
            told.setdefault((name, attempt), dict(enumerate(outputs)))
        match kind:
            case "announce":
                delivery.on_announce(announce(name, attempt, outputs, max_tokens=number), now)
            case "compute":
                delivery.on_announce(announce(name, attempt, outputs, num_prompt=number, computes=True), now)
            case "kv":
                delivery.on_kv(kv(name, attempt), frames(), now)
            case "part":
                delivery.on_kv(part(number % 2, 1, name, attempt), frames(1), now)
            case "end":
                delivery.on_kv(kv(name, attempt), (), now)
            case "have":
                delivery.on_have(Have(RequestId(name), attempt, number), ROUTER)
            case "abort":
                delivery.on_message(ROUTER, Abort(RequestId(name), attempt), (), now)
            case "release":
                delivery.on_message(ROUTER, Release(RequestId(name), attempt), (), now)
            case "round":
                run(delivery, token=number, now=now)
            case "void":
                delivery.admit()
                assert len(list(delivery.steps())) <= 3
            case "tick":
                now += number
                delivery.on_tick(now)
            case _:
                if number == 8:
                    delivery.open(Rank(0), Incarnation(7))
                    told.clear()
        live: dict[str, set[int]] = {}
        for item in news(delivery):
            live.setdefault(item.request, set()).add(item.attempt)
            known = told.setdefault((item.request, item.attempt), {})
            for index, token in enumerate(item.ids, item.start):
                assert index <= len(known), "a gap"
                assert known.setdefault(index, token) == token, "an output changed"
        assert all(len(attempts) == 1 for attempts in live.values()) or kind == "announce"
        delivery.check_invariants()
