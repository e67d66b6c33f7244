"""When routers are told of tokens: the first and the last at once, the others together, nothing twice or never."""

from hypothesis import given
from hypothesis import strategies as st

from common.ids import Epoch, ProcessId, RequestId
from common.messages import Abort, Have, Refused, TokenBatch
from services.decode.news import NEVER
from tests.unit.decode.delivery_driver import ROUTER, announce, frames, kv, make, news, run, tokens

INTERVAL_S = 0.02


def test_tokens_of_several_rounds_leave_together() -> None:
    delivery = make(interval_s=INTERVAL_S)
    delivery.on_announce(announce(max_tokens=6), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    assert news(delivery, 0.0) == [tokens(0, 10, first_logprob=-0.5)], "the first one waits for nothing"
    assert delivery.due_at == NEVER
    for token, now in ((11, 0.005), (12, 0.010), (13, 0.015)):
        run(delivery, token, now)
        assert news(delivery, now) == [] and delivery.due_at == INTERVAL_S
    assert news(delivery, INTERVAL_S) == [tokens(1, 11, 12, 13)]
    run(delivery, 14, 0.025)
    assert news(delivery, 0.025) == []
    run(delivery, 15, 0.030)
    assert news(delivery, 0.030) == [tokens(4, 14, 15, finish="length")], "the end waits for nothing either"


def test_rounds_that_are_slower_leave_each_token_at_once() -> None:
    delivery = make(interval_s=INTERVAL_S)
    delivery.on_announce(announce(max_tokens=6), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    assert news(delivery, 0.0)
    for number in range(1, 5):
        now = number * INTERVAL_S
        run(delivery, 10 + number, now)
        assert news(delivery, now) == [tokens(number, 10 + number)]


def test_who_goes_at_once_takes_the_others_along() -> None:
    delivery = make(interval_s=INTERVAL_S)
    for name in "ab":
        delivery.on_announce(announce(name, max_tokens=6), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    news(delivery, 0.0)
    run(delivery, 11, 0.005)
    assert news(delivery, 0.005) == []
    delivery.on_kv(kv("b"), frames(), 0.006)
    assert [(item.request, item.ids) for item in news(delivery, 0.006)] == [("a", (11,)), ("b", (10,))]


def test_a_question_is_answered_at_once_and_with_all() -> None:
    delivery = make(interval_s=INTERVAL_S)
    delivery.on_announce(announce(max_tokens=6), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    news(delivery, 0.0)
    run(delivery, 11, 0.005)
    delivery.on_have(Have(RequestId("a"), 1, 2), ROUTER)
    assert news(delivery, 0.006) == [tokens(1, 11)], "more than was asked for does no harm, less would"


def test_each_router_has_its_own_interval() -> None:
    delivery = make(interval_s=INTERVAL_S)
    other = ProcessId("router-1")
    for name, router in (("a", ROUTER), ("b", other)):
        said = announce(name, max_tokens=9)
        delivery.on_announce(type(said)(said.request, 1, router, said.incarnation, said.prompt, (), said.sampling), 0.0)
    delivery.on_kv(kv("a"), frames(), 0.0)
    assert [send.peer for send in delivery.flush(Epoch(5), 0.0)] == [ROUTER]
    delivery.on_kv(kv("b"), frames(), 0.01)
    assert [send.peer for send in delivery.flush(Epoch(5), 0.01)] == [other]
    run(delivery, 11, 0.015)
    assert [send.peer for send in delivery.flush(Epoch(5), 0.02)] == [ROUTER] and delivery.due_at == 0.03
    assert [send.peer for send in delivery.flush(Epoch(5), 0.03)] == [other]


def test_nobody_is_told_of_what_was_given_up() -> None:
    delivery = make(interval_s=INTERVAL_S)
    delivery.on_announce(announce(max_tokens=6), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    news(delivery, 0.0)
    run(delivery, 11, 0.005)
    delivery.on_message(ROUTER, Abort(RequestId("a"), 1), (), 0.006)
    assert delivery.due_at == NEVER and news(delivery, 1.0) == []


def test_who_makes_room_has_its_tokens_delivered_before() -> None:
    delivery = make(num_blocks=4, interval_s=INTERVAL_S)
    for name in "ab":
        delivery.on_announce(announce(name, max_tokens=8), 0.0)
        delivery.on_kv(kv(name), frames(), 0.0)
    news(delivery, 0.0)
    refusals: list[Refused] = []
    told: list[int] = []
    for number in range(1, 8):
        refusals += [send.message for send in delivery.make_room() if isinstance(send.message, Refused)]
        delivery.admit()
        for send in delivery.flush(Epoch(5), 0.001):
            assert isinstance(send.message, TokenBatch)
            told += [id for item in send.message.items if item.request == "b" for id in item.ids]
        if refusals:
            break
        for step in delivery.steps():
            delivery.commit(step, 10 + number, -1.0, 0.001)
    assert [refusal.request for refusal in refusals] == ["b"] and refusals[0].preempted
    assert told == [*range(11, 10 + number)], "it goes on behind the last one, elsewhere"


@given(st.lists(st.tuples(st.sampled_from(["round", "wait", "have"]), st.integers(0, 30)), max_size=40))
def test_all_is_told_once_in_order_and_in_time(history: list[tuple[str, int]]) -> None:
    delivery = make(num_blocks=8, interval_s=INTERVAL_S)
    delivery.on_announce(announce(max_tokens=16), 0.0)
    delivery.on_kv(kv(), frames(), 0.0)
    now, told, since = 0.0, 0, NEVER
    for kind, number in history:
        if kind == "wait":
            now += number / 1000
        elif kind == "have":
            delivery.on_have(Have(RequestId("a"), 1, told), ROUTER)
        else:
            before = delivery.num_committed
            run(delivery, number, now)
            since = min(since, now) if delivery.num_committed > before else since
        for item in news(delivery, now):
            assert item.start == told
            told += len(item.ids)
            since = NEVER
        assert told == delivery.num_committed or now - since < INTERVAL_S
