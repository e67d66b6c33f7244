"""What the planner wishes for, and what it says of the placement in force. Pure."""

import numpy as np
import numpy.typing as npt

from common.config import DecodeConfig
from common.ids import ProcessId
from common.messages import PlacementPlan, View
from common.placement import balancedness, initial_placement, num_local_experts
from common.view import ranks

# Smaller changes of the figure are noise of the window.
_WORTH_TELLING = 0.01


def first_plan(process: ProcessId, decode: DecodeConfig, num_layers: int, num_logical_experts: int) -> PlacementPlan:
    """For the formation of the group, when no loads are known yet. Raises ValueError when there is no room."""
    num_local = num_local_experts(decode, num_logical_experts)
    placement = initial_placement(num_layers, num_logical_experts, decode.max_ranks, decode.num_ranks, num_local)
    return PlacementPlan(process, base_version=0, physical_to_logical=placement)


class Assessor:
    """Balancedness of the placement in force, told when it or the placement has changed."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None

    def on_tick(self, view: View, load_LE: npt.NDArray[np.float64]) -> dict[str, object] | None:
        """An event for the bus, or None. No load, no figure."""
        if not load_LE.any():
            return None
        version = view.placement.version
        figure = round(balancedness(load_LE, view.placement.physical_to_logical, ranks(view)), 4)
        if self._last and self._last[0] == version and abs(self._last[1] - figure) < _WORTH_TELLING:
            return None
        self._last = version, figure
        return {"placement_version": version, "balancedness": figure, "window_tokens": round(float(load_LE[0].sum()))}
