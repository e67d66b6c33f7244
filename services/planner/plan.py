"""One plan: everything that it depends on, and what comes out. Pure, and slow for large models: off the event loop.

Shapes: L mixture-of-experts layers, E logical experts.
"""

from dataclasses import dataclass

import numpy as np

from common.config import DecodeConfig, ReplicaPolicy
from common.ids import ProcessId
from common.messages import PlacementPlan, View
from common.placement import PhysicalToLogical, initial_placement, num_local_experts
from common.placement_file import Loads, PlacementFile
from common.placement_steps import moves_to
from common.replica_choice import balancedness
from common.view import ranks
from services.planner.cluster_shape import Budget, ClusterShape, FloatArray
from services.planner.placement_array import to_tuples
from services.planner.policies import policy_named


@dataclass(frozen=True, slots=True)
class Question:
    """``load_LE``: tokens of the window. ``num_groups``: groups of experts that a token chooses among first.
    ``replica_policy``: how tokens find their copies, which decides what the ranks bear under a placement."""

    view: View
    load_LE: FloatArray
    num_groups: int
    policy: str
    budget: Budget
    replica_policy: ReplicaPolicy


@dataclass(frozen=True, slots=True)
class Answer:
    """The balancedness on the window's load, as it is and as it would be; ``num_moves`` experts would be loaded."""

    base_version: int
    physical_to_logical: PhysicalToLogical
    balancedness_now: float
    balancedness_planned: float
    num_moves: int


def answer(question: Question) -> Answer:
    """The plan of the policy for the members of the view, from the placement in force. Vacant slots stay."""
    view, load_LE = question.view, question.load_LE
    present, members = view.placement.physical_to_logical, ranks(view)
    current_LRS = np.array(present, dtype=np.int64)
    _, num_ranks, num_local = current_LRS.shape
    hosts = {host: number for number, host in enumerate(sorted({member.host for member in view.members}))}
    host_of: dict[int, int] = {member.rank: hosts[member.host] for member in view.members}
    shape = ClusterShape(
        tuple(num_local if rank in host_of else 0 for rank in range(num_ranks)),
        tuple(host_of.get(rank, 0) for rank in range(num_ranks)),
        question.num_groups,
    )
    plan = policy_named(question.policy)(load_LE, shape, current_LRS, question.budget)
    planned = tuple(tuple(tuple(row) for row in rows) for rows in plan.placement_LRS.tolist())
    return Answer(
        view.placement.version,
        planned,
        balancedness(load_LE, present, members, question.replica_policy),
        balancedness(load_LE, planned, members, question.replica_policy),
        len(moves_to(present, planned, members)),
    )


def first_plan(
    process: ProcessId,
    decode: DecodeConfig,
    num_layers: int,
    num_logical_experts: int,
    recorded: PlacementFile | None = None,
) -> PlacementPlan:
    """For the formation of the group: a recorded placement, one for recorded loads, or one that knows no loads.

    Raises ValueError when there is no room, or the record is of another model or another size of group.
    """
    num_local = num_local_experts(decode, num_logical_experts)
    placement = initial_placement(num_layers, num_logical_experts, decode.max_ranks, decode.num_ranks, num_local)
    if recorded is not None and recorded.physical_to_logical is not None:
        wanted = num_layers, decode.max_ranks, num_local
        if np.array(recorded.physical_to_logical, dtype=object).shape != wanted:
            raise ValueError(f"the recorded placement is not of {wanted} layers, ranks and slots")
        placement = recorded.physical_to_logical
    elif recorded is not None and recorded.loads is not None:
        placement = _for_loads(recorded.loads, placement, decode.num_ranks, num_logical_experts)
    return PlacementPlan(process, base_version=0, physical_to_logical=placement)


def _for_loads(
    loads: Loads, placement: PhysicalToLogical, num_ranks: int, num_logical_experts: int
) -> PhysicalToLogical:
    if len(loads) != len(placement) or any(len(layer) != num_logical_experts for layer in loads):
        raise ValueError(f"the recorded loads are not of {len(placement)} layers of {num_logical_experts} experts")
    shape = ClusterShape((len(placement[0][0]),) * num_ranks)
    plan = policy_named("balanced")(np.array(loads), shape, None, Budget())
    planned = to_tuples(plan.placement_LRS, shape)
    return tuple((*chosen, *rows[num_ranks:]) for chosen, rows in zip(planned, placement, strict=True))
