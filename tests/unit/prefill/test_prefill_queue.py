"""Chunked prefill: budget, order, fairness, aborts in the middle of a batch."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from common.config import PrefillConfig
from common.ids import Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    AskPrefill,
    Directory,
    Prefill,
    PrefillDone,
    PrefillQueued,
    Refused,
    Sampling,
    Unknown,
    Worker,
)
from services.prefill.decode_links import UNUSED_S, DecodeLinks
from services.prefill.prefill_queue import Attempt, Chunk, PrefillLimits, PrefillQueue

CHUNK = 8
ROUTER_LOST_S = 10.0


def make(num_blocks: int = 20, cached_blocks: int = 0) -> PrefillQueue:
    config = PrefillConfig(1, CHUNK, num_blocks, prefix_cache_bytes=cached_blocks)
    return PrefillQueue.of(config, 4, PrefillLimits(vocab_size=100, max_positions=50, kv_block_bytes=1), ROUTER_LOST_S)


def prefill(name: str, num_tokens: int, attempt: int = 1, num_outputs: int = 0) -> Prefill:
    sampling = Sampling(0.0, 1.0, 0, 1, 10)
    prompt = tuple(range(1, num_tokens + 1))
    return Prefill(
        RequestId(name),
        attempt,
        ProcessId("router"),
        prompt,
        tuple(range(50, 50 + num_outputs)),
        sampling,
        Rank(0),
        Incarnation(1),
        "tcp://0",
    )


def shape(batch: list[Chunk]) -> list[tuple[str, int, int, bool]]:
    return [(chunk.prefill.request, chunk.start, len(chunk.tokens), chunk.is_last) for chunk in batch]


def compute(queue: PrefillQueue) -> list[str]:
    """Names of the requests that are done after one batch."""
    batch = queue.next_batch()
    return [chunk.prefill.request for chunk in queue.on_computed(batch)]


def test_an_attempt_that_comes_again_within_a_batch_is_computed_from_its_start() -> None:
    """Other blocks hold it now: what the batch has computed lies in those that the abort gave back."""
    queue = make()
    for num_tokens in (12, 6):
        queue.on_prefill(prefill("a", num_tokens))
        batch = queue.next_batch()
        queue.on_abort(Abort(RequestId("a"), 1))
        queue.on_prefill(prefill("a", num_tokens))
        assert queue.on_computed(batch) == []
        assert [chunk.start for chunk in queue.next_batch()] == [0]
        queue.on_abort(Abort(RequestId("a"), 1))
        queue.check_invariants()


def test_a_long_prompt_alone_takes_whole_batches() -> None:
    queue = make()
    assert queue.on_prefill(prefill("a", 18, num_outputs=2)) is None
    batches = []
    while batch := queue.next_batch():
        batches.append(shape(batch))
        queue.on_computed(batch)
    assert batches == [[("a", 0, 8, False)], [("a", 8, 8, False)], [("a", 16, 4, True)]]
    assert queue.num_tokens_computed == 20 and queue.blocks.num_used == 0


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    queue = make()
    queue.on_prefill(prefill("long", 30))
    queue.on_prefill(prefill("short", 3))
    assert shape(queue.next_batch()) == [("long", 0, 5, False), ("short", 0, 3, True)]


def test_short_prompts_do_not_wait_for_many_long_ones() -> None:
    queue = make(num_blocks=100)
    for name in "xyz":
        queue.on_prefill(prefill(name, 40))
    compute(queue)
    queue.on_prefill(prefill("short", 3))
    assert compute(queue) == ["short"]


def test_a_long_prompt_waits_for_as_many_batches_as_it_needs_itself() -> None:
    """However many short ones come after it: 24 tokens are three batches, and then it has the next one."""
    queue = make(num_blocks=100)
    queue.on_prefill(prefill("long", 24))
    done: list[str] = []
    for number in range(12):
        queue.on_prefill(prefill(f"short-{number}", CHUNK))
        done += compute(queue)
    assert done.index("long") <= 6
    assert len(done) == 9 + 1, "no batch was left empty"


def test_what_a_prompt_shares_with_an_earlier_one_is_not_computed() -> None:
    queue = make(num_blocks=6, cached_blocks=4)
    queue.on_prefill(prefill("a", 11))
    assert compute(queue) == [] and compute(queue) == ["a"]
    assert queue.prefixes.num_bytes == 2, "whole blocks only"
    queue.on_prefill(prefill("again", 11, attempt=2, num_outputs=3))
    (chunk,) = queue.next_batch()
    assert (chunk.start, chunk.tokens, chunk.is_last) == (8, (9, 10, 11, 50, 51, 52), True)
    assert len(set(chunk.block_table)) == 4
    queue.on_computed([chunk])
    assert (queue.prefixes.num_hits, queue.prefixes.num_tokens_saved, queue.prefixes.num_bytes) == (1, 8, 3)
    queue.check_invariants()


def test_the_last_token_is_always_computed() -> None:
    queue = make(cached_blocks=4)
    queue.on_prefill(prefill("a", 8))
    compute(queue)
    queue.on_prefill(prefill("a", 8, attempt=2))
    assert shape(queue.next_batch()) == [("a", 4, 4, True)]


def test_a_prompt_that_is_judged_is_computed_whole() -> None:
    queue = make(cached_blocks=4)
    plain = prefill("a", 8)
    judged = msgspec.structs.replace(
        prefill("b", 8), sampling=msgspec.structs.replace(plain.sampling, prompt_logprobs=True)
    )
    for request, start in ((plain, 0), (judged, 0), (prefill("c", 8), 4)):
        queue.on_prefill(request)
        batch = queue.next_batch()
        assert [chunk.start for chunk in batch] == [start]
        queue.on_computed(batch)
    again = msgspec.structs.replace(judged, attempt=2, outputs=(60,))  # the client has what the prompt was judged for
    queue.on_prefill(again)
    assert [chunk.start for chunk in queue.next_batch()] == [8]


def test_the_cache_leaves_requests_their_own_blocks() -> None:
    """A request as large as the worker allows runs, however full the cache is."""
    queue = make(num_blocks=5, cached_blocks=3)
    for name in ("a", "b"):
        queue.on_prefill(prefill(name, 20, attempt=len(name)))
        while not compute(queue):
            queue.check_invariants()
    assert isinstance(queue.on_prefill(prefill("c", 21)), Refused)


def test_requests_wait_for_blocks_in_order() -> None:
    queue = make(num_blocks=2)
    for name in "ab":
        queue.on_prefill(prefill(name, 5))
    assert compute(queue) == ["a"]
    assert compute(queue) == ["b"]


def test_abort_in_the_middle_of_a_batch() -> None:
    queue = make(num_blocks=2)
    queue.on_prefill(prefill("a", 5))
    batch = queue.next_batch()
    queue.on_abort(Abort(RequestId("a"), 1))
    queue.on_prefill(prefill("b", 5))
    assert queue.on_computed(batch) == []
    assert compute(queue) == ["b"]


def test_a_higher_attempt_replaces_and_a_lower_one_is_ignored() -> None:
    queue = make()
    queue.on_prefill(prefill("a", 5, attempt=2))
    assert queue.on_prefill(prefill("a", 5, attempt=1)) is None
    batch = queue.next_batch()
    queue.on_prefill(prefill("a", 6, attempt=3))
    assert queue.on_computed(batch) == []
    assert [chunk.attempt for chunk in queue.next_batch()] == [("a", 3)]
    queue.check_invariants()


def test_what_a_router_asked_for_ends_when_that_router_is_gone_for_good() -> None:
    """Also what a running batch computes, which is neither handed over nor kept; others go on."""
    queue = make(num_blocks=8)
    other = ProcessId("router-1")
    queue.on_prefill(prefill("running", 6))
    queue.on_prefill(msgspec.structs.replace(prefill("other", 2), router=other))
    queue.on_prefill(prefill("waiting", 30))
    batch = queue.next_batch()
    assert {chunk.prefill.request for chunk in batch} == {"running", "other"}
    left = Worker(other, "router", "router-1", "127.0.0.1", 1, "")
    queue.routers.on_directory(Directory(ProcessId("monitor"), 1024, 1, (left,)))
    queue.on_tick(0.0)
    queue.on_tick(ROUTER_LOST_S - 0.1)
    assert (queue.num_running, queue.num_waiting) == (2, 1), "it may be missing for a moment"
    queue.on_tick(ROUTER_LOST_S)
    assert (queue.num_running, queue.num_waiting) == (1, 0)
    assert [chunk.prefill.request for chunk in queue.on_computed(batch)] == ["other"]
    assert queue.on_ask(AskPrefill(RequestId("running"), 1)) == Unknown(RequestId("running"), 1)
    assert queue.next_batch() == [] and queue.blocks.num_used == 0
    queue.check_invariants()


def test_questions_are_answered() -> None:
    queue = make()
    ask = AskPrefill(RequestId("b"), 1)
    assert queue.on_ask(ask) == Unknown(RequestId("b"), 1)
    queue.on_prefill(prefill("a", 11))
    queue.on_prefill(prefill("b", 3))
    assert queue.on_ask(ask) == PrefillQueued(RequestId("b"), 1, 11)
    compute(queue)
    assert queue.on_ask(ask) == PrefillDone(RequestId("b"), 1)
    assert queue.on_prefill(prefill("b", 3)) == PrefillDone(RequestId("b"), 1)


def test_what_cannot_be_computed_is_refused() -> None:
    assert isinstance(make().on_prefill(prefill("a", 0)), Refused)
    assert isinstance(make().on_prefill(prefill("a", 51)), Refused)
    assert isinstance(make(num_blocks=2).on_prefill(prefill("a", 9)), Refused)
    assert isinstance(make().on_prefill(prefill("a", 2, num_outputs=60)), Refused)
    hot = msgspec.structs.replace(prefill("a", 2), sampling=Sampling(float("nan"), 1.0, 0, 1, 10))
    assert make().on_prefill(hot) == Refused(RequestId("a"), 1, "temperature is out of bounds")


def test_links_are_closed_when_unused_and_in_no_view() -> None:
    links = DecodeLinks()
    assert links.use("a", 0.0) and links.use("b", 0.0) and not links.use("a", 5.0)
    assert links.on_endpoints(["b"], UNUSED_S + 1) == [], "a view may be older here than at the router"
    assert links.on_endpoints(["b"], UNUSED_S + 6) == ["a"]
    assert links.use("a", 20.0)


operations = st.tuples(st.sampled_from(["prefill", "abort", "batch"]), st.sampled_from("abcd"), st.integers(1, 30))


@given(st.lists(operations, max_size=40))
def test_every_prefill_ends_once_and_no_block_is_lost(history: list[tuple[str, str, int]]) -> None:
    """An abort comes between the start and the end of a batch, the worst moment."""
    queue = make(num_blocks=10, cached_blocks=3)
    attempts: dict[str, int] = {}
    wanted: set[Attempt] = set()
    done: list[Attempt] = []
    for kind, name, number in history + [("batch", "a", 0)] * 40:
        batch = queue.next_batch()
        assert sum(len(chunk.tokens) for chunk in batch) <= CHUNK
        used = [block for chunk in batch for block in chunk.block_table[chunk.start // 4 :]]
        assert len(used) == len(set(used)), "a block is written by two requests"
        if kind == "prefill":
            attempts[name] = attempts.get(name, 0) + 1
            wanted = {attempt for attempt in wanted if attempt[0] != name or attempt in done}
            if queue.on_prefill(prefill(name, number, attempts[name])) is None:
                wanted.add((RequestId(name), attempts[name]))
        elif kind == "abort":
            queue.on_abort(Abort(RequestId(name), attempts.get(name, 0)))
            wanted = {attempt for attempt in wanted if attempt[0] != name or attempt in done}
        done += [chunk.attempt for chunk in queue.on_computed(batch)]
        queue.check_invariants()
    assert sorted(done) == sorted(wanted)
    assert queue.blocks.num_used == queue.prefixes.num_blocks <= 3
