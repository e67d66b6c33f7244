"""What the router makes of experts without a live copy: 503 for who waited too long, or marked answers."""

from common.config import ClusterConfig, DecodeConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages import Member, Placement, Tokens, View
from common.view import has_orphans
from services.router.openai_format import completion_choice, marked
from services.router.request_actions import Deliver, Fail
from services.router.request_lifecycle import RequestLifecycle
from services.router.request_table import RequestTable


def _view(*ranks: int) -> View:
    members = tuple(Member(Rank(r), Incarnation(1), ProcessId(f"d{r}"), "h", f"tcp://{r}", "heap") for r in ranks)
    return View(ProcessId("m"), 1024, Epoch(1024 + len(ranks)), members, Placement(1, (((0, 1), (2, 3)),)))


def test_an_expert_that_only_a_vacant_slot_holds_is_an_orphan() -> None:
    assert not has_orphans(_view(0, 1)) and has_orphans(_view(0)) and has_orphans(_view())


def test_the_deadline_of_a_request_on_a_group_without_room_is_503(prefilling: RequestLifecycle) -> None:
    late = ClusterConfig().router.request_deadline_s + 1000.0
    failure = prefilling.on_tick(late, lacks_experts=True)[-1]
    assert isinstance(failure, Fail) and failure.status == 503 and "too few decode ranks" in failure.message


def test_only_a_group_that_waits_for_experts_lacks_them() -> None:
    for allowed in (False, True):
        table = RequestTable(ProcessId("r"), ClusterConfig(decode=DecodeConfig(allow_missing_experts=allowed)))
        table.on_view(_view(0), 0.0)
        assert table.lacks_experts is not allowed
        table.on_view(_view(0, 1), 1.0)
        assert not table.lacks_experts


def test_a_mark_outlives_the_attempt_that_earned_it(prefilling: RequestLifecycle) -> None:
    def told(start: int, attempt: int, missed: bool) -> bool:
        tokens = Tokens(prefilling.id, attempt, start, (7,), (), missed_experts=missed)
        (deliver,) = [action for action in prefilling.on_tokens(tokens, 1.0) if isinstance(action, Deliver)]
        return deliver.missed_experts

    assert [told(0, 0, False), told(1, 0, True), told(2, 0, False)] == [False, True, True]


def test_the_field_is_there_only_where_something_is_missing() -> None:
    choice = completion_choice(0, "x", None, "", None)
    assert marked(choice, False) == choice and marked(choice, True) == {**choice, "missing_experts": True}
