from common.config import ClusterConfig, RouterConfig
from common.ids import Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Announce,
    Directory,
    Member,
    Placement,
    Prefill,
    PrefillDone,
    Refused,
    TokenBatch,
    Tokens,
    Unknown,
    View,
    Worker,
)
from services.router.request_actions import Action, Deliver, Replaced, Send
from services.router.request_lifecycle import State
from services.router.request_table import RequestTable
from tests.unit.router.conftest import REQUEST, ROUTER, SAMPLING

MONITOR = ProcessId("monitor-0")


def _member(rank: int, incarnation: int = 100) -> Member:
    process = ProcessId(f"decode-{rank}-{incarnation}")
    return Member(Rank(rank), Incarnation(incarnation), process, "host", f"tcp://{process}", "")


def _view(epoch: int, *members: Member) -> View:
    return View(MONITOR, 1, Epoch(epoch), members, Placement(epoch, ()))


def _directory(version: int, *names: str, state: str = "up", term: int = 1) -> Directory:
    workers = tuple(Worker(ProcessId(n), "prefill", n, "host", 1, f"tcp://{n}", state) for n in names)
    return Directory(MONITOR, term, version, workers)


def _table(*members: Member, workers: tuple[str, ...] = ("p0",)) -> RequestTable:
    router = RouterConfig(rebalance_difference=2)
    table = RequestTable(ROUTER, ClusterConfig(router=router))
    table.on_directory(_directory(1, *workers), 0.0)
    if members:
        table.on_view(_view(1, *members), 0.0)
    return table


def _submit(table: RequestTable, number: int, now: float = 0.0, prompt_tokens: int = 2) -> list[Action]:
    return table.on_submit(RequestId(f"r.{number}"), tuple(range(prompt_tokens)), SAMPLING, now)


def _announced(actions: list[Action]) -> list[tuple[str, int]]:
    """(request, rank) of the placements in ``actions``."""
    return [
        (a.message.request, a.message.rank) for a in actions if isinstance(a, Send) and isinstance(a.message, Prefill)
    ]


def _batch(rank: int, *items: Tokens, incarnation: int = 100, running: int = 0, free: int = 1000) -> TokenBatch:
    return TokenBatch(Rank(rank), Incarnation(incarnation), Epoch(1), items, running, free)


def test_requests_spread_by_load_before_any_report() -> None:
    table = _table(_member(0), _member(1), _member(2))
    ranks = [rank for number in range(6) for _, rank in _announced(_submit(table, number))]
    assert ranks == [0, 1, 2, 0, 1, 2]


def test_requests_wait_for_a_view_and_a_prefill_worker_and_go_in_order() -> None:
    table = RequestTable(ROUTER, ClusterConfig())
    assert _submit(table, 1) == _submit(table, 2) == []
    assert table.on_view(_view(1, _member(0)), 1.0) == []
    assert _announced(table.on_directory(_directory(1, "p0"), 2.0)) == [("r.1", 0), ("r.2", 0)]


def test_a_lost_rank_loses_its_requests_at_once_and_they_go_before_new_ones() -> None:
    table = _table(_member(0))
    _submit(table, 1)
    table.on_message(_member(0).process, _batch(0, Tokens(RequestId("r.1"), 0, 0, (5,), ())), 0.1)
    actions = table.on_view(_view(2), 0.2)
    assert Replaced(RequestId("r.1"), 1, "rank lost") in actions
    _submit(table, 2, 0.3)
    placed = table.on_view(_view(3, _member(0, 103)), 0.4)
    assert _announced(placed) == [("r.1", 0), ("r.2", 0)]
    announce = next(a.message for a in placed if isinstance(a, Send) and isinstance(a.message, Announce))
    assert (announce.attempt, announce.outputs, announce.incarnation) == (1, (5,), 103)


def test_a_slot_with_a_new_incarnation_is_another_rank() -> None:
    table = _table(_member(0))
    _submit(table, 1)
    actions = table.on_view(_view(2, _member(0, 102)), 0.2)
    assert Replaced(RequestId("r.1"), 1, "rank lost") in actions
    assert _announced(actions) == [("r.1", 0)]


