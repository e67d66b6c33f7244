"""A rank's epoch state machine: PROTOCOL sections 2 to 5, as far as they concern a rank."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank
from common.messages import Member, Placement, RollAnswer, SlotLeft, View, VoidReport
from services.decode.actions import (
    Action,
    Adopt,
    Announce,
    CloseSlot,
    ForwardView,
    LoadExperts,
    MapHeaps,
    OpenSlot,
    PoisonMembers,
    SayHello,
    Tell,
)
from services.decode.membership import RETRY_S, Membership
from services.decode.rank_state import RankState
from services.decode.rank_status import RankStatus

ME = ProcessId("decode-me")
PLACEMENT = Placement(1, (((0, 1), (0, 1), (0, 1)),))


def member(rank: int, incarnation: int = 1, process: str = "") -> Member:
    name = process or ("decode-me" if rank == 0 else f"decode-{rank}")
    return Member(Rank(rank), Incarnation(incarnation), ProcessId(name), "h", f"tcp://{rank}", f"/heap/{rank}")


def view(epoch: int, *members: Member, term: int = 1) -> View:
    return View(ProcessId("monitor"), term, Epoch(epoch), members or (member(0), member(1)), PLACEMENT)


def joining() -> Membership:
    membership = Membership(ME, 30.0, 0.0)
    assert membership.on_welcome(Rank(0), Incarnation(1), None, 0.0) == [OpenSlot(Rank(0), Incarnation(1))]
    return membership


def serving(epoch: int = 10) -> Membership:
    membership = joining()
    first = view(epoch)
    assert membership.on_prepare(first, Epoch(0), 0.0) == [MapHeaps(first)]
    assert membership.on_heaps_mapped(first.epoch, 0.0) == [LoadExperts(first), Announce(first)]
    assert membership.on_first_headers(first.epoch, 0.0) == [LoadExperts(first), Adopt(first, in_band=True)]
    return membership


def staged(next_view: View) -> Membership:
    """A member of epoch 10 that is ready for ``next_view``."""
    membership = serving()
    membership.on_prepare(next_view, Epoch(10), 1.0)
    membership.on_heaps_mapped(next_view.epoch, 1.0)
    assert membership.awaited_headers == (next_view.epoch, (Rank(2),))
    membership.on_first_headers(next_view.epoch, 1.0)
    assert membership.staged_epoch == next_view.epoch
    return membership


WITH_TWO = view(12, member(0), member(1), member(2, 11))


def test_formation() -> None:
    membership = serving()
    assert (membership.state, membership.epoch, membership.rank) == (RankState.SERVING, 10, 0)


def test_a_newcomer_waits_for_the_first_headers_of_all() -> None:
    membership = joining()
    membership.on_prepare(view(10), Epoch(0), 0.0)
    assert membership.awaited_headers is None, "nothing announced yet"
    membership.on_heaps_mapped(Epoch(10), 0.0)
    assert membership.awaited_headers == (10, (Rank(0), Rank(1)))
    assert membership.on_first_headers(Epoch(9), 0.0) == []


def test_heaps_that_are_not_there_yet_are_tried_again() -> None:
    membership = joining()
    first = view(10)
    membership.on_prepare(first, Epoch(0), 0.0)
    assert membership.on_tick(RETRY_S / 2) == []
    assert membership.on_tick(RETRY_S) == [MapHeaps(first)]
    membership.on_heaps_mapped(Epoch(10), RETRY_S)
    assert membership.on_tick(1.0) == []


def test_a_prepared_view_gives_the_slot_when_the_welcome_was_lost() -> None:
    membership = Membership(ME, 30.0, 0.0)
    membership.on_welcome(NO_RANK, Incarnation(0), None, 0.0)
    first = view(10)
    assert membership.on_prepare(first, Epoch(0), 0.0) == [OpenSlot(Rank(0), Incarnation(1)), MapHeaps(first)]


def test_a_slot_can_be_withdrawn_or_changed_before_the_rank_is_let_in() -> None:
    membership = joining()
    membership.on_prepare(view(10), Epoch(0), 0.0)
    assert membership.on_welcome(Rank(2), Incarnation(5), None, 0.0) == [OpenSlot(Rank(2), Incarnation(5))]
    assert membership.out_of == 10
    assert membership.on_welcome(NO_RANK, Incarnation(0), None, 0.0) == [CloseSlot(was_member=False)]
    assert membership.state is RankState.STANDBY


def test_a_join_that_gives_an_old_member_other_experts_makes_it_load_them_first() -> None:
    """The view that ends a lack of experts may put them into slots of the members, not only of the newcomer."""
    repaired = View(
        ProcessId("monitor"), 1, Epoch(12), WITH_TWO.members, Placement(12, (((0, 2), (0, 1), (0, 1)),)), "joined"
    )
    membership = staged(repaired)
    assert membership.on_clean_round(Epoch(12), 2.0) == [LoadExperts(repaired), Adopt(repaired, in_band=True)]


def test_a_slot_that_was_given_back_is_not_taken_again() -> None:
    """A stopped process wakes up and reads in this order: the view without it, then the Prepare from before it."""
    membership = serving()
    stale = view(12, member(0), member(1), member(2, 11))
    without = view(13, member(1), member(2, 11))
    assert CloseSlot(was_member=True) in membership.on_view(without, 2.0)
    assert membership.on_prepare(stale, Epoch(0), 2.0) == []
    assert membership.on_welcome(Rank(0), Incarnation(1), None, 2.0) == []
    assert membership.state is RankState.STANDBY
    assert membership.on_welcome(Rank(0), Incarnation(14), None, 2.0) == [OpenSlot(Rank(0), Incarnation(14))]


def test_switch_in_band_when_all_are_ready_and_the_round_was_clean() -> None:
    membership = staged(WITH_TWO)
    assert membership.on_clean_round(Epoch(0), 2.0) == []
    assert membership.on_clean_round(Epoch(12), 2.0) == [LoadExperts(WITH_TWO), Adopt(WITH_TWO, in_band=True)]
    assert (membership.epoch, membership.base_epoch, membership.staged_epoch) == (12, 10, 0)


def test_no_switch_after_a_void_round() -> None:
    membership = staged(WITH_TWO)
    report = VoidReport(ME, Rank(0), Incarnation(1), Epoch(10), 77, (1,))
    assert membership.on_void_round(77, (1,), 2.0) == [Tell(report)]
    assert (membership.state, membership.staged_epoch, membership.epoch) == (RankState.VOID, 0, 10)
    assert membership.on_first_headers(Epoch(12), 2.0) == []
    assert membership.on_prepare(WITH_TWO, Epoch(10), 2.0) == []


def test_a_masked_rank_says_so_until_it_gets_a_slot() -> None:
    membership = serving()
    membership.on_view(view(13, member(1)), 1.0)
    membership.on_welcome(NO_RANK, Incarnation(0), None, 1.0, masked=True)
    status = RankStatus.of(membership, life=1)
    assert (status.state, status.rank, status.life) == ("masked", NO_RANK, 1)
    assert status.hello(ME, "decode", "h", 1, "tcp://0", "", "/heap/0").masked
    membership.on_welcome(Rank(0), Incarnation(14), None, 2.0)
    assert RankStatus.of(membership, life=1).state == "joining"


def test_a_prepared_view_for_another_base_is_not_taken() -> None:
    membership = serving()
    assert membership.on_prepare(WITH_TWO, Epoch(9), 1.0) == []
    assert not membership.is_staging


def test_a_repeated_prepare_changes_nothing() -> None:
    membership = staged(WITH_TWO)
    assert membership.on_prepare(WITH_TWO, Epoch(10), 2.0) == []
    assert membership.staged_epoch == 12


def test_a_higher_view_drops_the_prepared_one_and_is_forwarded_once() -> None:
    membership = staged(WITH_TWO)
    newer = view(13)
    assert membership.on_view(newer, 2.0) == [PoisonMembers(), ForwardView(newer, ("tcp://1",)), MapHeaps(newer)]
    assert membership.staged_epoch == 0 and membership.state is RankState.VOID
    assert membership.on_view(newer, 2.0) == []
    assert membership.on_heaps_mapped(Epoch(13), 2.0) == [LoadExperts(newer), Adopt(newer, in_band=False)]
    assert membership.on_view(view(12), 3.0) == [] and membership.num_stale == 1


def test_roll_call_voids_answers_and_is_answered_again() -> None:
    membership = staged(WITH_TWO)
    answer = Tell(RollAnswer(ME, Rank(0), Incarnation(1), Epoch(10), 1, ()))
    assert membership.on_roll_call(Epoch(10), (), 2.0) == [PoisonMembers(), answer]
    assert membership.staged_epoch == 0, "after a roll call nobody switches in band"
    assert membership.on_roll_call(Epoch(10), (), 2.0) == [answer]


def test_roll_call_of_the_epoch_left_in_band_counts_and_older_ones_do_not() -> None:
    membership = staged(WITH_TWO)
    membership.on_clean_round(Epoch(12), 2.0)
    assert membership.counts_roll_call(Epoch(10))
    assert membership.on_roll_call(Epoch(9), (), 2.0) == []
    assert membership.state is RankState.SERVING
    membership.on_view(view(13), 3.0)
    membership.on_heaps_mapped(Epoch(13), 3.0)
    assert not membership.counts_roll_call(Epoch(12))


def test_a_group_that_was_formed_anew_does_not_count_roll_calls_of_the_one_before() -> None:
    membership = serving()
    assert membership.counts_roll_call(Epoch(10))
    assert not membership.counts_roll_call(Epoch(9))


@pytest.mark.parametrize(
    "without_me",
    [
        view(13, member(1)),
        view(13, member(0, incarnation=12), member(1)),
        view(13, member(0, process="decode-other"), member(1)),
    ],
    ids=["no slot", "other incarnation", "other process"],
)
def test_a_view_without_this_incarnation_ends_the_membership(without_me: View) -> None:
    membership = serving()
    left = SlotLeft(ME, Rank(0), Incarnation(1), Epoch(13))
    assert membership.on_view(without_me, 2.0) == [CloseSlot(was_member=True), Tell(left), SayHello()]
    assert (membership.state, membership.rank, membership.view) == (RankState.STANDBY, NO_RANK, None)
    assert membership.on_welcome(Rank(1), Incarnation(14), None, 3.0) == [OpenSlot(Rank(1), Incarnation(14))]


def test_a_newcomer_that_sees_a_higher_view_without_it_prepares_again() -> None:
    membership = joining()
    first = view(10)
    membership.on_prepare(first, Epoch(9), 0.0)
    membership.on_heaps_mapped(Epoch(10), 0.0)
    assert membership.on_view(view(9, member(1)), 0.0) == [] and membership.awaited_headers is not None
    assert membership.on_view(view(11, member(1)), 0.0) == []
    assert membership.out_of == 10 and membership.awaited_headers is None
    assert membership.on_prepare(first, Epoch(9), 0.0) == [], "given up for good"
    again = view(12)
    assert membership.on_prepare(again, Epoch(11), 0.0) == [MapHeaps(again)]


def test_a_newcomer_adopts_a_higher_view_that_holds_it() -> None:
    membership = joining()
    membership.on_prepare(view(10), Epoch(9), 0.0)
    newer = view(11)
    assert membership.on_view(newer, 0.0)[-1] == MapHeaps(newer)
    assert membership.on_heaps_mapped(Epoch(11), 0.0) == [LoadExperts(newer), Adopt(newer, in_band=False)]


def test_formation_begins_anew() -> None:
    membership = serving(10)
    again = view(11)
    assert membership.on_prepare(again, Epoch(0), 1.0) == [PoisonMembers(), MapHeaps(again)]
    assert (membership.state, membership.epoch, membership.out_of) == (RankState.JOINING, 0, 10)
    membership.on_heaps_mapped(Epoch(11), 1.0)
    assert membership.on_first_headers(Epoch(11), 1.0) == [LoadExperts(again), Adopt(again, in_band=True)]


def test_a_new_term_drops_what_the_old_monitor_prepared() -> None:
    membership = staged(WITH_TWO)
    membership.on_term(2)
    assert membership.staged_epoch == 0
    newcomer = joining()
    newcomer.on_prepare(WITH_TWO, Epoch(10), 0.0)
    newcomer.on_heaps_mapped(Epoch(12), 0.0)
    newcomer.on_term(2)
    assert newcomer.awaited_headers is not None, "announced: members may be in that epoch already"


def test_a_lonely_member_leaves() -> None:
    membership = serving()
    membership.on_clean_round(Epoch(0), 20.0)
    membership.on_sign_of_monitor(25.0)
    for now in range(20, 56):
        assert membership.on_tick(float(now)) == []
    assert membership.on_tick(55.1)[0] == CloseSlot(was_member=True)


def test_a_member_that_stood_still_itself_is_not_lonely() -> None:
    """Else all ranks of a host that was suspended would leave at once when it wakes."""
    membership = serving()
    for now in (1.0, 500.0, 507.0, 514.0, 521.0, 528.0):
        assert membership.on_tick(now) == []
    assert membership.on_tick(530.1)[0] == CloseSlot(was_member=True)


def test_stop() -> None:
    membership = serving()
    left = SlotLeft(ME, Rank(0), Incarnation(1), Epoch(10))
    assert membership.on_stop(1.0) == [CloseSlot(was_member=True), Tell(left)]
    assert membership.state is RankState.STOPPED
    assert membership.on_stop(1.0) == []
    assert membership.on_view(view(11), 1.0) == []
    assert membership.on_prepare(view(12), Epoch(11), 1.0) == []


VIEWS = [
    (),  # this rank and rank 1
    (member(0), member(1), member(2, 11)),
    (member(1),),
    (member(0, incarnation=3), member(1)),
]
events = st.one_of(
    st.tuples(st.just("welcome"), st.sampled_from([-1, 0, 2]), st.integers(1, 3)),
    st.tuples(st.just("prepare"), st.integers(1, 30), st.sampled_from([0, 1, 2, 3])),
    st.tuples(st.just("prepare on mine"), st.integers(1, 30), st.sampled_from([0, 1, 3])),
    st.tuples(st.just("view"), st.integers(1, 30), st.sampled_from([0, 1, 2, 3])),
    st.tuples(st.just("mapped"), st.just(0), st.just(0)),
    st.tuples(st.just("headers"), st.just(0), st.just(0)),
    st.tuples(st.just("round"), st.booleans(), st.just(0)),
    st.tuples(st.just("roll call"), st.integers(1, 30), st.just(0)),
    st.tuples(st.just("term"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("tick"), st.integers(0, 40), st.just(0)),
)


def feed(membership: Membership, event: tuple[str, int, int], now: float, pending: list[Action]) -> list[Action]:
    """One event as the stream would give it; "mapped" answers the last MapHeaps."""
    kind, first, second = event
    match kind:
        case "welcome":
            return membership.on_welcome(Rank(first), Incarnation(second if first >= 0 else 0), None, now)
        case "prepare":
            return membership.on_prepare(view(first, *VIEWS[second]), Epoch(max(first - 2, 0)), now)
        case "prepare on mine":
            return membership.on_prepare(view(first, *VIEWS[second]), membership.epoch, now)
        case "view":
            return membership.on_view(view(first, *VIEWS[second]), now)
        case "mapped":
            mapped = next((action for action in reversed(pending) if isinstance(action, MapHeaps)), None)
            return membership.on_heaps_mapped(mapped.view.epoch, now) if mapped else []
        case "headers":
            awaited = membership.awaited_headers
            return membership.on_first_headers(awaited[0], now) if awaited else []
        case "round":
            if membership.state is not RankState.SERVING:
                return []
            if first:
                return membership.on_clean_round(membership.staged_epoch, now)
            return membership.on_void_round(1, (), now)
        case "roll call":
            return membership.on_roll_call(Epoch(first), (), now)
        case "term":
            membership.on_term(first)
            return []
        case _:
            return membership.on_tick(now)


@given(st.lists(events, max_size=60))
@example([("prepare", 2, 0), ("mapped", 0, 0), ("view", 1, 0), ("headers", 0, 0), ("mapped", 0, 0)])
def test_views_never_go_back_and_always_hold_me(history: list[tuple[str, int, int]]) -> None:
    membership, now, epoch = Membership(ME, 30.0, 0.0), 0.0, 0
    pending: list[Action] = []
    poisoned = True
    for event in history:
        now += event[1] if event[0] == "tick" else 0.01
        state_before = membership.state
        actions = feed(membership, event, now, pending)
        pending += actions
        for action in actions:
            match action:
                case PoisonMembers():
                    poisoned = True
                case CloseSlot():
                    epoch, poisoned = 0, True  # another life: another heap and another slot
                case Adopt(view=adopted, in_band=in_band):
                    assert adopted.epoch > epoch
                    me = [m for m in adopted.members if m.process == ME]
                    assert [(m.rank, m.incarnation) for m in me] == [(membership.rank, membership.incarnation)]
                    assert in_band or poisoned or state_before in (RankState.VOID, RankState.JOINING)
                    epoch, poisoned = adopted.epoch, False
                case _:
                    pass
        if membership.state is RankState.SERVING:
            assert membership.epoch == epoch > 0
        assert membership.staged_epoch == 0 or membership.state is RankState.SERVING
        assert membership.staged_epoch == 0 or membership.staged_epoch > membership.epoch
        assert (membership.view is not None) == membership.is_member
