"""Requests of a decode rank: PROTOCOL section 6, bounds, and no block lost whatever comes in whatever order."""

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.kv_blocks import BlockAllocator
from common.messages import (
    Abort,
    Announce,
    Directory,
    Have,
    KvHandoff,
    KvPart,
    Refused,
    Release,
    Sampling,
    TokenBatch,
    Tokens,
    Unknown,
    Worker,
)
from services.decode.actions import Send
from services.decode.batch_scheduler import BatchScheduler
from services.decode.delivery import FINISHED_KEPT_S, INCOMPLETE_KEPT_S, REPEAT_S, Delivery
from services.decode.early_kv import KEPT_S, MAX_KEPT, EarlyKv
from services.decode.request import RequestLimits
from services.decode.tombstones import MAX_TOMBSTONES, Tombstones

ROUTER, PREFILL = ProcessId("router"), ProcessId("prefill")
STOP = 99


def make(
    num_blocks: int = 8,
    max_batch: int = 4,
    max_waiting: int = 4,
    handoff_bytes: int = 1 << 20,
    prompt_tokens: int = 4,
    kv_reserve_tokens: int = 2,
) -> Delivery:
    scheduler: BatchScheduler[RequestId] = BatchScheduler(BlockAllocator(num_blocks, 4), max_batch, max_waiting)
    limits = RequestLimits(vocab_size=100, max_positions=20, kv_bytes_per_token=1)
    delivery = Delivery(scheduler, limits, handoff_bytes, prompt_tokens, kv_reserve_tokens)
    delivery.open(Rank(0), Incarnation(7))
    return delivery


def announce(
    name: str = "a",
    attempt: int = 1,
    outputs: tuple[int, ...] = (),
    incarnation: int = 7,
    max_tokens: int = 3,
    num_prompt: int = 2,
    computes: bool = False,
) -> Announce:
    sampling = Sampling(0.0, 1.0, 0, 1, max_tokens, stop_token_ids=(STOP,))
    prompt = tuple(range(1, num_prompt + 1))
    return Announce(RequestId(name), attempt, ROUTER, Incarnation(incarnation), prompt, outputs, sampling, computes)


def kv(name: str = "a", attempt: int = 1, num_tokens: int = 2, incarnation: int = 7, token: int = 10) -> KvHandoff:
    return KvHandoff(RequestId(name), attempt, Rank(0), Incarnation(incarnation), num_tokens, token, -0.5)


def frames(num_tokens: int = 2) -> list[memoryview]:
    return [memoryview(bytes(num_tokens))]


def news(delivery: Delivery) -> list[Tokens]:
    """What the routers are told now."""
    sends = delivery.flush(Epoch(5))
    batches = [send.message for send in sends]
    assert all(send.peer == ROUTER for send in sends)
    return [item for batch in batches if isinstance(batch, TokenBatch) for item in batch.items]


def tokens(start: int, *ids: int, finish: str = "", attempt: int = 1, first_logprob: float = -1.0) -> Tokens:
    return Tokens(RequestId("a"), attempt, start, ids, (first_logprob,) * len(ids), finish)


def part(start: int, num_tokens: int = 1, name: str = "a", attempt: int = 1, incarnation: int = 7) -> KvPart:
    return KvPart(RequestId(name), attempt, Rank(0), Incarnation(incarnation), 0, 1, start, num_tokens)


def run(delivery: Delivery, token: int = 11, now: float = 1.0) -> None:
    """One clean round."""
    delivery.make_room()
    delivery.admit()
    for step in delivery.steps():
        if step.samples:
            delivery.commit(step, token, -1.0, now)
        else:
            delivery.advance(step)


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
