"""How a wait ends, and what a void rank may still do. One thread and a manual clock, except where the threads are the
point.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.epoch_state import CLEAN, VOID, VoidReason
from kernels.heap_window import HeapWindow
from kernels.reference import ElasticGroup
from tests.kernels.local_group import LocalGroup, Placement, Tokens, local_group, moe_layer

MEMBERS = [0, 1, 2]
PLACEMENT = Placement.random(1, MEMBERS, num_copies=1)
BASE = 1 << 40


def heap_of(cluster: LocalGroup, rank: int) -> HeapWindow:
    return HeapWindow(cluster.layout, cluster.heaps[rank].bytes_U8)


def layer(group: ElasticGroup) -> torch.Tensor | None:
    return moe_layer(group, Tokens.random(group.rank, 3), PLACEMENT)


def barrier(group: ElasticGroup) -> bool:
    return group.clean_buffer(5.0)


def observed(group: ElasticGroup) -> list[int]:
    return [int(bit) for bit in group.observation_mask()]


@pytest.mark.parametrize("operation", [layer, barrier])
def test_the_deadline_accuses_the_late_only_and_poison_accuses_nobody(
    heap_dir: Path, operation: Callable[[ElasticGroup], object]
) -> None:
    """Rank 2 is dead. Rank 0 waits out its deadline; rank 1, which comes later, finds rank 0's poison and waits no
    more.
    """
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0, 1]) as cluster:
        cluster.enter(1, MEMBERS)
        first, second, _ = cluster.ranks
        began, waited = cluster.clocks[0].now, first.wait_ns_by_source()
        heap_of(cluster, 0).dispatch_word[1] = first.step + 1
        heap_of(cluster, 0).barrier_word[0][1] = first.step + 1
        assert not operation(first)
        assert 5.0 <= cluster.clocks[0].now - began < 5.1
        assert (first.status, first.void_reason, first.missing) == (VOID, VoidReason.DEADLINE, (2,))
        assert observed(first) == [0, 0, 1, 0]
        assert first.wait_ns_by_source()[2] - waited[2] >= 5_000_000_000
        assert first.wait_ns_by_source()[1] == waited[1]

        began = cluster.clocks[1].now
        assert not operation(second)
        assert cluster.clocks[1].now == began
        assert (second.status, second.void_reason) == (VOID, VoidReason.PEER_POISON)
        assert observed(second) == [0, 0, 0, 0]


def test_who_waits_for_the_dead_is_not_accused_by_those_ahead(heap_dir: Path) -> None:
    """Rank 2 died between two of its dispatch words: rank 1 lacks it, rank 0 does not and is one operation ahead. Both
    deadlines pass in the same moment; rank 1, which misses one rank only, speaks first."""
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0, 1]) as cluster:
        cluster.enter(1, MEMBERS)
        ahead, behind = cluster.ranks[:2]
        began = cluster.clocks[0].now
        heap_of(cluster, 0).dispatch_word[1] = heap_of(cluster, 0).dispatch_word[2] = ahead.step + 1

        def behind_gives_up(num_polls: int) -> None:
            if cluster.clocks[0].now - began >= 5.2 and behind.status == CLEAN:
                assert layer(behind) is None

        cluster.clocks[0].on_poll = behind_gives_up
        assert layer(ahead) is None
        assert (ahead.void_reason, observed(ahead)) == (VoidReason.PEER_POISON, [0, 0, 0, 0])
        assert ahead.missing == (1, 2)
        assert (behind.void_reason, observed(behind)) == (VoidReason.DEADLINE, [0, 0, 1, 0])


def test_a_wait_for_headers_that_poison_ends_tells_whom_it_had_not_heard(heap_dir: Path) -> None:
    """The path from rank 2 to rank 1 broke between two rounds. Rank 0 hears both, is one operation ahead, and so the
    only one with a deadline: without this only healthy paths would be accused (simulation, seeds 613 and 1178)."""
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[1]) as cluster:
        cluster.enter(1, MEMBERS)
        group = cluster.ranks[1]
        heap_of(cluster, 1).poison[0] = group.step
        assert group.allgather([0]) is None
        assert (group.void_reason, group.missing) == (VoidReason.PEER_POISON, (0, 2))
        assert (group.unheard, observed(group)) == ((2,), [0, 0, 0, 0])
        group.adopt(2, [1], 0)
        assert group.unheard == ()


def test_several_dead_ranks_are_all_accused_a_little_later(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0]) as cluster:
        cluster.enter(1, MEMBERS)
        began = cluster.clocks[0].now
        assert layer(cluster.ranks[0]) is None
        assert 5.5 <= cluster.clocks[0].now - began < 5.6
        assert observed(cluster.ranks[0]) == [0, 1, 1, 0]


def test_a_word_that_arrives_before_the_deadline_is_waited_for_and_timed(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0]) as cluster:
        cluster.enter(1, MEMBERS)
        group, words = cluster.ranks[0], heap_of(cluster, 0).barrier_word[0]
        before = group.wait_ns_by_source()

        def arrive(num_polls: int) -> None:
            if num_polls == 99:
                words[1] = group.step
            if num_polls == 199:
                words[2] = group.step

        cluster.clocks[0].on_poll = arrive
        assert group.clean_buffer(5.0)
        waited_ms = (group.wait_ns_by_source() - before) / 1e6
        assert waited_ms.tolist() == pytest.approx([0, 1000, 2000, 0])
        assert group.status == CLEAN


def test_a_rank_stopped_past_its_deadline_looks_once_more(heap_dir: Path) -> None:
    """SIGSTOP between two polls: time jumps, the words came meanwhile; nobody is accused."""
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0]) as cluster:
        cluster.enter(1, MEMBERS)
        group, words = cluster.ranks[0], heap_of(cluster, 0).barrier_word[0]

        def stopped(num_polls: int) -> None:
            cluster.clocks[0].now += 100.0
            words[1] = words[2] = group.step

        cluster.clocks[0].on_poll = stopped
        assert group.clean_buffer(5.0)
        assert observed(group) == [0, 0, 0, 0]


def test_complete_data_stays_complete_whatever_else_was_heard(heap_dir: Path) -> None:
    """Poison of a member that had published its word: this rank's own data is whole, so this operation counts."""
    with local_group(heap_dir, 3, manual=[0]) as cluster:
        cluster.enter(1, MEMBERS)
        group, heap = cluster.ranks[0], heap_of(cluster, 0)
        heap.barrier_word[0][1] = heap.barrier_word[0][2] = group.step + 1
        heap.poison[1] = group.step + 2
        assert group.clean_buffer(5.0)
        assert group.status == CLEAN
        assert not group.clean_buffer(5.0)
        assert group.void_reason is VoidReason.PEER_POISON


