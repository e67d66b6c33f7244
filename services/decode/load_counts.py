"""What a rank counts about its experts' load: what its own tokens ask for, and what it computes for everybody. Pure.

The first is what plans are made from, wherever copies lie. The second is how evenly the placement in force, and the way
copies are chosen, really load the ranks; it begins anew with each epoch, in the same round on all members.

Legend: L mixture-of-experts layers, E logical experts.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class CountedLoad:
    """``tokens``: own, by layer and expert. ``served``: entries of anybody's tokens computed here, by layer, in
    ``served_passes`` forward passes of the epoch."""

    tokens: tuple[tuple[int, ...], ...]
    served: tuple[int, ...]
    served_passes: int


class LoadCounts:
    """``tokens_LE`` and ``served_L`` stay where they are: a compiled pass counts in them."""

    def __init__(self, num_moe_layers: int, num_logical_experts: int) -> None:
        self.tokens_LE: npt.NDArray[np.int64] = np.zeros((num_moe_layers, num_logical_experts), dtype=np.int64)
        self.served_L: npt.NDArray[np.int64] = np.zeros(num_moe_layers, dtype=np.int64)
        self._served_passes = 0

    def on_epoch(self) -> None:
        self.served_L[:] = self._served_passes = 0

    def on_pass(self) -> None:
        """Before its first layer. A pass that becomes void ends the epoch, and its count with it."""
        self._served_passes += 1

    def on_layer(self, moe_layer: int, logical_TK: npt.NDArray[np.int64], num_served: int) -> None:
        self.tokens_LE[moe_layer] += np.bincount(logical_TK.ravel(), minlength=self.tokens_LE.shape[1])
        self.served_L[moe_layer] += num_served

    def take(self) -> CountedLoad:
        """Since the last call."""
        tokens = tuple(tuple(row) for row in self.tokens_LE.tolist())
        counted = CountedLoad(tokens, tuple(self.served_L.tolist()), self._served_passes)
        self.tokens_LE[:] = 0
        self.on_epoch()
        return counted
