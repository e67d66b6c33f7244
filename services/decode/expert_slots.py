"""What the expert memory of this rank really contains: a tag beside each row says so (PROTOCOL 8.1).

There are more rows than slots: which row serves a slot is a table of this process, and the rows that serve none take
in experts on their way, or still hold what the last placement needed. A tag is cleared before its row is written and
set afterwards, so a row with a tag is whole, whoever died when. What a rank loads follows from its tags and the map
alone, never from the difference of two maps. A tag also holds the checksum that its row had when it came out of the
checkpoint, and passes it on with every copy: so the tags of a group are the checkpoint's manifest (PROTOCOL 8.2).

Legend: L mixture-of-experts layers, P expert slots of a layer, N rows (L x P and those to spare), F floats of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.model.experts import ExpertLayout, row_checksum
from kernels.cpu.experts import ExpertTable

NUM_TAG_WORDS = 4  # layer + 1 (0 = nothing here), logical expert, generation, checksum
EMPTY = -1

ReadExpert = Callable[[int, int, Tensor], None]
Expert = tuple[int, int]  # layer, logical expert


@dataclass(frozen=True, slots=True)
class Tag:
    """``generation``: version of the placement for which the row was written."""

    layer: int
    logical_expert: int
    generation: int
    checksum: int


class ExpertRows:
    """The rows of one rank, here or in the mapped heap of a peer."""

    def __init__(self, weights_NF: Tensor, tags_N4: Tensor) -> None:
        self.weights_NF, self.tags_N4 = weights_NF, tags_N4
        self._tags_N4: npt.NDArray[np.int64] = tags_N4.numpy()  # the same memory; looking into it is cheaper

    def tag(self, row: int) -> Tag | None:
        """None: nothing whole lies there."""
        layer, expert, generation, checksum = self._tags_N4[row].tolist()
        return Tag(layer - 1, expert, generation, checksum) if layer > 0 else None

    def find(self, layer: int, logical_expert: int) -> int | None:
        """The row that holds this expert."""
        rows_N = np.flatnonzero((self._tags_N4[:, 0] == layer + 1) & (self._tags_N4[:, 1] == logical_expert))
        return int(rows_N[0]) if len(rows_N) else None

    def clear(self, row: int) -> None:
        self._tags_N4[row, 0] = 0

    def set(self, row: int, tag: Tag) -> None:
        """Once the row is whole."""
        self._tags_N4[row, 1:] = tag.logical_expert, tag.generation, tag.checksum
        self._tags_N4[row, 0] = tag.layer + 1


class ExpertSlots:
    """``weights_NF`` float32 and ``tags_N4`` int64 lie in the rank's heap; ``layer`` is a mixture-of-experts one.

    ``read_expert(layer, logical_expert, out_row)`` fills a packed row from the checkpoint; its failures leave the row
    without a tag.
    """

    def __init__(
        self,
        weights_NF: Tensor,
        tags_N4: Tensor,
        layout: ExpertLayout,
        num_layers: int,
        num_local: int,
        read_expert: ReadExpert,
    ) -> None:
        self.rows = ExpertRows(weights_NF, tags_N4)
        self._read_expert = read_expert
        self._tables = [layout.table(num_local) for _ in range(num_layers)]
        self._slots_LP = [[EMPTY] * num_local for _ in range(num_layers)]  # the row that serves a slot
        self._expert_of: dict[int, Expert] = {}
        for row in range(len(weights_NF)):
            if (tag := self.rows.tag(row)) is not None:
                self._expert_of[row] = (tag.layer, tag.logical_expert)
        self._row_of = {expert: row for row, expert in self._expert_of.items()}
        self.num_loads = 0

    def table(self, layer: int) -> ExpertTable:
        """Where the experts of the layer's slots lie: the same object for good, in force with each `adopt`."""
        return self._tables[layer]

    def logical_expert(self, layer: int, local: int) -> int:
        """What the slot holds by its tag; -1 = nothing whole."""
        row = self._slots_LP[layer][local]
        tag = self.rows.tag(row) if row != EMPTY else None
        return tag.logical_expert if tag is not None and tag.layer == layer else EMPTY

    def lacking(self, wanted_LP: Sequence[Sequence[int]]) -> list[Expert]:
        """What would have to be loaded for this map, in the order of its layers."""
        return [expert for expert in dict.fromkeys(_experts(wanted_LP)) if expert not in self._row_of]

    def adopt(self, wanted_LP: Sequence[Sequence[int]], generation: int) -> int:
        """Makes every slot hold what the map wants there (-1 = anything); the number of experts loaded."""
        lacking = self.lacking(wanted_LP)
        for layer, expert in lacking:
            row = self.take_row(wanted_LP)
            self.load(row, layer, expert, generation)
        for layer, wanted_P in enumerate(wanted_LP):
            for local, expert in enumerate(wanted_P):
                row = self._row_of.get((layer, expert), EMPTY)
                self._slots_LP[layer][local] = row
                self._tables[layer].put(local, None if row == EMPTY else self.rows.weights_NF[row])
        return len(lacking)

    def take_row(self, wanted_LP: Sequence[Sequence[int]], spare_present: bool = False) -> int:
        """A row whose content this map does not need, without its tag from now on. Empty rows go first; rows that serve
        a slot at present go last, or, if they are to be spared, not at all: -1 when there is no other."""
        used = {self._row_of.get(expert, EMPTY) for expert in _experts(wanted_LP)}
        serving = {row for slots_P in self._slots_LP for row in slots_P}
        used |= serving if spare_present else set()
        free = [row for row in range(len(self.rows.weights_NF)) if row not in used]
        if not free:
            return EMPTY
        row = min(free, key=lambda row: (row in serving, row in self._expert_of, row))
        if (expert := self._expert_of.pop(row, None)) is not None:
            del self._row_of[expert]
        self.rows.clear(row)
        return row

    def put(self, row: int, tag: Tag) -> None:
        """The row, taken before, holds this expert now."""
        self.rows.set(row, tag)
        self._row_of[tag.layer, tag.logical_expert] = row
        self._expert_of[row] = (tag.layer, tag.logical_expert)
        self.num_loads += 1  # one by one: it is progress, for whom others wait

    @torch.inference_mode()
    def load(self, row: int, layer: int, expert: int, generation: int) -> None:
        """From the checkpoint, into a row taken before."""
        weights_F = self.rows.weights_NF[row]
        self._read_expert(layer, expert, weights_F)
        self.put(row, Tag(layer, expert, generation, row_checksum(weights_F)))


def _experts(wanted_LP: Sequence[Sequence[int]]) -> list[Expert]:
    return [(layer, expert) for layer, row in enumerate(wanted_LP) for expert in row if expert != EMPTY]
