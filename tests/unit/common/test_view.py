from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import Member, Placement, View
from common.view import digest, member_of, newcomers, orphans, ranks

PLACEMENT = Placement(1, (((0, 1), (1, 2), (2, -1)), ((2, 0), (0, 1), (1, 2))))


def _member(rank: int, incarnation: int = 1024) -> Member:
    return Member(Rank(rank), Incarnation(incarnation), ProcessId(f"p{rank}.{incarnation}"), "h", f"tcp://h:{rank}", "")


def _view(epoch: int, *members: Member, placement: Placement = PLACEMENT) -> View:
    return View(ProcessId("m"), 1024, Epoch(epoch), members, placement)


def test_a_process_finds_its_slot() -> None:
    view = _view(1, _member(0), _member(2))
    assert member_of(view, ProcessId("p2.1024")) == _member(2)
    assert member_of(view, ProcessId("p1.1024")) is None
    assert ranks(view) == (0, 2)


def test_the_next_incarnation_of_a_slot_is_a_newcomer() -> None:
    before, after = _view(1, _member(0), _member(1)), _view(2, _member(0), _member(1, 1030))
    assert newcomers(after, before) == (_member(1, 1030),)
    assert newcomers(after, None) == after.members


def test_the_digest_tells_epochs_members_and_placements_apart_but_not_who_says_it() -> None:
    base = _view(1, _member(0), _member(1))
    others = [
        _view(2, _member(0), _member(1)),
        _view(1, _member(0)),
        _view(1, _member(0), _member(1, 1025)),
        _view(1, _member(0), _member(1), placement=Placement(2, PLACEMENT.physical_to_logical)),
    ]
    assert len({digest(view) for view in [base, *others]}) == 5
    assert digest(base) == digest(View(ProcessId("other"), 2048, base.epoch, base.members, base.placement, "why"))
    assert 0 <= digest(base) < 2**31


def test_orphans_are_experts_without_a_copy_on_any_member() -> None:
    assert orphans(PLACEMENT, (Rank(0), Rank(1), Rank(2)), 3) == []
    assert orphans(PLACEMENT, (Rank(0),), 3) == [(0, 2), (1, 1)]
