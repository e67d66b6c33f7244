"""Continuous batching: admission by places and blocks, in order, without leaks."""

from hypothesis import given
from hypothesis import strategies as st

from common.kv_blocks import BlockAllocator
from services.decode.batch_scheduler import BatchScheduler


def make(num_blocks: int = 4, max_batch: int = 2, max_waiting: int = 3) -> BatchScheduler[str]:
    return BatchScheduler(BlockAllocator(num_blocks, 10), max_batch, max_waiting)


def test_a_finished_request_makes_room_for_the_next() -> None:
    scheduler = make()
    for request in "abc":
        assert scheduler.submit(request, 10) == ""
    assert scheduler.admit() == [("a", (0,)), ("b", (1,))]
    assert scheduler.admit() == []
    scheduler.remove("a")
    assert scheduler.admit() == [("c", (0,))]
    assert [request for request, _ in scheduler.batch()] == ["b", "c"]


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    scheduler = make(max_batch=4)
    scheduler.submit("a", 20)
    scheduler.admit()
    scheduler.submit("large", 40)
    scheduler.submit("small", 10)
    assert scheduler.admit() == []
    scheduler.remove("a")
    assert [request for request, _ in scheduler.admit()] == ["large"]


def test_refusals_say_why() -> None:
    scheduler = make(max_waiting=1)
    assert "KV cache has 40" in scheduler.submit("a", 41)
    scheduler.submit("a", 10)
    assert "wait for KV blocks" in scheduler.submit("b", 10)


@given(st.lists(st.tuples(st.sampled_from(["submit", "admit", "remove"]), st.integers(0, 9), st.integers(1, 45))))
def test_invariants_hold(operations: list[tuple[str, int, int]]) -> None:
    scheduler = make(num_blocks=5, max_batch=3)
    known: set[str] = set()
    for kind, number, positions in operations:
        request = str(number)
        if kind == "submit" and request not in known:
            if not scheduler.submit(request, positions):
                known.add(request)
        elif kind == "admit":
            scheduler.admit()
        elif kind == "remove":
            scheduler.remove(request)
            known.discard(request)
        scheduler.check_invariants()
        assert scheduler.num_running <= 3
        assert scheduler.num_running + scheduler.num_waiting == len(known)
    scheduler.clear()
    assert scheduler.blocks.num_used == 0
