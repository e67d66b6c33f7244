"""From one view to the next: leaving, newcomers, zombies. Nobody may mix data of two views."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.epoch_state import CLEAN, VOID, VoidReason
from kernels.heap_window import HeapWindow
from kernels.reference import ElasticGroup
from tests.kernels.local_group import (
    DIGEST,
    GENEROUS_S,
    LocalGroup,
    Placement,
    Tokens,
    local_group,
    moe_layer,
    oracle,
)


def heap_of(cluster: LocalGroup, rank: int) -> HeapWindow:
    return HeapWindow(cluster.layout, cluster.heaps[rank].bytes_U8)


def exact_layer(group: ElasticGroup, placement: Placement, seed: int) -> bool:
    tokens = Tokens.random(seed + group.rank, 1 + group.rank)
    out = moe_layer(group, tokens, placement)
    return out is not None and torch.equal(out, oracle(tokens))


def test_adopting_a_view_releases_those_who_still_wait_in_the_old_one(heap_dir: Path) -> None:
    with local_group(heap_dir, 3) as cluster:
        cluster.enter(1, [0, 1, 2])

        def act(group: ElasticGroup) -> bool:
            if group.rank == 0:
                group.adopt(2, [0, 1], DIGEST)
            else:
                assert group.allgather([]) is None  # patient: only rank 0's farewell can end it
                assert group.void_reason is VoidReason.PEER_POISON
                if group.rank == 2:
                    return True
                group.adopt(2, [0, 1], DIGEST)
            assert (group.status, group.void_reason, group.missing) == (CLEAN, None, ())
            assert group.allgather([]) is not None
            return exact_layer(group, Placement.random(5, [0, 1]), seed=20)

        assert all(cluster.run(act).values())
        assert cluster.ranks[0].query_mask_buffer().tolist() == [0, 0, 1, 1]
        assert cluster.ranks[2].status == VOID


def test_no_payload_of_the_new_epoch_before_all_have_left_the_old_one(heap_dir: Path) -> None:
    """Rank 1 has received and computes; rank 0 is in the next view already and must leave its rows alone."""
    with local_group(heap_dir, 2, manual=[0, 1]) as cluster:
        cluster.enter(1, [0, 1])
        early, late = cluster.ranks
        polls = 0

        def until_bored(num_polls: int) -> None:
            nonlocal polls
            polls += 1
            if polls > 50:
                early.poison_self(2)

        cluster.clocks[0].on_poll = until_bored
        before = cluster.layout.view(cluster.heaps[1].bytes_U8, "ep_dispatch_rows").clone()
        early.adopt(2, [0, 1], DIGEST)
        assert early.allgather([]) is None
        assert exact_layer(early, Placement.random(0, [0, 1]), seed=1) is False
        assert torch.equal(cluster.layout.view(cluster.heaps[1].bytes_U8, "ep_dispatch_rows"), before)
        assert late.clean_buffer(1.0) is False
        assert late.void_reason is VoidReason.PEER_POISON


def test_a_newcomer_joins_at_a_round_boundary_without_a_void_round(heap_dir: Path) -> None:
    """Two-phase join: it announces its first header, members see it and say ready, all switch, it learns that it was
    let in.
    """
    members, joined = [0, 1, 2], [0, 1, 2, 3]
    with local_group(heap_dir) as cluster:
        cluster.enter(7, members)

        def member(group: ElasticGroup) -> bool:
            same, rounds = True, 0
            while True:
                ready = group.sees_announcement(9, 3)
                header = group.allgather([int(ready)])
                assert header is not None
                rounds += 1
                if rounds % 3:  # some rounds are idle: the next header follows at once
                    same &= exact_layer(group, Placement.random(rounds, members), seed=rounds)
                if all(words[0] for words in header.words_by_rank.values()):
                    break
            group.adopt(9, joined, 1234, in_band=True)
            return same and enter_and_go_on(group)

        def enter_and_go_on(group: ElasticGroup) -> bool:
            header = group.allgather([group.rank * 11])
            assert header is not None
            assert header.words_by_rank[3][0] == 33
            return all(exact_layer(group, Placement.random(seed, joined), seed) for seed in range(40, 44))

        def newcomer(group: ElasticGroup) -> bool:
            group.announce_header(9, members, [33], 1234)
            while not group.all_announced(9, members):
                time.sleep(0)
            group.adopt(9, joined, 1234)
            return enter_and_go_on(group)

        assert all(cluster.run(lambda group: newcomer(group) if group.rank == 3 else member(group)).values())
        assert all(group.status == CLEAN and group.epoch == 9 for group in cluster.ranks)


def test_a_fast_rank_in_the_next_view_does_not_spoil_the_last_header_of_the_old_one(heap_dir: Path) -> None:
    """An idle round ends with its header, and the view changes there: rank 0 writes its first header of the next view
    while rank 1 has not read the last one yet. Rank 1's round was complete and stays so."""
    with local_group(heap_dir, 2, manual=[0, 1]) as cluster:
        cluster.enter(1, [0, 1])
        fast, slow = cluster.ranks
        assert all(cluster.run(lambda group: group.allgather([])).values())
        cluster.clocks[0].on_poll = lambda num_polls: fast.poison_self(2)

        def rush_ahead(num_polls: int) -> None:
            if fast.epoch == 1:
                assert fast.allgather([8]) is not None
                fast.adopt(2, [0, 1], DIGEST, in_band=True)
                assert fast.allgather([9]) is None  # written, then ended by its host

        cluster.clocks[1].on_poll = rush_ahead
        header = slow.allgather([])
        assert fast.epoch == 2
        assert slow.sees_announcement(2, 0)
        assert header is not None
        assert header.words_by_rank[0][0] == 8


