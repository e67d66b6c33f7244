"""How evenly the experts of the current placement load its ranks, from what the ranks publish on topic ``load``."""

import numpy as np
import numpy.typing as npt

from common.messages import ExpertLoad, View
from common.placement import balancedness
from common.view import ranks

# Half of the weight lies on what came within this time.
_HALF_LIFE_S = 30.0


class LoadWindow:
    """load_LE: tokens routed to expert E in mixture-of-experts layer L, older ones fading."""

    def __init__(self, num_moe_layers: int, num_logical_experts: int) -> None:
        self._load_LE: npt.NDArray[np.float64] = np.zeros((num_moe_layers, num_logical_experts))
        self._faded_at = 0.0

    def on_load(self, load: ExpertLoad, now: float) -> None:
        """Loads of another shape are of another model, or nonsense, and dropped."""
        num_layers, num_experts = self._load_LE.shape
        if len(load.tokens) != num_layers or any(len(row) != num_experts for row in load.tokens):
            return
        self._load_LE *= 0.5 ** ((now - self._faded_at) / _HALF_LIFE_S)
        self._faded_at = now
        self._load_LE += np.asarray(load.tokens, dtype=np.float64)

    def balancedness(self, view: View) -> float:
        return balancedness(self._load_LE, view.placement.physical_to_logical, ranks(view))

    def balancedness_by_layer(self, view: View) -> list[float]:
        return [
            balancedness(load_E[None], (rows,), ranks(view))
            for load_E, rows in zip(self._load_LE, view.placement.physical_to_logical, strict=True)
        ]
