from dataclasses import replace

import msgspec
import pytest

from common.messages import Abort, Announce, AskPrefill, Have, Prefill, Release, Tokens
from common.state_machine import IllegalTransition
from services.router.request_actions import Deliver, Fail, Replaced, Send
from services.router.request_lifecycle import MOVES, RequestLifecycle, State
from tests.unit.router.conftest import CONFIG, DECODE, OTHER_PLACE, PLACE, PREFILL, REQUEST, ROUTER, SAMPLING


def _tokens(start: int, *ids: int, attempt: int = 0, finish: str = "") -> Tokens:
    return Tokens(REQUEST, attempt, start, ids, (), finish)


def test_a_place_is_told_to_the_rank_before_the_prefill_worker(queued: RequestLifecycle) -> None:
    queued.outputs += [3, 4]
    assert queued.on_place(PLACE, 1.0) == [
        Send(DECODE, Announce(REQUEST, 0, ROUTER, PLACE.incarnation, (10, 11), (3, 4), SAMPLING)),
        Send(
            PREFILL,
            Prefill(REQUEST, 0, ROUTER, (10, 11), (3, 4), SAMPLING, PLACE.rank, PLACE.incarnation, "tcp://decode-0"),
        ),
    ]
    assert queued.state is State.PREFILLING


def test_the_usual_life(prefilling: RequestLifecycle) -> None:
    assert prefilling.on_prefill_done(0.1) == []
    assert prefilling.on_tokens(_tokens(0, 3), 0.2) == [Deliver(REQUEST, 0, (3,), ())]
    assert prefilling.on_tokens(_tokens(1, 4, 5), 0.3) == [Deliver(REQUEST, 1, (4, 5), ())]
    assert prefilling.on_tokens(_tokens(3, 1, finish="stop"), 0.4) == [
        Deliver(REQUEST, 3, (1,), (), "stop"),
        Send(DECODE, Release(REQUEST, 0)),
    ]
    assert prefilling.ended
    assert [line.rpartition(" at ")[0] for line in prefilling.machine.story()[1:]] == [
        "request r.1: queued -> prefilling",
        "request r.1: prefilling -> handing off",
        "request r.1: handing off -> decoding",
        "request r.1: decoding -> done",
    ]


@pytest.mark.parametrize(
    ("start", "ids", "delivered"),
    [
        (0, (3, 4), ()),  # all known
        (1, (4, 5), (5,)),  # overlaps
        (0, (3, 4, 5, 6), (5, 6)),  # everything again, and more
        (2, (5,), (5,)),  # exactly next
        (2, (), ()),  # alive
        (-3, (1, 1, 1, 3, 4, 5), (5,)),  # a start that makes no sense shifts nothing
    ],
)
def test_only_the_new_suffix_is_delivered(
    prefilling: RequestLifecycle, start: int, ids: tuple[int, ...], delivered: tuple[int, ...]
) -> None:
    prefilling.on_tokens(_tokens(0, 3, 4), 0.1)
    assert prefilling.on_tokens(_tokens(start, *ids), 0.2) == (
        [Deliver(REQUEST, 2, delivered, ())] if delivered else []
    )
    assert prefilling.outputs == [3, 4, *delivered]


def test_log_probabilities_go_with_their_tokens(queued: RequestLifecycle) -> None:
    request = RequestLifecycle(
        REQUEST, queued.prompt, msgspec.structs.replace(SAMPLING, logprobs=True), ROUTER, queued.config, arrived=0.0
    )
    request.on_place(PLACE, 0.0)
    request.on_tokens(Tokens(REQUEST, 0, 0, (3, 4), (-0.3, -0.4)), 0.1)
    assert request.on_tokens(Tokens(REQUEST, 0, 1, (4, 5), (-0.4, -0.5)), 0.2) == [Deliver(REQUEST, 2, (5,), (-0.5,))]
    assert request.on_tokens(Tokens(REQUEST, 0, 3, (6,), ()), 0.3) == [], "tokens without what was asked for"