@pytest.mark.parametrize("in_band", [True, False])
def test_a_switch_in_band_leaves_slower_members_their_round(heap_dir: Path, in_band: bool) -> None:
    """Rank 0 has all words of the last operation and switches; rank 1 still waits for rank 2's. Leaving by a view would
    have made it void."""
    with local_group(heap_dir, 3, manual=[0, 1]) as cluster:
        cluster.enter(1, [0, 1, 2])
        fast, slow = cluster.ranks[:2]
        bank = (slow.step + 1) & 1

        def switch_then_arrive(num_polls: int) -> None:
            if num_polls == 0:
                heap_of(cluster, 0).barrier_word[bank][2] = slow.step
                assert fast.clean_buffer(5.0)
                fast.adopt(2, [0, 1, 2], DIGEST, in_band=in_band)
            if num_polls == 5:
                heap_of(cluster, 1).barrier_word[bank][2] = slow.step

        cluster.clocks[1].on_poll = switch_then_arrive
        assert slow.clean_buffer(5.0) is in_band
        assert slow.status == (CLEAN if in_band else VOID)


def test_an_announced_header_binds_and_a_dropped_view_leaves_no_trace(heap_dir: Path) -> None:
    with local_group(heap_dir, 2) as cluster:
        member, newcomer = cluster.ranks
        cluster.enter(1, [0])
        newcomer.announce_header(2, [0], [5], DIGEST)
        assert member.sees_announcement(2, 1)
        assert not member.sees_announcement(4, 1)
        assert not newcomer.all_announced(2, [0])
        newcomer.announce_header(4, [0], [6], DIGEST)  # view 2 was dropped, its number burned
        assert not member.sees_announcement(2, 1)
        assert member.sees_announcement(4, 1)
        newcomer.adopt(4, [0, 1], DIGEST)
        with pytest.raises(ValueError, match="differs from the one announced"):
            newcomer.allgather([5])
        with pytest.raises(ValueError, match="not above the current epoch"):
            newcomer.announce_header(4, [0], [6], DIGEST)


def test_a_zombie_writes_into_its_own_slots_rows_only(heap_dir: Path) -> None:
    """Removed from the group in mid-round, rank 2 wakes up and finishes what it was at: two views later the others
    are unharmed.
    """
    with local_group(heap_dir, 3, manual=[2]) as cluster:
        zombie = cluster.ranks[2]
        cluster.enter(1, [0, 1, 2])
        for epoch in (2, 3):
            cluster.enter(epoch, [0, 1])
        before = [cluster.heaps[rank].bytes_U8.clone() for rank in (0, 1)]
        assert heap_of(cluster, 2).poison[0] >= 1 << 40
        heap_of(cluster, 2).poison[0] = heap_of(cluster, 2).poison[1] = 0  # it has not looked yet
        heap_of(cluster, 2).dispatch_word[0] = heap_of(cluster, 2).dispatch_word[1] = zombie.step + 1
        assert exact_layer(zombie, Placement.random(2, [0, 1, 2]), seed=3) is False
        for rank in (0, 1):
            after = cluster.heaps[rank].bytes_U8
            for name, region in cluster.layout.regions.items():
                now, then = cluster.layout.view(after, name), cluster.layout.view(before[rank], name)
                if name == "ep_sleeper":  # the owner's alone
                    assert torch.equal(now, then)
                    continue
                by_slot = region.shape.index(4) if name not in ("ep_header", "ep_barrier_word") else 1
                others = torch.tensor([0, 1, 3])
                assert torch.equal(now.index_select(by_slot, others), then.index_select(by_slot, others)), name
            assert not torch.equal(after, before[rank])
        again = cluster.run(lambda group: exact_layer(group, Placement.random(8, [0, 1]), seed=9), only=[0, 1])
        assert all(again.values())


