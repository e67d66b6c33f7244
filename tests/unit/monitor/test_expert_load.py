"""Balance as it is measured and as it is foretold, from the reports of ranks."""

import pytest

from common.config import ReplicaPolicy
from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import ExpertLoad, Member, Placement, View
from common.placement import PhysicalToLogical
from services.monitor.expert_load import ExpertBalance

# Two experts, both on both ranks.
PLACEMENT: PhysicalToLogical = (((0, 1), (0, 1)),)
SKEWED = ((90, 10),)


def view(epoch: int = 5) -> View:
    members = tuple(Member(Rank(r), Incarnation(1), ProcessId(f"d{r}"), "h", "e", "x") for r in range(2))
    return View(ProcessId("m"), 1, Epoch(epoch), members, Placement(3, PLACEMENT))


def report(rank: int, served: int, passes: int = 10, epoch: int = 5) -> ExpertLoad:
    return ExpertLoad(Rank(rank), Incarnation(1), 3, SKEWED, passes, 0.1, Epoch(epoch), (served,), passes)


def balance(policy: ReplicaPolicy, *reports: ExpertLoad) -> ExpertBalance:
    made = ExpertBalance(1, 2, policy)
    for number, told in enumerate(reports):
        made.on_load(told, number * 0.5)
    return made


@pytest.mark.parametrize(("policy", "foretold"), [(ReplicaPolicy.HASH, 1.0), (ReplicaPolicy.GATHER, 0.5 / 0.9)])
def test_until_all_have_told_balance_is_foretold_by_the_policy_in_force(policy: ReplicaPolicy, foretold: float) -> None:
    figures = balance(policy, report(0, 180)).figures(view())
    assert figures["balancedness"] == figures["foretold_balancedness"] == pytest.approx(foretold, abs=1e-4)
    assert figures["served_entries"] == 0


def test_what_ranks_have_computed_is_what_is_shown() -> None:
    figures = balance(ReplicaPolicy.HASH, report(0, 180), report(1, 20)).figures(view())
    assert figures["balancedness"] == pytest.approx(100 / 180, abs=1e-4)
    assert (figures["foretold_balancedness"], figures["served_entries"]) == (1.0, 200)
    assert figures["layers"] == [figures["balancedness"]]


def test_ranks_that_report_at_different_times_are_compared_by_the_pass() -> None:
    figures = balance(ReplicaPolicy.HASH, report(0, 1000, passes=100), report(1, 10, passes=1)).figures(view())
    assert figures["balancedness"] == 1.0


def test_a_new_epoch_begins_anew_and_late_words_of_the_old_one_are_dropped() -> None:
    even = [report(0, 100, epoch=6), report(1, 100, epoch=6)]
    made = balance(ReplicaPolicy.HASH, report(0, 180), report(1, 20), *even, report(0, 900))
    assert made.figures(view(6))["balancedness"] == 1.0
    assert made.figures(view(7))["served_entries"] == 0, "nothing has been told of it"


def test_what_is_of_another_model_changes_nothing() -> None:
    good = balance(ReplicaPolicy.HASH, report(0, 180), report(1, 20))
    before = good.figures(view())
    good.on_load(ExpertLoad(Rank(0), Incarnation(1), 3, ((1, 2, 3),), 1, 0.1, Epoch(5), (1, 2), 1), 9.0)
    good.on_load(ExpertLoad(Rank(0), Incarnation(1), 3, ((1, 2, 3),), 1, 0.1, Epoch(5), (-1,), 1), 9.0)
    assert good.figures(view()) == before
