"""Expert slots hold what their tags say, and adopting a map loads what the tags lack, whatever came before."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.model.experts import ExpertLayout
from services.decode.expert_slots import EMPTY, NUM_TAG_WORDS, ExpertSlots

LAYOUT = ExpertLayout(4, 4)
NUM_SPARE = 2


class Source:
    """An expert's row is filled with its number; ``fails`` names one that cannot be read."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.fails = -1

    def read(self, layer: int, expert: int, out_row: torch.Tensor) -> None:
        self.num_reads += 1
        out_row[:8] = -1.0
        if expert == self.fails:
            raise ValueError("torn")
        out_row.fill_(10 * layer + expert)


class Memory:
    """What outlives a process."""

    def __init__(self) -> None:
        self.weights = torch.zeros((2 * 3 + NUM_SPARE, LAYOUT.row_size))
        self.tags = torch.zeros((2 * 3 + NUM_SPARE, NUM_TAG_WORDS), dtype=torch.int64)

    def slots(self, source: Source) -> ExpertSlots:
        return ExpertSlots(self.weights, self.tags, LAYOUT, 2, 3, source.read)


def computes_with(slots: ExpertSlots, layer: int, local: int, expert: int) -> bool:
    row_F = slots.table(layer).row(local)
    return row_F is not None and bool((LAYOUT.views(row_F).gate_up_HG == 10 * layer + expert).all())


def holds(slots: ExpertSlots, wanted: list[list[int]]) -> bool:
    return all(
        expert == EMPTY or (slots.logical_expert(layer, local) == expert and computes_with(slots, layer, local, expert))
        for layer, row in enumerate(wanted)
        for local, expert in enumerate(row)
    )


def test_only_what_differs_is_loaded() -> None:
    memory, source = Memory(), Source()
    slots = memory.slots(source)
    assert slots.logical_expert(0, 0) == EMPTY
    assert slots.adopt([[0, 1, 2], [3, 4, EMPTY]], 1) == 5
    assert slots.adopt([[0, 1, 5], [3, 4, EMPTY]], 2) == 1
    assert slots.adopt([[0, 1, 2], [4, 3, EMPTY]], 2) == 0, "what was there before is there still, in a spare row"
    assert holds(slots, [[0, 1, 2], [4, 3, EMPTY]])
    slots.adopt([[0, 1, 5], [3, 4, EMPTY]], 3)
    assert holds(slots, [[0, 1, 5], [3, 4, EMPTY]])
    assert memory.slots(source).adopt([[0, 1, 5], [EMPTY, 4, EMPTY]], 3) == 0, "a stranger reads the same tags"


def test_a_slot_that_was_being_written_counts_as_empty() -> None:
    memory, source = Memory(), Source()
    memory.slots(source).adopt([[0, 1, 2], [0, 1, 2]], 1)
    source.fails = 7
    with pytest.raises(ValueError, match="torn"):
        memory.slots(source).adopt([[0, 7, 2], [0, 1, 2]], 2)
    slots, source.fails = memory.slots(source), -1
    assert slots.lacking([[0, 7, 2], [0, 1, 2]]) == [(0, 7)], "half an expert is none"
    assert slots.adopt([[0, 1, 2], [0, 1, 2]], 3) == 0, "a spare row was written: what was there before is there still"
    assert holds(slots, [[0, 1, 2], [0, 1, 2]])


maps = st.lists(st.lists(st.integers(-1, 8), min_size=3, max_size=3), min_size=2, max_size=2)


@given(st.lists(st.tuples(maps, st.integers(-1, 12)), max_size=8))
def test_adopting_makes_slots_equal_to_the_map(history: list[tuple[list[list[int]], int]]) -> None:
    memory, source = Memory(), Source()
    for generation, (wanted, fails) in enumerate(history):
        slots, source.fails = memory.slots(source), fails
        try:
            slots.adopt(wanted, generation)
        except ValueError:
            continue
        assert holds(slots, wanted)
