"""What the planner hears and wishes."""

from common.ids import Epoch, Incarnation, ProcessId, Rank
from common.messages.tagged import TaggedStruct


class ExpertLoad(TaggedStruct, frozen=True):
    """decode -> bus, about once a second: tokens routed since the last one, [num_moe_layers][num_logical_experts]."""

    rank: Rank
    incarnation: Incarnation
    placement_version: int
    tokens: tuple[tuple[int, ...], ...]
    num_passes: int = 0  # forward passes in which they were routed
    compute_s: float = 0.0  # time that these passes took
    epoch: Epoch = Epoch(0)  # that the following was counted in
    served: tuple[int, ...] = ()  # by layer: (token, expert) entries that this rank computed, of all ranks' tokens
    served_passes: int = 0  # forward passes that these came in


class PlacementPlan(TaggedStruct, frozen=True):
    """planner -> monitor: a wish; the monitor numbers it and decides."""

    process: ProcessId
    base_version: int  # placement that it starts from; 0 = at formation
    physical_to_logical: tuple[tuple[tuple[int, ...], ...], ...]
    balancedness: float = 0.0
