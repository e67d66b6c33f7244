"""One-sided copies of experts: exact, in slices, and never believed without their checksum."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.model.experts import ExpertLayout
from services.decode.expert_copy import SLICE_BYTES
from services.decode.expert_slots import NUM_TAG_WORDS, ExpertRows, ExpertSlots
from services.decode.staging import CopyPace, Staging

LAYOUT = ExpertLayout(4, 4)
NUM_LAYERS, NUM_LOCAL, NUM_STAGING = 2, 2, 2
BEFORE, AFTER = [[0, 1], [0, 1]], [[0, 5], [4, 1]]


class Rank:
    """``reads`` counts experts that came from the checkpoint."""

    def __init__(self, number: int, held: list[list[int]], peers: dict[int, "Rank"], pace: CopyPace | None) -> None:
        num_rows = NUM_LAYERS * NUM_LOCAL + NUM_STAGING
        weights, tags = torch.zeros((num_rows, LAYOUT.row_size)), torch.zeros((num_rows, NUM_TAG_WORDS)).long()
        self.reads = 0
        self.slots = ExpertSlots(weights, tags, LAYOUT, NUM_LAYERS, NUM_LOCAL, self._read)
        self.slots.adopt(held, 1)
        self.reads = 0
        self.number, self.held, self.peers = number, held, peers
        self.staging = Staging(self.slots, lambda: {r: peer.slots.rows for r, peer in peers.items()}, number, pace)

    def stage(self, wanted: list[list[int]], generation: int = 2) -> None:
        """While all ranks serve what they began with, or were said to."""
        ranks = {self.number: self, **self.peers}
        present = tuple(
            tuple(tuple(ranks[rank].held[layer]) if rank in ranks else () for rank in range(max(ranks) + 1))
            for layer in range(NUM_LAYERS)
        )
        self.staging.stage(wanted, generation, present)

    def _read(self, layer: int, expert: int, out_row: torch.Tensor) -> None:
        self.reads += 1
        out_row.copy_(expert_row(layer, expert))

    def holds(self, wanted: list[list[int]]) -> bool:
        """By adoption, without loading anything."""
        return self.slots.adopt(wanted, 2) == 0 and all(
            torch.equal(self.rows.weights_NF[self.row(layer, expert)], expert_row(layer, expert))
            for layer, row in enumerate(wanted)
            for expert in row
        )

    @property
    def rows(self) -> ExpertRows:
        return self.slots.rows

    def row(self, layer: int, expert: int) -> int:
        row = self.rows.find(layer, expert)
        assert row is not None
        return row


def expert_row(layer: int, expert: int) -> torch.Tensor:
    return torch.arange(LAYOUT.row_size) * 0.37 + 100 * layer + expert


def pair(pace: CopyPace | None = None) -> tuple[Rank, Rank]:
    """The first wants what the second has."""
    source = Rank(1, [[5, 4], [5, 4]], {}, None)
    return Rank(0, BEFORE, {1: source}, pace), source


def test_what_is_lacking_is_copied_from_a_peer_beside_what_is_in_use() -> None:
    rank, _ = pair()
    rank.stage(AFTER)
    assert rank.staging.copy(0.0)
    assert rank.slots.lacking(BEFORE) == [], "the present experts are untouched"
    assert rank.holds(AFTER) and rank.reads == 0
    assert rank.staging.counters()["experts_copied"] == 2


def test_a_copy_comes_in_slices_and_counts_when_whole() -> None:
    rank, _ = pair(CopyPace(bytes_per_s=80.0))
    rank.stage(AFTER)
    num_slices, now = 0, 0.0
    while not rank.staging.copy(now):
        assert rank.rows.find(0, 5) is None or num_slices > 2
        num_slices, now = num_slices + 1, now + 0.1
    assert num_slices > 2 * LAYOUT.row_bytes / 8 - 2, "80 bytes a second are 8 in a tenth"
    assert rank.holds(AFTER)


def test_no_more_than_a_slice_at_once_however_long_ago_the_last_was() -> None:
    pace = CopyPace(bytes_per_s=5e8)
    assert pace.allowed_bytes(1000.0) == SLICE_BYTES
    pace.spend(SLICE_BYTES)
    assert pace.allowed_bytes(1000.0) == 0
    assert pace.allowed_bytes(1000.0001) == pytest.approx(50_000, rel=0.01)


@pytest.mark.parametrize("word", [0.0, float("nan")])
def test_a_copy_with_another_checksum_is_not_believed(word: float) -> None:
    rank, source = pair()
    source.rows.weights_NF[source.row(0, 5), 3] = word
    rank.stage(AFTER)
    assert rank.staging.copy(0.0)
    assert rank.holds(AFTER)
    counters = rank.staging.counters()
    assert (counters["bad_expert_copies"], counters["experts_from_checkpoint"], rank.reads) == (1, 1, 1)


def test_a_source_that_is_overwritten_meanwhile_is_not_believed() -> None:
    rank, source = pair(CopyPace(bytes_per_s=80.0))
    rank.stage(AFTER)
    assert not rank.staging.copy(0.1)
    source.slots.adopt([[5, 0], [5, 4]], 3)
    row = source.row(0, 5)
    source.rows.clear(row)  # somebody writes another expert there, and the words happen to be the same so far
    for tick in range(2, 100):
        rank.staging.copy(tick / 10)
    assert rank.holds(AFTER) and rank.reads >= 1


def test_a_row_that_an_older_placement_left_behind_is_no_source() -> None:
    """Its owner overwrites it when it stages for itself, at the same time."""
    rank, source = pair(CopyPace(bytes_per_s=80.0))
    source.slots.adopt([[0, 1], [0, 1]], 2)
    source.held = [[0, 1], [0, 1]]
    assert source.rows.find(1, 4) is not None, "still there, with its tag"
    rank.stage(wanted := [[0, 1], [4, 1]], 3)
    source.stage([[2, 3], [0, 1]], 3)
    for tick in range(1, 200):
        rank.staging.copy(tick / 10)
        source.staging.copy(tick / 10)
    assert source.rows.find(1, 4) is None, "overwritten meanwhile"
    assert rank.holds(wanted) and rank.staging.counters()["bad_expert_copies"] == 0


def test_sources_whose_tags_disagree_are_not_asked() -> None:
    good, bad = Rank(1, [[5, 4], [5, 4]], {}, None), Rank(2, [[5, 4], [5, 4]], {}, None)
    bad.rows.tags_N4[bad.row(1, 4), 3] += 1
    rank = Rank(0, BEFORE, {1: good, 2: bad}, None)
    rank.stage(AFTER)
    assert rank.staging.copy(0.0) and rank.holds(AFTER)
    assert rank.reads == 1


def test_without_a_live_copy_the_checkpoint_is_read() -> None:
    rank = Rank(0, BEFORE, {}, CopyPace(1e6))
    rank.stage(AFTER)
    assert [rank.staging.copy(now) for now in (0.0, 1.0, 2.0)] == [False, False, True], "one expert at a time"
    assert rank.holds(AFTER) and rank.reads == 2


def test_a_map_that_there_is_no_memory_for_takes_no_row_in_use() -> None:
    rank = Rank(0, BEFORE, {}, None)
    rank.stage([[2, 3], [2, 3]])
    with pytest.raises(AssertionError, match="no more than there is memory for"):
        rank.staging.copy(0.0)
    assert rank.slots.lacking(BEFORE) == [] and rank.holds(BEFORE)


def test_a_dropped_copy_writes_no_more() -> None:
    rank, _ = pair(CopyPace(bytes_per_s=80.0))
    rank.stage(AFTER)
    rank.staging.copy(0.1)
    rank.staging.drop()
    rank.slots.adopt([[2, 3], [2, 3]], 3)
    rank.staging.copy(5.0)
    assert rank.holds([[2, 3], [2, 3]])


def test_large_experts_come_by_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.decode.expert_copy.SLICE_BYTES", 0)
    rank, _ = pair(CopyPace(1e9))
    rank.stage(AFTER)
    deadline = time.monotonic() + 60.0
    while not rank.staging.copy(time.monotonic()):
        assert time.monotonic() < deadline
    assert rank.holds(AFTER) and rank.reads == 0
    counters = rank.staging.counters()
    assert (counters["experts_copied"], counters["expert_bytes_copied"]) == (2, 2 * LAYOUT.row_bytes)


wanted_maps = st.lists(st.permutations(range(6)).map(lambda p: list(p[:NUM_LOCAL])), min_size=2, max_size=2)


@given(st.lists(st.tuples(wanted_maps, st.integers(0, 40), st.booleans()), max_size=8))
def test_whatever_is_given_up_or_comes_into_force_slots_hold_what_the_map_says(
    history: list[tuple[list[list[int]], int, bool]],
) -> None:
    """Staging another map in the middle, adopting early (what is not here is loaded then) or never."""
    source = Rank(1, [[5, 4], [5, 4]], {}, None)
    rank, present, now = Rank(0, BEFORE, {1: source}, CopyPace(2000.0)), BEFORE, 0.0
    for generation, (wanted, num_slices, adopts) in enumerate(history, 2):
        if sum(len(set(after) - set(before)) for before, after in zip(present, wanted, strict=True)) > NUM_STAGING:
            continue
        rank.stage(wanted, generation)
        for _ in range(num_slices):
            now += 0.01
            rank.staging.copy(now)
        assert rank.slots.lacking(present) == []
        if adopts:
            rank.staging.drop()
            rank.slots.adopt(wanted, generation)
            present = wanted
    assert rank.holds(present)
