"""What the expert slots of this rank really contain: a tag beside each says so (PROTOCOL 8.1).

A tag is cleared before its slot is written and set afterwards, so a slot with a tag is whole, whoever died when. What a
rank loads follows from its tags and the map alone, never from the difference of two maps.

Legend: L mixture-of-experts layers, P local physical experts, F floats of a packed expert.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.model.experts import ExpertLayout, ExpertWeights

NUM_TAG_WORDS = 3  # layer + 1 (0 = nothing here), logical expert, generation
EMPTY = -1

ReadExpert = Callable[[int, int, Tensor], None]


class ExpertSlots:
    """``weights_LPF`` float32 and ``tags_LP3`` int64 lie in the rank's heap; ``layer`` is a mixture-of-experts one.

    ``read_expert(layer, logical_expert, out_row)`` fills a packed row; its failures leave the slot without a tag.
    """

    def __init__(self, weights_LPF: Tensor, tags_LP3: Tensor, layout: ExpertLayout, read_expert: ReadExpert) -> None:
        self._weights_LPF, self._tags_LP3, self._read_expert = weights_LPF, tags_LP3, read_expert
        self._views = [[layout.views(row) for row in rows] for rows in weights_LPF.unbind(0)]
        self.num_loads = 0

    def weights(self, layer: int, local: int) -> ExpertWeights:
        return self._views[layer][local]

    def logical_expert(self, layer: int, local: int) -> int:
        """What the slot holds by its tag; -1 = nothing whole."""
        tag = self._tags_LP3[layer, local].tolist()
        return int(tag[1]) if tag[0] == layer + 1 else EMPTY

    def adopt(self, wanted_LP: Sequence[Sequence[int]], generation: int) -> int:
        """Makes every slot hold what the map wants there (-1 = anything); the number of experts loaded."""
        num_loads = 0
        for layer, row in enumerate(wanted_LP):
            for local, expert in enumerate(row):
                if expert != EMPTY and self.logical_expert(layer, local) != expert:
                    self._load(layer, local, expert, generation)
                    num_loads += 1
                    self.num_loads += 1  # one by one: it is progress, for whom others wait
        return num_loads

    @torch.inference_mode()
    def _load(self, layer: int, local: int, expert: int, generation: int) -> None:
        tag = self._tags_LP3[layer, local]
        tag[0] = 0
        self._read_expert(layer, expert, self._weights_LPF[layer, local])
        tag[1], tag[2] = expert, generation
        tag[0] = layer + 1
