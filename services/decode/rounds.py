"""One round after another: headers -> forward pass -> read status -> commit; and the rest between rounds without work.

A round is clean or void, and nothing of a void one is kept. What follows from either is for the membership core to say.
"""

from collections.abc import Callable

from common.ids import Epoch, RequestId
from common.pace import Pace
from kernels.reference import ElasticGroup
from services.decode.batch_scheduler import BatchScheduler
from services.decode.delivery import Delivery
from services.decode.membership import Membership
from services.decode.rank_engine import RankEngine
from services.decode.request import Computed, Step
from services.decode.round_header import NEWCOMER_HEADER, RoundHeader, RoundPlan

BARE_ROUND_S = 0.002  # between rounds without tokens while a view is prepared


class Rounds:
    """``idle_poll_s``: from one round to the next while nobody has work. All times are those of ``clock``."""

    def __init__(
        self,
        membership: Membership,
        engine: RankEngine,
        delivery: Delivery,
        scheduler: BatchScheduler[RequestId],
        pace: Pace,
        clock: Callable[[], float],
        idle_poll_s: float,
    ) -> None:
        self._membership, self._engine, self._delivery, self._scheduler = membership, engine, delivery, scheduler
        self._pace, self._clock, self._idle_poll_s = pace, clock, idle_poll_s
        self._announced = Epoch(0)
        self._rest_until = 0.0
        self._woken = False
        self._all_idle = False  # after the last round; the others rest and want to be woken
        self._num_clean = self._num_void = self._num_of_group = self._num_computing = self._own_us = 0
        self._num_passes, self._compute_s = 0, 0.0  # since the last report of loads
        self.num_headers = 0
        self.ended_at = 0.0  # the last one

    @property
    def group(self) -> ElasticGroup:
        assert self._engine.group is not None, "there are rounds only in a slot"
        return self._engine.group

    def on_wake(self, epoch: Epoch) -> None:
        """Another rank got work."""
        self._woken = self._woken or epoch == self._membership.epoch

    def on_announced(self, epoch: Epoch) -> None:
        self._announced = epoch

    def on_adopted(self) -> None:
        self._rest_until = 0.0

    @property
    def _has_work(self) -> bool:
        running = self._scheduler.num_running > 0 and not self._engine.lacks_experts
        return running or (self._all_idle and self._membership.is_staging)

    def rest_s(self, now: float) -> float:
        """How long nothing has to be done; 0 when a round is due."""
        rests = now < self._rest_until and not self._has_work and not self._woken and not self.group.headers_waiting()
        return self._rest_until - now if rests else 0.0

    def others_rest(self) -> bool:
        """Whether a round is due here of which the others do not know."""
        return self._all_idle and self._has_work

    def make(self, must_stop: Callable[[], bool]) -> RoundPlan | None:
        """One round, its outputs committed; None when it was void. ``must_stop`` ends the wait for headers."""
        self._woken = self._all_idle = False
        self._pace.resume()
        header, steps = self._header_and_steps()
        self._pace.pause()
        plan, outputs = self._exchange(header, steps, must_stop)
        self.ended_at = self._clock()
        if plan is None or outputs is None:
            self._num_void += 1
            self._pace.take()
            return None
        self._num_clean += 1
        self._commit(steps, outputs)
        if plan.num_tokens == 0:
            self._all_idle = plan.all_idle
            self._rest_until = self.ended_at + (self._idle_poll_s if plan.all_idle else BARE_ROUND_S)
        return plan

    def _exchange(
        self, header: RoundHeader, steps: list[Step], must_stop: Callable[[], bool]
    ) -> tuple[RoundPlan | None, list[Computed] | None]:
        """What follows from all headers, None when they did not come, and what was computed. Who has tokens himself
        knows that there is work, and does not wait for headers before his first tokens have to go to others."""
        outputs: list[Computed] | None = None
        if steps:
            self._engine.send_header(header, must_stop)
            outputs = self._compute(steps)
            headers = self._engine.headers
        else:
            headers = self._engine.exchange_headers(header, must_stop)
        if headers is None:
            return None, None
        plan = RoundPlan.of(headers)
        self.num_headers += 1
        self._num_of_group = plan.num_rounds
        if not steps:
            outputs = self._compute(steps) if plan.num_tokens else []
        return plan, outputs

    def _compute(self, steps: list[Step]) -> list[Computed] | None:
        self._pace.resume()
        begun = self._clock()
        outputs = self._engine.compute(steps)
        self._num_passes += 1
        self._compute_s += self._clock() - begun
        return outputs

    def _header_and_steps(self) -> tuple[RoundHeader, list[Step]]:
        membership = self._membership
        if self._announced == membership.epoch:
            self._announced = Epoch(0)
            return NEWCOMER_HEADER, []  # says the same as what was announced
        steps = [] if self._engine.lacks_experts else self._delivery.steps()
        idle, num_tokens = not steps and not membership.is_staging, sum(len(step.token_ids) for step in steps)
        return RoundHeader(num_tokens, idle, membership.staged_epoch, num_rounds=self._num_of_group), steps

    def _commit(self, steps: list[Step], outputs: list[Computed]) -> None:
        delivery = self._delivery
        for step, computed in zip(steps, outputs, strict=True):
            if computed.choice is None:
                delivery.advance(step, computed.prompt_logprobs, computed.missed_experts)
            else:
                token, logprob, top = computed.choice
                prompt_logprobs, missed = computed.prompt_logprobs, computed.missed_experts
                delivery.commit(step, token, logprob, self.ended_at, top, prompt_logprobs, missed)

    def take_pace(self, computed: bool) -> tuple[float, float]:
        """(own_s, work_s) of the round, its tokens sent.

        Only of clean rounds: in a void one this rank may have stopped anywhere.
        """
        self._pace.pause()
        own_s, work_s = self._pace.take()
        if computed:
            self._num_computing += 1
            self._own_us += round(1e6 * own_s)
        return own_s, work_s

    def take_passes(self) -> tuple[int, float]:
        """Forward passes and their seconds since the last call."""
        taken = self._num_passes, self._compute_s
        self._num_passes, self._compute_s = 0, 0.0
        return taken

    def accused(self) -> tuple[int, ...]:
        """Who missed an own deadline. The wait for headers has none: there it is who was missing when a roll call, or
        the poison of one who has a deadline, ended it. Otherwise a path that is broken between rounds would never be
        told of, and the rank that is ahead of both its ends would be the only one to miss anybody."""
        group = self._engine.group
        if group is None:
            return ()
        return group.unheard or tuple(group.observation_mask().nonzero().flatten().tolist())

    def counters(self) -> dict[str, int]:
        """From any thread."""
        return {
            "rounds": self._num_clean,
            "group_rounds": self._num_of_group,
            "compute_rounds": self._num_computing,
            "own_us": self._own_us,
            "void_rounds": self._num_void,
        }
