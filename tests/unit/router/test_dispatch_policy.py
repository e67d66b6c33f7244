from hypothesis import given
from hypothesis import strategies as st

from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.messages import Member
from services.router.dispatch_policy import RankLoad, choose_prefill, choose_rank, plan_moves


def _rank(rank: int, **values: float) -> RankLoad:
    member = Member(Rank(rank), Incarnation(1), ProcessId(f"decode-{rank}"), "host", "", "")
    return RankLoad(member, 100, **values)  # type: ignore[arg-type]


def test_nobody_is_chosen_from_nobody() -> None:
    assert choose_rank([], 1, set(), 0.0) is None
    assert choose_prefill({}, {}, set()) is None


def test_the_less_loaded_then_the_emptier_then_the_lower_rank() -> None:
    busy, idle = _rank(0, num_in_flight=2), _rank(1, num_in_flight=1)
    assert choose_rank([busy, idle], 1, set(), 0.0) is idle
    full, empty = _rank(0, num_reserved_blocks=50), _rank(1, num_reserved_blocks=10)
    assert choose_rank([full, empty], 1, set(), 0.0) is empty
    one, two = _rank(1), _rank(2)
    assert choose_rank([two, one], 1, set(), 0.0) is one


def test_room_comes_before_load_and_avoidance_before_both() -> None:
    full, busy = _rank(0, num_reserved_blocks=95), _rank(1, num_in_flight=7)
    assert choose_rank([full, busy], 10, set(), 0.0) is busy
    assert choose_rank([full, busy], 10, {ProcessId("decode-1")}, 0.0) is full
    assert choose_rank([busy], 10, {ProcessId("decode-1")}, 0.0) is busy


def test_an_avoided_worker_is_chosen_only_if_it_is_the_only_one() -> None:
    assert choose_prefill({ProcessId("p0"): 0, ProcessId("p1"): 9}, {}, {ProcessId("p0")}) == "p1"
    assert choose_prefill({ProcessId("p0"): 0}, {}, {ProcessId("p0")}) == "p0"


def test_a_worker_that_knows_the_prompt_is_chosen_unless_its_queue_is_longer() -> None:
    pending = {ProcessId("p0"): 0, ProcessId("p1"): 100}
    assert choose_prefill(pending, {ProcessId("p1"): 160}, set()) == "p1"
    assert choose_prefill(pending, {ProcessId("p1"): 64}, set()) == "p0"


def test_the_example_of_the_docstring() -> None:
    running = {Rank(r): [(n, RequestId(f"{r}.{n}")) for n in range(5)] for r in (0, 1)}
    moves = plan_moves({**running, Rank(2): []}, {Rank(2)}, 2)
    assert moves == [(RequestId("0.0"), 2), (RequestId("1.0"), 2)]


@given(
    loads=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    num_added=st.integers(0, 3),
    difference=st.integers(0, 5),
)
def test_moves_even_out_and_no_more(loads: list[int], num_added: int, difference: int) -> None:
    running = {Rank(r): [(n, RequestId(f"{r}.{n}")) for n in range(load)] for r, load in enumerate(loads)}
    added = {Rank(len(loads) + n) for n in range(num_added)}
    before = {**{rank: len(requests) for rank, requests in running.items()}, **dict.fromkeys(added, 0)}
    after = dict(before)
    moves = plan_moves({**running, **{rank: [] for rank in added}}, added, difference)
    for request, target in moves:
        source = Rank(int(request.partition(".")[0]))
        assert target in added and source not in added
        assert after[source] - after[target] > max(difference, 1), "a move that was not worth it"
        after[source] -= 1
        after[target] += 1
    assert len({request for request, _ in moves}) == len(moves), "a request moved twice"
    if added:
        busiest = max(after[rank] for rank in running)
        assert busiest - min(after[rank] for rank in added) <= max(difference, 1)
