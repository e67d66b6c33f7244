"""How a prompt comes to a decode rank: KV whole or in pieces, early, late, of another attempt; or computed here."""

from common.ids import RequestId
from common.messages import Refused
from services.decode.actions import Send
from services.decode.delivery import INCOMPLETE_KEPT_S
from services.decode.early_kv import KEPT_S
from tests.unit.decode.delivery_driver import ROUTER, announce, frames, kv, make, news, part, run, tokens


def test_kv_without_announcement_waits_for_it_but_not_long() -> None:
    delivery = make()
    delivery.on_kv(kv(), frames(), 0.0)
    assert news(delivery) == []
    delivery.on_announce(announce(), KEPT_S / 2)
    assert news(delivery) == [tokens(0, 10, first_logprob=-0.5)]
    delivery.on_kv(kv("b"), frames(), 0.0)
    delivery.on_tick(KEPT_S * 1.1)
    delivery.on_announce(announce("b"), KEPT_S * 1.1)
    assert news(delivery) == []


def test_wrong_incarnation_is_refused() -> None:
    delivery = make()
    (refusal,) = delivery.on_announce(announce(incarnation=6), 0.0)
    assert isinstance(refusal.message, Refused) and refusal.peer == ROUTER
    delivery.on_announce(announce(), 0.0)
    delivery.on_kv(kv(incarnation=6), frames(), 0.0)
    assert news(delivery) == []


def test_kv_of_another_size_is_refused() -> None:
    for handoff, got in ((kv(num_tokens=3), frames(3)), (kv(), frames(1)), (kv(token=100), frames())):
        delivery = make()
        delivery.on_announce(announce(), 0.0)
        (refusal,) = delivery.on_kv(handoff, got, 0.0)
        assert isinstance(refusal.message, Refused)
        delivery.check_invariants()


def test_kv_in_pieces_in_any_order_before_and_after_its_end() -> None:
    delivery = make()
    delivery.on_kv(part(1), frames(1), 0.0)
    delivery.on_announce(announce(), 0.0)
    delivery.on_kv(part(1), frames(1), 0.0)
    assert delivery.on_kv(kv(), (), 0.1) == [] and delivery.admit() == [], "one piece is on its way"
    assert delivery.on_kv(part(0), frames(1), 0.2) == []
    assert news(delivery) == [tokens(0, 10, first_logprob=-0.5)]
    (admission,) = delivery.admit()
    assert sorted(piece.start for piece in admission.pieces) == [0, 1]
    assert delivery.on_kv(part(0), frames(1), 0.3) == [] and delivery.num_stale == 1
    delivery.check_invariants()


def test_pieces_of_another_attempt_or_incarnation_do_not_count() -> None:
    delivery = make()
    delivery.on_announce(announce(attempt=2), 0.0)
    for stale in (part(0, attempt=1), part(0, attempt=2, incarnation=6)):
        delivery.on_kv(stale, frames(1), 0.0)
    delivery.on_kv(part(1, attempt=2), frames(1), 0.0)
    delivery.on_kv(kv(attempt=2), (), 0.0)
    assert delivery.num_stale == 2 and delivery.admit() == []


def test_a_lost_piece_ends_the_attempt_in_time() -> None:
    delivery = make()
    delivery.on_announce(announce(), 0.0)
    delivery.on_kv(part(0), frames(1), 0.0)
    assert delivery.on_tick(60.0) == [], "prefill takes its time: no end of the KV yet"
    delivery.on_kv(kv(), (), 61.0)
    assert delivery.on_tick(61.0 + INCOMPLETE_KEPT_S / 2) == []
    (refusal,) = delivery.on_tick(61.2 + INCOMPLETE_KEPT_S)
    assert refusal == Send(ROUTER, Refused(RequestId("a"), 1, "some of the KV was lost on the way"))
    assert delivery.on_kv(part(1), frames(1), 63.0) == [] and delivery.num_stale == 1


def test_a_piece_that_does_not_fit_ends_the_attempt() -> None:
    delivery = make()
    delivery.on_announce(announce(), 0.0)
    (refusal,) = delivery.on_kv(part(1, num_tokens=2), frames(2), 0.0)
    assert isinstance(refusal.message, Refused)


def test_kv_that_waits_for_blocks_is_bounded() -> None:
    delivery = make(handoff_bytes=3)
    for name in "ab":
        delivery.on_announce(announce(name), 0.0)
    assert delivery.on_kv(part(0, 2, "a"), frames(2), 0.0) == []
    assert delivery.on_kv(part(0, 1, "b"), frames(1), 0.0) == []
    (refusal,) = delivery.on_kv(part(1, 1, "b"), frames(1), 0.0)
    assert refusal.message == Refused(RequestId("b"), 1, "4 bytes of KV wait for blocks already")
    alone = make(handoff_bytes=1)
    alone.on_announce(announce(), 0.0)
    assert alone.on_kv(part(0, 2), frames(2), 0.0) == [], "or it could never be served"


def test_a_prompt_is_computed_in_parts_without_kv() -> None:
    delivery = make(prompt_tokens=4)
    assert delivery.on_announce(announce(num_prompt=7, outputs=(50, 51), computes=True, max_tokens=4), 0.0) == []
    (admission,) = delivery.admit()
    assert admission.pieces == ()
    parts = []
    for _ in range(3):
        (step,) = delivery.steps()
        assert delivery.steps() == [step], "a void round is made again"
        parts.append((step.position, step.token_ids, step.samples))
        run(delivery)
    assert parts == [(0, (1, 2, 3, 4), False), (4, (5, 6, 7, 50), False), (8, (51,), True)]
    assert news(delivery) == [tokens(2, 11)] and delivery.num_prompt_tokens == 9
    run(delivery, token=12)
    assert news(delivery) == [tokens(3, 12, finish="length")] and delivery.num_prompt_tokens == 9
    delivery.check_invariants()


def test_prompts_share_a_round_and_leave_those_who_decode_their_place() -> None:
    delivery = make(num_blocks=20, prompt_tokens=8)
    delivery.on_announce(announce("decodes"), 0.0)
    delivery.on_kv(kv("decodes"), frames(), 0.0)
    for name, num_prompt in (("long", 18), ("short", 3)):
        delivery.on_announce(announce(name, num_prompt=num_prompt, computes=True), 0.0)
    delivery.admit()
    assert {step.request: len(step.token_ids) for step in delivery.steps()} == {"decodes": 1, "short": 3, "long": 5}
    tight = make(num_blocks=20, prompt_tokens=1)
    for name in "ab":
        tight.on_announce(announce(name, num_prompt=3, computes=True), 0.0)
    for _ in range(10):
        assert sum(len(step.token_ids) for step in tight.steps() if not step.samples) <= 1
        run(tight)
    assert sum(bool(item.finish) for item in news(tight)) == 2