def test_older_views_and_directories_change_nothing() -> None:
    table = _table(_member(0))
    table.on_view(_view(5, _member(1)), 0.1)
    assert table.on_view(_view(5, _member(0)), 0.2) == table.on_view(_view(4, _member(0)), 0.2) == []
    assert _announced(_submit(table, 1, 0.3)) == [("r.1", 1)]
    table.on_directory(_directory(4, "p1"), 0.4)
    table.on_directory(_directory(3, "p2"), 0.4)
    assert Replaced(RequestId("r.1"), 2, "prefill worker lost") in table.on_directory(_directory(1, "p3", term=2), 0.5)
    prefills = [a.peer for a in _submit(table, 2, 0.6) if isinstance(a, Send) and isinstance(a.message, Prefill)]
    assert prefills == ["p3"]


def test_a_worker_that_drains_gets_nothing_new_and_keeps_what_it_has() -> None:
    table = _table(_member(0), workers=("p0", "p1"))
    _submit(table, 1)
    assert table.on_directory(_directory(2, "p0", state="draining"), 0.1) == []
    assert _submit(table, 2, 0.2) == []


def test_a_new_rank_gets_waiting_requests_and_a_share_of_the_running_ones() -> None:
    table = _table(_member(0), _member(1))
    for number in range(10):
        _submit(table, number, prompt_tokens=20 - number)
    actions = table.on_view(_view(2, _member(0), _member(1), _member(2)), 1.0)
    moved = [action.request for action in actions if isinstance(action, Replaced)]
    # 5 and 5 become 4, 4 and 2; the shortest move, since they are the cheapest to compute again.
    assert moved == ["r.8"], "one prefill worker, one move at a time: each pauses its stream for all before it"
    assert _announced(actions) == [("r.8", 2)]
    peer, arrived = _member(2).process, Tokens(RequestId("r.8"), 1, 0, (7,), (-0.5,))
    assert _announced(table.on_message(peer, _batch(2, arrived), 1.1)) == [("r.9", 2)]
    arrived = Tokens(RequestId("r.9"), 1, 0, (7,), (-0.5,))
    assert _announced(table.on_message(peer, _batch(2, arrived), 1.2)) == []
    table.check_invariants()


def test_moves_to_a_rank_that_is_gone_again_are_forgotten() -> None:
    table = _table(_member(0), _member(1))
    for number in range(10):
        _submit(table, number)
    table.on_view(_view(2, _member(0), _member(1), _member(2)), 1.0)
    back = table.on_view(_view(3, _member(0), _member(1)), 1.1)
    assert [action.reason for action in back if isinstance(action, Replaced)] == ["rank lost"]
    assert not any(rank == 2 for _, rank in _announced(back + table.on_tick(1.2)))


def test_small_differences_move_nothing() -> None:
    table = _table(_member(0), _member(1))
    for number in range(4):
        _submit(table, number)
    assert table.on_view(_view(2, _member(0), _member(1), _member(2)), 1.0) == []


def test_tokens_that_nobody_waits_for_are_answered_with_abort() -> None:
    table = _table(_member(0))
    _submit(table, 1)
    peer, request = _member(0).process, RequestId("r.1")
    gone = Tokens(RequestId("r.99"), 4, 0, (7,), ())
    assert table.on_message(peer, _batch(0, gone), 0.1) == [Send(peer, Abort(RequestId("r.99"), 4))]
    table.on_message(peer, Unknown(request, 0), 0.2)
    old = _batch(0, Tokens(request, 0, 0, (7,), ()))
    assert table.on_message(peer, old, 0.3) == [Send(peer, Abort(request, 0))]
    other = _batch(0, Tokens(request, 1, 0, (7,), ()), incarnation=99)
    assert table.on_message(peer, other, 0.4) == [Send(peer, Abort(request, 1))]
    assert table.num_stale_tokens == 3
    new = _batch(0, Tokens(request, 1, 0, (7,), ()))
    assert table.on_message(peer, new, 0.5) == [Deliver(request, 0, (7,), ())]


def test_words_about_an_old_attempt_change_nothing() -> None:
    table = _table(_member(0), _member(1))
    _submit(table, 1)
    table.on_message(_member(0).process, Refused(RequestId("r.1"), 0, "full"), 0.1)
    for message in (Refused(RequestId("r.1"), 0, "full"), Unknown(RequestId("r.1"), 0), PrefillDone(REQUEST, 0)):
        assert table.on_message(_member(0).process, message, 0.2) == table.on_tick(0.1) == []
    request = table.request(RequestId("r.1"))
    assert request is not None and request.attempt == 1 and request.state is State.REPLACING