@pytest.mark.parametrize(
    ("writer", "word", "reason"),
    [
        (1, 2 << 40 | 3, VoidReason.PEER_POISON),  # of this epoch
        (2, 7 << 40, VoidReason.PEER_POISON),  # of a later one: that member has left this epoch
        (1, 1 << 40 | 999, None),  # of an older one
        (3, 2 << 40 | 3, None),  # not a member
        (0, 2 << 40 | 1, VoidReason.HOST_POISON),
        (0, 1 << 40 | 1, None),
    ],
)
def test_poison_counts_from_members_and_of_this_epoch(
    heap_dir: Path, writer: int, word: int, reason: VoidReason | None
) -> None:
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0]) as cluster:
        cluster.enter(2, MEMBERS)
        group = cluster.ranks[0]
        heap_of(cluster, 0).poison[writer] = word
        assert group.clean_buffer(5.0) is False
        assert group.void_reason is (reason or VoidReason.DEADLINE)
        assert observed(group) == ([0, 0, 0, 0] if reason else [0, 1, 1, 0])


def test_own_reasons_are_passed_on_and_a_peers_poison_is_not(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0, 1]) as cluster:
        cluster.enter(1, MEMBERS)
        cluster.ranks[0].poison_self()
        assert layer(cluster.ranks[0]) is None
        assert [heap_of(cluster, rank).poison[0] >= BASE for rank in (1, 2)] == [True, True]
        assert layer(cluster.ranks[1]) is None
        assert [heap_of(cluster, rank).poison[1] for rank in (0, 2)] == [0, 0]


def test_the_host_ends_a_wait_in_milliseconds(heap_dir: Path) -> None:
    """Patient waits included: a view or a roll call has come, and another thread says so."""
    with local_group(heap_dir, 2) as cluster:
        cluster.enter(4, [0, 1])
        group = cluster.ranks[0]
        ended: dict[str, float] = {}

        def waiter() -> object:
            header = group.allgather([])
            ended["at"] = time.monotonic()
            return header

        def host() -> None:
            while not heap_of(cluster, 1).header_word[1][0]:
                time.sleep(0.001)
            group.poison_self(3)  # a late word about an epoch left already: nothing happens
            group.poison_self(4)
            ended["said"] = time.monotonic()

        cluster.run(lambda me: waiter() if me is group else host())
        assert ended["at"] - ended["said"] < 0.2
        assert (group.void_reason, observed(group)) == (VoidReason.HOST_POISON, [0, 0, 0, 0])
        assert group.missing == (1,)


def test_a_late_word_of_the_host_does_not_take_back_a_newer_one(heap_dir: Path) -> None:
    with local_group(heap_dir, 2, manual=[0]) as cluster:
        cluster.enter(4, [0, 1])
        group = cluster.ranks[0]
        group.poison_self(4)
        group.poison_self(3)
        assert group.allgather([]) is None
        assert group.void_reason is VoidReason.HOST_POISON


