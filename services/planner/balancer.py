"""When to plan, what to wish for, and how far it has come. Pure; `services.planner.service` does the I/O.

    watching --a step_interval of passes has gone by--> asking (the plan is made elsewhere)
    asking --not worth it, late, or the view has changed--> watching
    asking --worth it--> moving: wishes for the next step until it is in force, and so on to the target --> watching
    moving --another placement, other members, or nothing happens--> watching

The wish is repeated, since messages are lost and the monitor may be busy; it says which placement it starts from, so an
old one changes nothing. After a restart all of this begins anew from the view and from the next loads.

Shapes: L mixture-of-experts layers, E logical experts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import ClusterConfig
from common.ids import ProcessId
from common.messages import ExpertLoad, PlacementPlan, View
from common.placement import PhysicalToLogical, num_staging_experts
from common.placement_steps import next_step
from common.replica_choice import balancedness
from common.view import ranks
from services.planner.cluster_shape import Budget, FloatArray
from services.planner.load_window import LoadWindow
from services.planner.plan import Answer, Question
from services.planner.rebalance_trigger import Prospect, RebalanceTrigger, TriggerSettings, Verdict

# A wish that the monitor neither carries out nor keeps: somebody else is busy, and the next window will tell.
_GIVE_UP_S = 5.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a plan has to know of the model. ``expert_bytes``: of one expert's weights."""

    num_layers: int
    num_logical_experts: int
    num_groups: int
    expert_bytes: int


@dataclass(slots=True)
class _Target:
    placement: PhysicalToLogical
    balancedness: float
    step: PlacementPlan
    wished_at: float


class Balancer:
    def __init__(self, process: ProcessId, config: ClusterConfig, shape: ModelShape) -> None:
        self._process, self._config, self._shape = process, config, shape
        planner = config.planner
        self._window = LoadWindow(shape.num_layers, shape.num_logical_experts, planner.window_size)
        self._trigger = RebalanceTrigger(
            TriggerSettings(
                step_interval=planner.step_interval,
                least_gain=planner.least_gain,
                drift=planner.drift,
                bandwidth_bytes_per_s=planner.bandwidth_bytes_per_s,
            )
        )
        self._bucket_LE = self._no_load()
        self._bucket_passes: dict[int, int] = {}
        self._bucket_s: dict[int, float] = {}
        self._pass_s = 0.0
        self._target: _Target | None = None
        self._is_asking = False
        self._last_told: tuple[object, ...] = ()
        self.view: View | None = None
        self.num_reports = self.num_plans = self.num_late = self.num_steps = 0
        self.last_verdict: Verdict | None = None

    def _no_load(self) -> FloatArray:
        return np.zeros((self._shape.num_layers, self._shape.num_logical_experts))

    def on_view(self, view: View, now: float) -> None:
        if self.view is not None and view.epoch <= self.view.epoch:
            return
        self.view = view
        target = self._target
        if target is None or view.placement.version == target.step.base_version:
            return  # other members, same placement: the monitor says whether the wish still fits
        if view.placement.physical_to_logical == target.step.physical_to_logical:
            self.num_steps += 1
            self._step_towards(target.placement, target.balancedness, now)
            if self._target is None:
                self._trigger.on_carried_out(target.balancedness)
        else:
            self._target = None

    def on_load(self, report: ExpertLoad) -> None:
        """Of one rank, about once a second; ranks make their passes together."""
        shape = self._bucket_LE.shape
        if len(report.tokens) != shape[0] or any(len(row) != shape[1] for row in report.tokens):
            return
        self.num_reports += 1
        self._bucket_LE += np.array(report.tokens, dtype=np.float64)
        rank, passes, seconds = report.rank, self._bucket_passes, self._bucket_s
        passes[rank] = passes.get(rank, 0) + report.num_passes
        seconds[rank] = seconds.get(rank, 0.0) + report.compute_s

    def on_tick(self, now: float) -> Question | None:
        """About once a second: what came since goes into the window. Returns a plan to be made, or None."""
        num_passes = max(self._bucket_passes.values(), default=0)
        if self._window.on_load(self._bucket_LE, num_passes) and self._bucket_LE.any():
            self._pass_s = max(self._bucket_s.values()) / num_passes
        self._bucket_LE, self._bucket_passes, self._bucket_s = self._no_load(), {}, {}
        target = self._target
        if target is not None and now - target.wished_at > _GIVE_UP_S + self._config.planner.stage_timeout_s:
            self._target = target = None
        planner, view = self._config.planner, self.view
        if target is not None or self._is_asking or view is None or not view.members:
            return None
        if not self._trigger.is_due(self._window.num_passes):
            return None
        self._is_asking = True
        budget = Budget(planner.max_moves, planner.max_moves_per_layer)
        groups = self._shape.num_groups
        return Question(view, self._window.load(), groups, planner.policy, budget, planner.replica_policy)

    def on_answer(self, answer: Answer | None, now: float) -> Verdict | None:
        """None: it was not there in time."""
        self._is_asking = False
        if answer is None:
            self.num_late += 1
            return None
        self.num_plans += 1
        num_passes = min(self._window.num_passes, self._config.planner.window_size)
        prospect = Prospect(
            num_passes=self._window.num_passes,
            num_tokens=float(self._window.load().sum()),
            balancedness_now=answer.balancedness_now,
            balancedness_planned=answer.balancedness_planned,
            bytes_to_move=answer.num_moves * self._shape.expert_bytes,
            moe_s=self._pass_s * num_passes,
        )
        verdict = self.last_verdict = self._trigger.on_prospect(prospect)
        if verdict is Verdict.REBALANCE and self.view and self.view.placement.version == answer.base_version:
            self._step_towards(answer.physical_to_logical, answer.balancedness_planned, now)
        return verdict

    @property
    def wish(self) -> PlacementPlan | None:
        """To be sent to the monitor, again and again."""
        return self._target.step if self._target else None

    def assess(self) -> dict[str, Any] | None:
        """Balancedness of the placement in force as an event, when it or the placement has changed."""
        view, load_LE = self.view, self._window.load()
        if view is None or not view.members or not load_LE.any():
            return None
        version = view.placement.version
        rows, policy = view.placement.physical_to_logical, self._config.planner.replica_policy
        figure = round(balancedness(load_LE, rows, ranks(view), policy), 2)
        if (version, figure) == self._last_told:
            return None
        self._last_told = version, figure
        return {"placement_version": version, "balancedness": figure, "window_tokens": round(float(load_LE[0].sum()))}

    def _step_towards(self, placement: PhysicalToLogical, figure: float, now: float) -> None:
        """The next step becomes the wish; without one the target is reached."""
        view = self.view
        assert view is not None
        num_staging = num_staging_experts(self._config.decode, self._shape.num_logical_experts)
        step = next_step(view.placement.physical_to_logical, placement, ranks(view), num_staging)
        self._target = None
        if step is not None:
            plan = PlacementPlan(self._process, view.placement.version, step, figure)
            self._target = _Target(placement, figure, plan, now)