class StoppedStore:
    """Rows of another rank's heap as a process sees it that is stopped in the middle of its next store."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.reached, self.woken = threading.Event(), threading.Event()

    def __getitem__(self, slot: int) -> "StoppedStore":
        self._rows = self._rows[slot]
        return self

    def __setitem__(self, place: Any, rows: Any) -> None:
        self.reached.set()
        assert self.woken.wait(GENEROUS_S)
        self._rows[place] = rows


class LateWord:
    """Word row of another rank's heap; ``before`` is called before the word is written."""

    def __init__(self, words: Any, before: Callable[[], None]) -> None:
        self._words, self._before = words, before

    def __setitem__(self, slot: int, word: int) -> None:
        self._before()
        self._words[slot] = word


def test_a_zombie_stopped_in_a_combine_store_overwrites_no_row_of_its_successor(heap_dir: Path) -> None:
    """It wakes two views later, after the newcomer that computes in its place has stored its rows of the very same
    (token, k), and before they are read. All flags are right then; only regions by source keep the token."""
    old, new = [0, 1, 2], [0, 1, 3]
    with local_group(heap_dir) as cluster:
        cluster.enter(1, old)
        owner, helper, zombie = cluster.ranks[:3]
        store = StoppedStore(zombie._windows[0].combine_rows)
        zombie._windows[0].combine_rows = store  # type: ignore[assignment]

        def be_interrupted(group: ElasticGroup) -> bool:
            return exact_layer(group, Placement.random(4, old), seed=30)

        doomed = threading.Thread(target=be_interrupted, args=(zombie,), daemon=True)
        doomed.start()
        first = threading.Thread(target=cluster.run, args=(be_interrupted, [0, 1]), daemon=True)
        first.start()
        assert store.reached.wait(GENEROUS_S)
        for group in (owner, helper):
            group.poison_self()
        first.join(GENEROUS_S)
        assert owner.status == helper.status == VOID
        cluster.enter(2, [0, 1])
        cluster.enter(3, new)
        before = heap_of(cluster, 0).combine_rows[2].copy()

        def wake_the_zombie() -> None:
            words, deadline = heap_of(cluster, 0).combine_word, time.monotonic() + GENEROUS_S
            while words[3] != helper.step:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            store.woken.set()
            doomed.join(GENEROUS_S)
            assert not doomed.is_alive()

        helper._windows[0].combine_word = LateWord(helper._windows[0].combine_word, wake_the_zombie)  # type: ignore[assignment]
        results = cluster.run(lambda group: exact_layer(group, Placement.random(4, new), seed=60), only=new)
        assert all(results.values()), results
        assert not np.array_equal(heap_of(cluster, 0).combine_rows[2], before), "the zombie has stored nothing"


def test_a_slot_reborn_with_its_old_memory_starts_clean(heap_dir: Path) -> None:
    with local_group(heap_dir, 2) as cluster:
        cluster.enter(1, [0, 1])
        cluster.ranks[1].poison_self(1)
        reborn = ElasticGroup(cluster.layout, cluster.heaps[1], 1, deadline_s=20.0)
        reborn.map_peer(0, cluster.heaps[0])
        cluster.ranks[1] = reborn
        assert (reborn.status, reborn.epoch, heap_of(cluster, 1).poison[1]) == (CLEAN, 0, 0)
        cluster.enter(2, [0, 1])
        assert all(cluster.run(lambda group: exact_layer(group, Placement.random(3, [0, 1]), seed=4)).values())


def test_views_that_cannot_be_adopted(heap_dir: Path) -> None:
    with local_group(heap_dir, 2) as cluster:
        group = cluster.ranks[0]
        group.adopt(5, [0, 1], DIGEST)
        with pytest.raises(ValueError, match="not above the current epoch 5"):
            group.adopt(5, [0, 1], DIGEST)
        with pytest.raises(ValueError, match="not in the view of epoch 6"):
            group.adopt(6, [1], DIGEST)
        with pytest.raises(ValueError, match=r"not mapped here: \[3\]"):
            group.adopt(6, [0, 3], DIGEST)
        with pytest.raises(ValueError, match="epoch must be in"):
            group.adopt(1 << 23, [0], DIGEST)
        with pytest.raises(ValueError, match="is a member of epoch 5"):
            group.unmap_peer(1)
        with pytest.raises(ValueError, match="cannot map rank 0"):
            group.map_peer(0, cluster.heaps[1])
        assert group.members == (0, 1)
        group.adopt(6, [0], DIGEST)
        group.unmap_peer(1)
        with pytest.raises(ValueError, match=r"not mapped here: \[1\]"):
            group.announce_header(9, [1], [], DIGEST)
