"""The placement that goes into views: the first one, and its repair when members change."""

from common.config import DecodeConfig
from common.ids import Epoch, Rank
from common.messages import Placement, PlacementPlan, View
from common.placement import EMPTY, PhysicalToLogical, initial_placement, num_local_experts, repair
from common.view import orphans, ranks


class ExpertMap:
    """Sizes of the model, and the planner's wish for the first placement if it has one."""

    def __init__(self, decode: DecodeConfig, num_moe_layers: int, num_logical_experts: int) -> None:
        self._decode, self._num_layers, self.num_logical_experts = decode, num_moe_layers, num_logical_experts
        self._num_local = num_local_experts(decode, num_logical_experts)
        self.plan: PlacementPlan | None = None

    @property
    def min_ranks(self) -> int:
        """Fewer have no room for one copy of each expert."""
        return -(-self.num_logical_experts // self._num_local)

    def on_first_plan(self, plan: PlacementPlan) -> str:
        """Keeps a plan for the formation; otherwise returns why not."""
        members = tuple(Rank(rank) for rank in range(self._decode.num_ranks))
        fault = self._fault_of(plan.physical_to_logical)
        missing = [] if fault else self._orphans(plan.physical_to_logical, members)
        if missing:
            fault = f"no copy of (layer, expert) {missing[0]} on ranks 0..{len(members) - 1}"
        self.plan = self.plan if fault else plan
        return fault

    def fault_of(self, wished: PhysicalToLogical, view: View) -> str:
        """Why the members of ``view`` cannot go over to this placement; empty if they can."""
        if fault := self._fault_of(wished):
            return fault
        lost = set(self._orphans(wished, ranks(view))) - set(
            self._orphans(view.placement.physical_to_logical, ranks(view))
        )
        return f"no copy of (layer, expert) {min(lost)} on any member" if lost else ""

    def _orphans(self, physical_to_logical: PhysicalToLogical, members: tuple[Rank, ...]) -> list[tuple[int, int]]:
        return orphans(Placement(0, physical_to_logical), members, self.num_logical_experts)

    def _fault_of(self, physical_to_logical: PhysicalToLogical) -> str:
        if not self.has_shape_of(physical_to_logical):
            return f"need {self._num_layers} layers of {self._decode.max_ranks} ranks of {self._num_local} expert slots"
        for layer, rows in enumerate(physical_to_logical):
            for rank, row in enumerate(rows):
                held = [expert for expert in row if expert != EMPTY]
                if len(set(held)) != len(held) or not all(0 <= expert < self.num_logical_experts for expert in held):
                    return f"layer {layer} rank {rank} holds {list(row)}"
        return ""

    def has_shape_of(self, physical_to_logical: PhysicalToLogical) -> bool:
        return len(physical_to_logical) == self._num_layers and all(
            len(rows) == self._decode.max_ranks and all(len(row) == self._num_local for row in rows)
            for rows in physical_to_logical
        )

    def first(self, epoch: Epoch) -> Placement:
        if self.plan is not None:
            return Placement(epoch, self.plan.physical_to_logical)
        decode = self._decode
        return Placement(
            epoch,
            initial_placement(
                self._num_layers, self.num_logical_experts, decode.max_ranks, decode.num_ranks, self._num_local
            ),
        )

    def repaired(self, placement: Placement, members: tuple[Rank, ...], epoch: Epoch) -> tuple[Placement, int, int]:
        """The placement for ``members``, the number of experts that move, the number that have no room. Unchanged, it
        keeps its version, and nobody has to load anything."""
        if not members:
            return placement, 0, 0
        result = repair(placement.physical_to_logical, members, self.num_logical_experts)
        if not result.moved:
            return placement, 0, len(result.orphans)
        return Placement(epoch, result.physical_to_logical), len(result.moved), len(result.orphans)