def test_a_refused_request_goes_elsewhere_after_a_moment() -> None:
    table = _table(_member(0), _member(1))
    _submit(table, 1)
    _submit(table, 2)
    _submit(table, 3)
    table.on_message(_member(0).process, Refused(RequestId("r.1"), 0, "full"), 1.0)
    assert _announced(table.on_tick(1.01)) == []
    # Rank 1 has as many requests as rank 0, but rank 0 has just refused this one.
    assert _announced(table.on_tick(1.06)) == [("r.1", 1)]


def test_reports_of_other_routers_requests_count_while_they_are_fresh() -> None:
    table = _table(_member(0), _member(1))
    table.on_message(_member(0).process, _batch(0, running=9), 1.0)
    assert _announced(_submit(table, 1, 1.5)) == [("r.1", 1)]
    assert _announced(_submit(table, 2, 1.5)) == [("r.2", 1)]
    assert _announced(_submit(table, 3, 3.0)) == [("r.3", 0)]


def test_a_new_incarnation_is_not_judged_by_the_reports_of_the_old_one() -> None:
    table = _table(_member(0), _member(1))
    table.on_message(_member(0).process, _batch(0, running=9, free=0), 1.0)
    table.on_view(_view(2, _member(0, 102), _member(1)), 1.1)
    assert _announced(_submit(table, 1, 1.2)) == [("r.1", 0)]


def test_a_rank_without_free_blocks_is_the_last_choice() -> None:
    table = _table(_member(0), _member(1))
    _submit(table, 1)  # on rank 0
    table.on_message(_member(1).process, _batch(1, free=0), 1.0)
    assert _announced(_submit(table, 2, 1.1)) == [("r.2", 0)]


def test_a_client_that_leaves_frees_both_ends() -> None:
    table = _table(_member(0))
    _submit(table, 1)
    request = RequestId("r.1")
    assert table.on_client_gone(request, 0.1) == [
        Send(_member(0).process, Abort(request, 0)),
        Send(ProcessId("p0"), Abort(request, 0)),
    ]
    assert len(table) == 0
    assert table.on_client_gone(request, 0.2) == []


def test_prefill_goes_to_the_worker_with_the_fewest_tokens_to_compute() -> None:
    table = _table(_member(0), workers=("p0", "p1"))
    peers = []
    for number, tokens in enumerate((100, 10, 10, 10)):
        actions = _submit(table, number, prompt_tokens=tokens)
        peers += [a.peer for a in actions if isinstance(a, Send) and isinstance(a.message, Prefill)]
    assert peers == ["p0", "p1", "p1", "p1"]


def _computing(actions: list[Action]) -> list[str]:
    """Requests that a rank is asked to compute itself."""
    messages = [a.message for a in actions if isinstance(a, Send) and isinstance(a.message, Announce)]
    return [message.request for message in messages if message.computes_prompt]


def test_with_no_prefill_worker_left_ranks_compute_prompts_until_one_returns() -> None:
    table = _table(_member(0), _member(1))
    _submit(table, 1)
    moved = table.on_directory(_directory(2), 1.0)
    assert [type(action) for action in moved] == [Send, Send, Replaced], "its worker is gone: it waits"
    assert table.waits_for_prefill(1.9) and table.on_tick(1.9) == []
    assert _computing(table.on_tick(2.1)) == ["r.1"]
    assert _computing(_submit(table, 2, 2.2)) == ["r.2"] and not table.waits_for_prefill(2.2)
    assert table.on_directory(_directory(3, "p1", state="loading"), 2.3) == []
    assert _computing(_submit(table, 3, 2.4)) == ["r.3"]
    assert table.on_directory(_directory(4, "p1"), 2.5) == [], "what is being computed stays where it is"
    back = _submit(table, 4, 2.6)
    assert _computing(back) == [] and _announced(back) != []
    table.check_invariants()


def test_the_first_prefill_worker_is_given_time_to_load() -> None:
    table = _table(_member(0), workers=())
    _submit(table, 1)
    assert table.on_tick(9.9) == [] and table.waits_for_prefill(9.9)
    assert _computing(table.on_tick(10.1)) == ["r.1"]
    unheard = RequestTable(ROUTER, ClusterConfig())
    unheard.on_view(_view(1, _member(0)), 0.0)
    assert _submit(unheard, 1) == [] and unheard.on_tick(100.0) == [], "no directory: nobody knows"


def test_requests_move_to_a_new_rank_without_prefill_workers_too() -> None:
    table = _table(_member(0), workers=())
    for number in range(6):
        _submit(table, number, 20.0)
    table.on_tick(20.0)
    assert len(_computing(table.on_view(_view(2, _member(0), _member(1)), 20.0))) == 1, "one at a time"