def test_a_gap_is_asked_for_but_not_at_every_token(prefilling: RequestLifecycle) -> None:
    ask = [Send(DECODE, Have(REQUEST, 0, 0))]
    assert prefilling.on_tokens(_tokens(1, 4), 0.10) == ask
    assert prefilling.on_tokens(_tokens(2, 5), 0.12) == []
    assert prefilling.on_tokens(_tokens(3, 6), 0.20) == ask
    assert prefilling.on_tokens(_tokens(0, 3, 4, 5, 6), 0.21) == [Deliver(REQUEST, 0, (3, 4, 5, 6), ())]


def test_a_rank_that_streams_past_a_gap_and_never_fills_it_is_given_up(prefilling: RequestLifecycle) -> None:
    prefilling.on_tokens(_tokens(0, 3), 0.1)
    now, actions = 0.1, []
    while prefilling.state is State.DECODING and now < 20.0:
        now += 0.04
        prefilling.on_tokens(_tokens(2, 5), now)
        actions = prefilling.on_tick(now)
    assert Replaced(REQUEST, 1, "no answer") in actions
    assert now < 6.0


def test_silence_is_asked_about_max_asks_times_then_the_place_is_given_up(prefilling: RequestLifecycle) -> None:
    prefilling.on_tokens(_tokens(0, 3), 1.0)
    ask = [Send(DECODE, Have(REQUEST, 0, 1))]
    assert [prefilling.on_tick(now) for now in (1.9, 2.0, 2.9, 3.0, 4.0)] == [[], ask, [], ask, ask]
    assert prefilling.on_tick(5.0) == [Send(DECODE, Abort(REQUEST, 0)), Replaced(REQUEST, 1, "no answer")]
    assert (prefilling.attempt, prefilling.place, prefilling.avoid) == (1, None, {DECODE})


def test_a_silent_prefill_worker_is_the_one_that_is_asked_and_given_up(prefilling: RequestLifecycle) -> None:
    ask = [Send(PREFILL, AskPrefill(REQUEST, 0))]
    assert [prefilling.on_tick(now) for now in (1.0, 2.0, 3.0)] == [ask] * 3
    assert prefilling.on_tick(4.0)[-1] == Replaced(REQUEST, 1, "no answer")
    assert prefilling.avoid == {PREFILL}


def test_a_queued_prefill_and_a_living_rank_are_waited_for_until_the_deadline(prefilling: RequestLifecycle) -> None:
    for second in range(1, 30):
        prefilling.on_tick(second)
        prefilling.on_prefill_queued(second + 0.1)
    assert prefilling.state.value == "prefilling"
    prefilling.on_tokens(_tokens(0, 3), 30.0)
    for second in range(31, 90):
        prefilling.on_tick(second)
        assert prefilling.on_tokens(_tokens(1), second + 0.1) == []
    assert prefilling.state.value == "decoding"
    assert prefilling.on_tick(90.0) == [Send(DECODE, Abort(REQUEST, 0)), Fail(REQUEST, 504, "no token within 60 s")]


def test_a_rank_that_lives_without_kv_is_no_reason_to_wait(prefilling: RequestLifecycle) -> None:
    """The handoff was lost: the rank answers, and would for ever."""
    prefilling.on_prefill_done(0.0)
    for now in (1.0, 2.0, 3.0):
        assert prefilling.on_tick(now) == [Send(DECODE, Have(REQUEST, 0, 0))]
        assert prefilling.on_tokens(_tokens(0), now + 0.1) == []
    assert Replaced(REQUEST, 1, "no answer") in prefilling.on_tick(4.0)