def test_stop_ends_a_wait_for_headers(heap_dir: Path) -> None:
    with local_group(heap_dir, 2, manual=[0]) as cluster:
        cluster.enter(1, [0, 1])
        group = cluster.ranks[0]
        polls: list[int] = []
        cluster.clocks[0].on_poll = polls.append
        assert group.allgather([], stop=lambda: len(polls) > 5000) is None
        assert (group.void_reason, observed(group)) == (VoidReason.STOPPED, [0, 0, 0, 0])
        assert heap_of(cluster, 1).poison[0] >= BASE


@pytest.mark.parametrize("kind", ["header", "dispatch", "combine", "barrier"])
def test_a_word_from_the_future_voids(heap_dir: Path, kind: str) -> None:
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0]) as cluster:
        cluster.enter(1, MEMBERS)
        group, heap = cluster.ranks[0], heap_of(cluster, 0)
        heap.dispatch_word[1] = heap.dispatch_word[2] = group.step + (3 if kind == "dispatch" else 1)
        heap.combine_word[1] = heap.combine_word[2] = group.step + 4
        heap.header_word[1][1] = heap.barrier_word[0][1] = group.step + 2
        if kind == "header":
            assert group.allgather([]) is None
        elif kind == "barrier":
            assert not group.clean_buffer(5.0)
        else:
            assert layer(group) is None
            assert group.step == BASE + (2 if kind == "dispatch" else 3)
        assert (group.void_reason, observed(group)) == (VoidReason.FUTURE_WORD, [0, 0, 0, 0])
        assert heap_of(cluster, 2).poison[0] >= BASE


def test_two_digests_void_the_round_for_all(heap_dir: Path) -> None:
    with local_group(heap_dir, 3) as cluster:
        cluster.enter(1, MEMBERS)
        cluster.ranks[2].digest = 4
        assert set(cluster.run(lambda group: group.allgather([])).values()) == {None}
        # Whoever was still waiting is void by the poison of who was not.
        reasons = {group.void_reason for group in cluster.ranks}
        assert VoidReason.DIGEST in reasons
        assert reasons <= {VoidReason.DIGEST, VoidReason.PEER_POISON}


def test_a_header_overwritten_while_read_is_not_taken(heap_dir: Path) -> None:
    """The word is right, one data word carries another tag."""
    with local_group(heap_dir, 2, manual=[0]) as cluster:
        cluster.enter(1, [0, 1])
        group, heap = cluster.ranks[0], heap_of(cluster, 0)

        def torn(num_polls: int) -> None:
            heap.header_data[1, 1] = heap_of(cluster, 1).header_data[1, 0]
            heap.header_data[1, 1, 3] += 1 << 32
            heap.header_word[1][1] = group.step

        cluster.clocks[0].on_poll = torn
        assert group.allgather([1, 2, 3]) is None
        assert group.void_reason is VoidReason.FUTURE_WORD


def test_a_void_rank_publishes_nothing_more(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, deadline_s=5.0, manual=[0]) as cluster:
        cluster.enter(1, MEMBERS)
        group = cluster.ranks[0]
        tokens = Tokens.random(0, 3)
        rank_TK, local_TK = PLACEMENT.route(tokens)
        assert group.dispatch(tokens.x_TH, rank_TK, local_TK, tokens.weight_TK) is None
        before = [cluster.snapshot(rank) for rank in MEMBERS]
        other = Tokens.random(99, 3)
        assert group.dispatch(other.x_TH, rank_TK, local_TK, other.weight_TK) is None
        assert group.allgather([1, 2]) is None
        assert group.clean_buffer(5.0) is False
        assert group.headers_waiting() == ()
        for rank in MEMBERS:
            assert torch.equal(cluster.snapshot(rank), before[rank])
        assert group.status == VOID


def test_poison_members_and_leave_make_the_rank_void(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, manual=[1, 2]) as cluster:
        cluster.enter(1, MEMBERS)
        cluster.ranks[0].poison_members()
        assert cluster.ranks[0].status == VOID
        assert layer(cluster.ranks[1]) is None
        assert cluster.ranks[1].void_reason is VoidReason.PEER_POISON
        cluster.ranks[1].leave()  # void already: it says good-bye all the same
        assert heap_of(cluster, 2).poison[1] >= BASE
        assert cluster.ranks[1].members == ()


def test_an_idle_rank_sees_that_others_have_begun(heap_dir: Path) -> None:
    with local_group(heap_dir, 3, manual=[0]) as cluster:
        cluster.enter(1, MEMBERS)
        assert cluster.ranks[1].headers_waiting() == ()
        seen: list[tuple[int, ...]] = []

        def look(num_polls: int) -> None:
            seen.append(cluster.ranks[1].headers_waiting())
            cluster.ranks[0].poison_self()

        cluster.clocks[0].on_poll = look
        assert cluster.ranks[0].allgather([]) is None
        assert seen == [(0,)]
