"""Continuous batching: admission by places and blocks, in order, without leaks."""

from hypothesis import given
from hypothesis import strategies as st

from common.kv_blocks import BlockAllocator
from services.decode.batch_scheduler import BatchScheduler, Room


def make(num_blocks: int = 4, max_batch: int = 2, max_waiting: int = 3) -> BatchScheduler[str]:
    return BatchScheduler(BlockAllocator(num_blocks, 10), max_batch, max_waiting)


def whole(num_positions: int) -> Room:
    return Room(num_positions, num_positions)


def test_a_finished_request_makes_room_for_the_next() -> None:
    scheduler = make()
    for request in "abc":
        assert scheduler.submit(request, whole(10)) == ""
    assert scheduler.admit() == [("a", (0,)), ("b", (1,))]
    assert scheduler.admit() == []
    scheduler.remove("a")
    assert scheduler.admit() == [("c", (0,))]
    assert [request for request, _ in scheduler.batch()] == ["b", "c"]


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    scheduler = make(max_batch=4)
    scheduler.submit("a", whole(20))
    scheduler.admit()
    scheduler.submit("large", whole(40))
    scheduler.submit("small", whole(10))
    assert scheduler.admit() == []
    scheduler.remove("a")
    assert [request for request, _ in scheduler.admit()] == ["large"]


def test_refusals_say_why() -> None:
    scheduler = make(max_waiting=1)
    assert "KV cache has 40" in scheduler.submit("a", whole(41))
    scheduler.submit("a", whole(10))
    assert "wait for KV blocks" in scheduler.submit("b", whole(10))


def test_a_request_starts_with_what_it_needs_and_grows() -> None:
    scheduler = make()
    scheduler.submit("a", Room(5, 30))
    scheduler.submit("b", Room(5, 25))
    assert scheduler.admit() == [("a", (0,)), ("b", (1,))]
    assert scheduler.grow("a", 20) and scheduler.grow("a", 30)
    assert not scheduler.grow("b", 11)
    assert scheduler.victim() == "b"
    scheduler.remove("b")
    assert scheduler.grow("a", 30) and scheduler.blocks.num_free == 1


def test_one_that_reserves_all_is_no_victim_and_never_wants_more() -> None:
    scheduler = make()
    scheduler.submit("a", Room(5, 40))
    scheduler.submit("b", Room(5, 30, reserves_all=True))
    assert scheduler.admit() == [("a", (0,)), ("b", (1, 2, 3))]
    assert scheduler.grow("b", 30)
    assert not scheduler.grow("a", 11) and scheduler.victim() == "a"


@given(
    st.lists(st.tuples(st.sampled_from(["submit", "admit", "remove", "grow"]), st.integers(0, 9), st.integers(1, 45)))
)
def test_invariants_hold(operations: list[tuple[str, int, int]]) -> None:
    scheduler = make(num_blocks=5, max_batch=3)
    known: set[str] = set()
    for kind, number, positions in operations:
        request = str(number)
        if kind == "submit" and request not in known:
            if not scheduler.submit(request, Room(positions // 2 + 1, positions, number % 2 == 0)):
                known.add(request)
        elif kind == "admit":
            scheduler.admit()
        elif kind == "grow" and request in scheduler._running:
            if not scheduler.grow(request, min(positions, scheduler._running[request].most_positions)):
                victim = scheduler.victim()
                scheduler.remove(victim)
                known.discard(victim)
        elif kind == "remove":
            scheduler.remove(request)
            known.discard(request)
        scheduler.check_invariants()
        assert scheduler.num_running <= 3
        assert scheduler.num_running + scheduler.num_waiting == len(known)
    scheduler.clear()
    assert scheduler.blocks.num_used == 0
