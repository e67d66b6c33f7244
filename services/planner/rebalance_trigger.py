"""When a rebalance is worth its transfers. Pure.

Asked every `step_interval` forward passes. It says yes when the present balancedness has fallen below what the last
plan reached by more than `drift`, or could be bettered by more than `least_gain`; when the time that the plan is
predicted to save, over as long as the loads have been like this, exceeds what its transfers take `payback` times; and
when the same was so at the last question too, so that one odd window moves nothing. No traffic, no plan.

Names of settings that vLLM has too are vLLM's.
"""

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    REBALANCE = "rebalance"
    TOO_EARLY = "too early"
    IDLE = "idle"
    EVEN_ENOUGH = "even enough"
    NOT_WORTH_ITS_BYTES = "not worth its bytes"
    WAITING_FOR_A_SECOND_WINDOW = "waiting for a second window"


@dataclass(frozen=True, slots=True)
class TriggerSettings:
    """``step_interval`` in forward passes; ``bandwidth_bytes_per_s`` that transfers may take."""

    step_interval: int = 3000
    least_gain: float = 0.05
    drift: float = 0.05
    payback: float = 1.0
    bandwidth_bytes_per_s: float = 1e9
    confirmations: int = 2

    def __post_init__(self) -> None:
        if self.step_interval < 1 or self.confirmations < 1 or self.bandwidth_bytes_per_s <= 0:
            raise ValueError("step_interval, confirmations and bandwidth_bytes_per_s must be positive")


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a plan would do, on the window's load. ``moe_s``: seconds of the window spent in experts."""

    num_passes: int
    num_tokens: float
    balancedness_now: float
    balancedness_planned: float
    bytes_to_move: int
    moe_s: float


class RebalanceTrigger:
    def __init__(self, settings: TriggerSettings) -> None:
        self._settings = settings
        self._asked_at = 0
        self._reached: float | None = None
        self._num_in_favour = 0

    def is_due(self, num_passes: int) -> bool:
        """Whether a question would be answered; spares the making of a plan."""
        return num_passes - self._asked_at >= self._settings.step_interval

    def on_prospect(self, prospect: Prospect) -> Verdict:
        settings = self._settings
        if not self.is_due(prospect.num_passes):
            return Verdict.TOO_EARLY
        self._asked_at = prospect.num_passes
        verdict = self._judged(prospect)
        self._num_in_favour = self._num_in_favour + 1 if verdict is Verdict.REBALANCE else 0
        if 0 < self._num_in_favour < settings.confirmations:
            return Verdict.WAITING_FOR_A_SECOND_WINDOW
        return verdict

    def on_carried_out(self, balancedness: float) -> None:
        """A plan is in force, with this balancedness on the load that it was made for."""
        self._reached = balancedness
        self._num_in_favour = 0

    def _judged(self, prospect: Prospect) -> Verdict:
        settings, now, planned = self._settings, prospect.balancedness_now, prospect.balancedness_planned
        if prospect.num_tokens <= 0:
            return Verdict.IDLE
        has_drifted = self._reached is not None and self._reached - now > settings.drift and planned > now
        if not has_drifted and planned - now <= settings.least_gain:
            return Verdict.EVEN_ENOUGH
        # A round takes as long as its heaviest rank: time goes as 1 / balancedness.
        saved_s = prospect.moe_s * max(0.0, 1.0 - now / planned)
        spent_s = prospect.bytes_to_move / settings.bandwidth_bytes_per_s
        return Verdict.REBALANCE if saved_s > settings.payback * spent_s else Verdict.NOT_WORTH_ITS_BYTES