def test_a_rank_that_computes_the_prompt_itself_is_believed_while_it_lives(queued: RequestLifecycle) -> None:
    (announce,) = queued.on_place(replace(PLACE, prefill=PLACE.decode), 0.0)
    assert announce == Send(DECODE, Announce(REQUEST, 0, ROUTER, PLACE.incarnation, (10, 11), (), SAMPLING, True))
    assert queued.state is State.HANDING_OFF
    for second in range(1, 20):
        assert queued.on_tick(float(second)) == [Send(DECODE, Have(REQUEST, 0, 0))]
        assert queued.on_tokens(_tokens(0), float(second)) == []
    assert queued.on_tick(20.0) and queued.on_tick(21.0) and queued.on_tick(22.0)
    assert isinstance(queued.on_tick(23.0)[-1], Replaced), "it has fallen silent"


def test_kv_of_a_worker_that_is_lost_is_asked_for_at_once(prefilling: RequestLifecycle) -> None:
    prefilling.on_prefill_done(0.0)
    assert prefilling.on_prefill_lost(0.5) == [Send(DECODE, Have(REQUEST, 0, 0))]
    assert prefilling.on_prefill_lost(0.6) == []
    assert prefilling.on_tokens(_tokens(0), 0.7)[-1] == Replaced(REQUEST, 1, "prefill worker lost")


def test_a_prefill_worker_lost_before_or_after_its_work(prefilling: RequestLifecycle) -> None:
    assert prefilling.on_prefill_lost(0.5)[-1] == Replaced(REQUEST, 1, "prefill worker lost")
    prefilling.on_place(OTHER_PLACE, 1.0)
    prefilling.on_tokens(_tokens(0, 3, attempt=1), 1.1)
    assert prefilling.on_prefill_lost(1.2) == []


def test_a_deadline_counts_from_the_last_token(queued: RequestLifecycle) -> None:
    assert queued.on_tick(59.9) == []
    queued.on_place(PLACE, 59.9)
    queued.on_tokens(_tokens(0, 3), 59.95)
    queued.replace("rank lost", 59.97)
    assert queued.on_tick(119.9) == []
    assert queued.on_tick(120.0) == [Fail(REQUEST, 503, "no decode rank and prefill worker had room within 60 s")]
    assert queued.state is State.FAILED


def test_unknown_and_refused_count_from_those_who_owe_an_answer(prefilling: RequestLifecycle) -> None:
    assert prefilling.on_unknown(OTHER_PLACE.decode, 0.1) == []
    prefilling.on_prefill_done(0.2)
    # It forgets what it has handed over.
    assert prefilling.on_unknown(PREFILL, 0.3) == []
    assert prefilling.on_unknown(DECODE, 0.4)[-1] == Replaced(REQUEST, 1, "forgotten")
    assert prefilling.on_unknown(DECODE, 0.5) == []


def test_a_preempted_request_may_go_back_and_is_not_preempted_again(prefilling: RequestLifecycle) -> None:
    prefilling.on_tokens(_tokens(0, 3), 0.5)
    assert isinstance(prefilling.on_refused(DECODE, 1.0, preempted=True)[-1], Replaced)
    assert DECODE not in prefilling.avoid and 1.0 < prefilling.not_before < 1.5
    announce = prefilling.on_place(PLACE, 2.0)[0]
    expected = Announce(REQUEST, 1, ROUTER, PLACE.incarnation, (10, 11), (3,), SAMPLING, False, True)
    assert announce == Send(DECODE, expected)


def test_refusals_are_repeated_ever_more_slowly(prefilling: RequestLifecycle) -> None:
    waits = []
    for now in range(8):
        assert prefilling.on_refused(DECODE, now)[-1] == Replaced(REQUEST, now + 1, "refused")
        waits.append(round(prefilling.not_before - now, 6))
        prefilling.on_place(PLACE, now)
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]


def test_a_token_clears_the_record_of_those_who_failed_before(prefilling: RequestLifecycle) -> None:
    for now in range(5):
        prefilling.on_refused(DECODE, now)
        prefilling.on_place(PLACE, now)
    assert prefilling.avoid == {DECODE}
    prefilling.on_tokens(_tokens(0, 3, attempt=5), 5.0)
    assert prefilling.avoid == set()
    prefilling.on_refused(DECODE, 6.0)
    assert prefilling.not_before == pytest.approx(6.05)


def test_giving_up_a_place_frees_both_ends_of_a_prefill(prefilling: RequestLifecycle) -> None:
    assert prefilling.replace("moved", 0.1) == [
        Send(DECODE, Abort(REQUEST, 0)),
        Send(PREFILL, Abort(REQUEST, 0)),
        Replaced(REQUEST, 1, "moved"),
    ]
    assert prefilling.on_client_gone(0.2) == []
    assert prefilling.state is State.FAILED


@pytest.mark.parametrize("source", list(State))
@pytest.mark.parametrize("target", list(State))
def test_moves_outside_the_table_raise(queued: RequestLifecycle, source: State, target: State) -> None:
    paths: dict[State, tuple[State, ...]] = {
        State.QUEUED: (),
        State.PREFILLING: (State.PREFILLING,),
        State.HANDING_OFF: (State.PREFILLING, State.HANDING_OFF),
        State.DECODING: (State.PREFILLING, State.DECODING),
        State.REPLACING: (State.PREFILLING, State.REPLACING),
        State.DONE: (State.PREFILLING, State.DECODING, State.DONE),
        State.FAILED: (State.FAILED,),
    }
    for state in paths[source]:
        queued.machine.move(state, 0.0)
    if target in MOVES[source]:
        queued.machine.move(target, 0.0)
        assert queued.state is target
    else:
        with pytest.raises(IllegalTransition):
            queued.machine.move(target, 0.0)
        assert queued.state is source


def test_the_table_says_what_the_design_says() -> None:
    ended = {State.DONE, State.FAILED}
    active = {State.PREFILLING, State.HANDING_OFF, State.DECODING}
    assert all(MOVES[state] == frozenset() for state in ended)
    assert all(State.FAILED in MOVES[state] for state in set(State) - ended)
    assert {state for state in State if State.REPLACING in MOVES[state]} == active
    assert {state for state in State if State.PREFILLING in MOVES[state]} == {State.QUEUED, State.REPLACING}


def test_tokens_without_what_was_asked_for_do_not_count() -> None:
    wanted = msgspec.structs.replace(SAMPLING, logprobs=True, num_top_logprobs=2, prompt_logprobs=True)
    request = RequestLifecycle(REQUEST, (10, 11), wanted, ROUTER, CONFIG, arrived=0.0)
    request.on_place(PLACE, 0.0)
    top, judged = ((5, -0.1), (6, -2.0)), ((-3.0, ()),)
    for lacking in (
        Tokens(REQUEST, 0, 0, (5,), (), "", (top,), judged),
        Tokens(REQUEST, 0, 0, (5,), (-0.1,), "", (), judged),
        Tokens(REQUEST, 0, 0, (5,), (-0.1,), "", (top,), ()),
    ):
        assert request.on_tokens(lacking, 0.1) == []
    both = Tokens(REQUEST, 0, 0, (5, 6), (-0.1, -0.2), "", (top, ()), judged)
    assert request.on_tokens(both, 0.2) == [Deliver(REQUEST, 0, (5, 6), (-0.1, -0.2), "", (top, ()), judged)]
    later = Tokens(REQUEST, 0, 1, (6, 7), (-0.2, -0.3), "", ((), top))
    assert request.on_tokens(later, 0.3) == [Deliver(REQUEST, 2, (7,), (-0.3,), "", (top,))]
    again = Tokens(REQUEST, 0, 0, (5, 6, 7, 8), (-0.1, -0.2, -0.3, -0.4), "", (top, (), top, ()), judged)
    assert request.on_tokens(again, 0.4) == [Deliver(REQUEST, 3, (8,), (-0.4,), "", ((),))]
