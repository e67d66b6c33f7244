"""The requests of a decode rank, from their announcement to their release. Pure; PROTOCOL section 6.

    announce --> ANNOUNCED --all KV--> HELD --blocks--> RUNNING --stop or length--> FINISHED --release--> gone
        |                               ^
        '------ computes_prompt --------'    any of them --abort, higher attempt--> gone (a tombstone stays)

A request that comes without KV computes its prompt while it is RUNNING, a part of it in each round. One that runs when
KV blocks run out may be refused (preempted): see `batch_scheduler`.

Invariants: at most one attempt of a request lives; outputs only grow; what was sent once is what is sent again; KV is
taken only for an announced attempt of this incarnation. Everything that is kept has a bound in number and in time.
"""

from common.ids import NO_RANK, Epoch, Incarnation, ProcessId, Rank, RequestId
from common.messages import (
    Abort,
    Announce,
    Directory,
    Have,
    KvHandoff,
    KvPart,
    Message,
    Refused,
    Release,
    TokenBatch,
    TopLogprobs,
    Unknown,
)
from common.router_watch import RouterWatch
from common.sampling_bounds import sampling_fault
from services.decode.actions import Send
from services.decode.batch_scheduler import BatchScheduler, Room
from services.decode.early_kv import EarlyKv, Frames
from services.decode.kv_pieces import KvPiece, KvPieces
from services.decode.news import News
from services.decode.request import Admission, PromptLogprobs, Request, RequestLimits, Stage, Step
from services.decode.tombstones import Tombstones

MAX_REQUESTS = 4096
REPEAT_S = 0.5
FINISHED_KEPT_S = 120.0
ANNOUNCED_KEPT_S = 600.0
INCOMPLETE_KEPT_S = 1.0  # KV whose end has come; the pieces before it are lost, then


class Delivery:
    """``handoff_bytes`` bounds the KV that has come for requests without blocks; a single request may have more.
    ``prompt_tokens`` bounds the rows of prompts in one round, so that those who decode keep their pace. ``interval_s``:
    tokens leave for a router at most so often (`News`)."""

    def __init__(
        self,
        scheduler: BatchScheduler[RequestId],
        limits: RequestLimits,
        handoff_bytes: int = 1 << 30,
        prompt_tokens: int = 32,
        kv_reserve_tokens: int = 64,
        router_lost_s: float = 10.0,
        interval_s: float = 0.0,
    ) -> None:
        self._scheduler, self._limits = scheduler, limits
        self._handoff_bytes, self._prompt_tokens = handoff_bytes, prompt_tokens
        self._kv_reserve_tokens = kv_reserve_tokens
        self._rank, self._incarnation = NO_RANK, Incarnation(0)
        self._requests: dict[RequestId, Request] = {}
        self._early_kv = EarlyKv()
        self._tombstones = Tombstones()
        self._routers = RouterWatch(router_lost_s)
        self._news = News(interval_s)
        self._repeat_at = 0.0
        self.num_committed = 0
        self.num_stale = 0
        self.num_preempted = 0
        self.num_prompt_tokens = 0  # computed here, since no prefill worker was left

    def open(self, rank: Rank, incarnation: Incarnation) -> None:
        """A new slot: nothing of the last one counts any more."""
        self._scheduler.clear()
        self._requests.clear()
        self._early_kv.clear()
        self._tombstones.clear()
        self._news.clear()
        self._rank, self._incarnation = rank, incarnation

    def on_message(self, peer: ProcessId, message: Message, frames: Frames, now: float) -> list[Send]:
        """Any message of a router or a prefill worker, and the directory; others are none of this class's business."""
        self._routers.on_word(peer)
        match message:
            case Directory():
                self._routers.on_directory(message)
            case Announce():
                return self.on_announce(message, now)
            case KvPart() | KvHandoff():
                return self.on_kv(message, frames, now)
            case Have():
                return self.on_have(message, peer)
            case Abort(request=request, attempt=attempt) | Release(request=request, attempt=attempt):
                self.on_end(request, attempt)
            case _:
                pass
        return []

    def on_announce(self, announce: Announce, now: float) -> list[Send]:
        request, attempt = announce.request, announce.attempt
        if announce.incarnation != self._incarnation or self._rank == NO_RANK:
            self.num_stale += 1
            return [_refused(announce, f"incarnation {announce.incarnation} is not here")]
        known = self._requests.get(request)
        if self._tombstones.covers(request, attempt) or (known and known.announce.attempt >= attempt):
            self.num_stale += 1
            return []
        if known:
            self._drop(request)
        if reason := self._reason_to_refuse(announce):
            self._tombstones.bury(request, attempt)
            return [_refused(announce, reason)]
        max_outputs = min(announce.sampling.max_tokens, self._limits.max_positions - len(announce.prompt))
        limits, num_tokens = self._limits, len(announce.prompt) + len(announce.outputs)
        kv = KvPieces(limits.num_kv_layers, num_tokens, limits.kv_bytes_per_token)
        known = self._requests[request] = Request(announce, max_outputs, now, list(announce.outputs), kv)
        if announce.computes_prompt:
            return self._queue(known)
        return [send for early in self._early_kv.take(request, attempt) for send in self.on_kv(*early, now)]

    def on_kv(self, handoff: KvPart | KvHandoff, frames: Frames, now: float) -> list[Send]:
        """A piece of KV, or its end."""
        known = self._requests.get(handoff.request)
        if (handoff.rank, handoff.incarnation) != (self._rank, self._incarnation):
            self.num_stale += 1
            return []
        if known is None or known.announce.attempt < handoff.attempt:
            if self._tombstones.covers(handoff.request, handoff.attempt):
                self.num_stale += 1
            else:
                self._early_kv.keep(handoff, frames, now)
            return []
        if known.announce.attempt > handoff.attempt or known.stage is not Stage.ANNOUNCED:
            self.num_stale += 1
            return []
        if reason := self._take_kv(known, handoff, frames, now):
            return self._refuse(known, reason)
        if known.handoff is None or not known.kv.is_complete:
            return []
        return self._hold(known, known.handoff, now)

    def _take_kv(self, known: Request, message: KvPart | KvHandoff, frames: Frames, now: float) -> str:
        """The text says what is wrong with it, "" = nothing."""
        if isinstance(message, KvHandoff):
            num_tokens = known.num_context_tokens
            if message.num_tokens != num_tokens or (frames and not known.kv.add_whole(frames[0])):
                return f"KV of {message.num_tokens} tokens came, {num_tokens} were announced"
            if not 0 <= message.first_token < self._limits.vocab_size:
                return f"first token {message.first_token} is not in the vocabulary"
            known.handoff, known.since = message, now
        elif len(frames) != 1 or not known.kv.add(
            KvPiece(message.first_layer, message.num_layers, message.start, message.num_tokens, frames[0])
        ):
            return "a piece of KV came that does not fit what was announced"
        num_bytes = sum(other.kv.num_bytes for other in self._requests.values())
        if num_bytes > self._handoff_bytes and num_bytes > known.kv.num_bytes:
            return f"{num_bytes} bytes of KV wait for blocks already"
        return ""

    def _hold(self, known: Request, handoff: KvHandoff, now: float) -> list[Send]:
        known.num_computed = known.num_context_tokens
        known.prompt_logprobs = handoff.prompt_logprobs
        self._append(known, handoff.first_token, handoff.first_logprob, handoff.first_top, now)
        if not known.finish and (refusal := self._queue(known)):
            return refusal
        self._news.add(known, len(known.ids) - 1, at_once=True)
        return []

    def _queue(self, known: Request) -> list[Send]:
        known.stage = Stage.HELD
        room = Room(
            known.num_known_tokens + self._kv_reserve_tokens,
            len(known.announce.prompt) + known.max_outputs - 1,
            known.announce.reserves_all,
        )
        reason = self._scheduler.submit(known.announce.request, room)
        return self._refuse(known, reason) if reason else []

    def on_have(self, have: Have, peer: ProcessId) -> list[Send]:
        known = self._requests.get(have.request)
        if known is None or known.announce.attempt != have.attempt:
            return [Send(peer, Unknown(have.request, have.attempt))]
        if not len(known.announce.outputs) <= have.num_outputs <= len(known.ids):
            return [Send(peer, Unknown(have.request, have.attempt))]
        self._news.add(known, have.num_outputs, at_once=True)
        return []

    def on_end(self, request: RequestId, attempt: int) -> None:
        """Abort or Release: this and all earlier attempts are over."""
        self._tombstones.bury(request, attempt)
        self._early_kv.take(request, attempt)
        known = self._requests.get(request)
        if known and known.announce.attempt <= attempt:
            self._drop(request)

    def on_tick(self, now: float) -> list[Send]:
        self._early_kv.on_tick(now)
        if now < self._repeat_at:
            return []
        self._repeat_at = now + REPEAT_S / 5
        sends: list[Send] = []
        lost = self._routers.lost({known.announce.router for known in self._requests.values()}, now)
        for request, known in list(self._requests.items()):
            if known.announce.router in lost:
                self.on_end(request, known.announce.attempt)
                continue
            if known.stage is Stage.ANNOUNCED and known.handoff and now - known.since > INCOMPLETE_KEPT_S:
                sends += self._refuse(known, "some of the KV was lost on the way")
                continue
            if known.stage is Stage.FINISHED and now >= known.repeat_at:
                known.repeat_at = now + REPEAT_S
                self._news.add(known, len(known.ids) - 1, at_once=True)
            kept_s = {Stage.FINISHED: FINISHED_KEPT_S, Stage.ANNOUNCED: ANNOUNCED_KEPT_S}.get(known.stage)
            if kept_s is not None and now - known.since > kept_s:
                self._drop(request)
        return sends

    def make_room(self) -> list[Send]:
        """Before each round: blocks for what it computes. When there are none, the youngest make room for the older; a
        router has their tokens, and places them again."""
        sends: list[Send] = []
        for request, _ in list(self._scheduler.batch()):
            while known := self._requests.get(request):
                if self._scheduler.grow(request, known.num_known_tokens):
                    break
                victim = self._requests[self._scheduler.victim()]
                self.num_preempted += 1
                sends += self._refuse(victim, "preempted: no KV blocks are left for it", preempted=True)
        return sends

    def admit(self) -> list[Admission]:
        """Requests that run from the next round on. Their KV must be written before it."""
        admissions = []
        for request, table in self._scheduler.admit():
            known = self._requests[request]
            admissions.append(Admission(request, known.kv.pieces, table))
            known.stage = Stage.RUNNING
            known.kv.clear()
        return admissions

    def steps(self) -> list[Step]:
        """What the next round computes: a token for each request that decodes, and parts of the prompts, each its fair
        share of ``prompt_tokens``; what the shortest do not use is for the others."""
        running = [(self._requests[request], table) for request, table in self._scheduler.batch()]
        steps = [known.step(table, most=1) for known, table in running if known.num_left == 1]
        if len(steps) == len(running):
            return steps
        prompts = sorted((item for item in running if item[0].num_left > 1), key=lambda item: item[0].num_left)
        budget = self._prompt_tokens
        for number, (known, table) in enumerate(prompts):
            if share := budget // (len(prompts) - number):
                steps.append(known.step(table, share))
                budget -= len(steps[-1].token_ids)
        return steps

    def commit(
        self,
        step: Step,
        token: int,
        logprob: float,
        now: float,
        top: TopLogprobs = (),
        prompt_logprobs: PromptLogprobs = (),
        missed_experts: bool = False,
    ) -> None:
        """A clean round's token of one request. KV of the round is written already."""
        known = self._requests[step.request]
        assert step.samples and step.output_index == len(known.ids), "a token out of order"
        self.advance(step, prompt_logprobs, missed_experts)
        self._append(known, token, logprob, top, now)
        is_first = step.output_index == len(known.announce.outputs)
        self._news.add(known, step.output_index, at_once=is_first or bool(known.finish))
        if known.finish:
            self._scheduler.remove(step.request)

    def advance(self, step: Step, prompt_logprobs: PromptLogprobs = (), missed_experts: bool = False) -> None:
        """The step's KV is written; of a step that does not sample that is all."""
        known = self._requests[step.request]
        assert known.stage is Stage.RUNNING and step.position == known.num_computed, "positions out of order"
        self.num_prompt_tokens += max(0, min(step.stop, known.num_context_tokens) - step.position)
        known.num_computed = step.stop
        known.prompt_logprobs += prompt_logprobs
        known.missed_experts |= missed_experts

    @property
    def due_at(self) -> float:
        """When `flush` has something to say, if nothing happens before."""
        return self._news.due_at

    def hurry(self) -> None:
        """All that routers have not been told is due."""
        self._news.hurry_all()

    def flush(self, epoch: Epoch, now: float) -> list[Send]:
        """What is due, one message for each router."""
        num_requests = self._scheduler.num_running + self._scheduler.num_waiting
        num_free = self._scheduler.blocks.num_free
        slot = self._rank, self._incarnation
        return [
            Send(router, TokenBatch(*slot, epoch, items, num_requests, num_free))
            for router, items in self._news.take(now)
        ]

    def check_invariants(self) -> None:
        self._scheduler.check_invariants()
        stages = [known.stage for known in self._requests.values()]
        assert stages.count(Stage.RUNNING) == self._scheduler.num_running
        assert stages.count(Stage.HELD) == self._scheduler.num_waiting
        assert len(self._requests) <= MAX_REQUESTS
        for known in self._requests.values():
            known.check_invariants()

    def _append(self, known: Request, token: int, logprob: float, top: TopLogprobs, now: float) -> None:
        known.append(token, logprob, top)
        self.num_committed += 1
        if known.finish:
            known.stage = Stage.FINISHED
            known.kv.clear()
            known.since, known.repeat_at = now, now + REPEAT_S

    def _reason_to_refuse(self, announce: Announce) -> str:
        tokens = announce.prompt + announce.outputs
        if len(self._requests) >= MAX_REQUESTS:
            return f"{MAX_REQUESTS} requests are here already"
        if not announce.prompt or not 0 <= min(tokens) <= max(tokens) < self._limits.vocab_size:
            return f"prompt is empty or has ids outside 0..{self._limits.vocab_size - 1}"
        if len(announce.prompt) >= self._limits.max_positions:
            return f"prompt of {len(announce.prompt)} tokens, the model has {self._limits.max_positions} positions"
        if len(announce.outputs) >= min(
            announce.sampling.max_tokens, self._limits.max_positions - len(announce.prompt)
        ):
            return "no token is left to compute"
        return sampling_fault(announce.sampling, self._limits.vocab_size)

    def _refuse(self, known: Request, reason: str, preempted: bool = False) -> list[Send]:
        self._tombstones.bury(known.announce.request, known.announce.attempt)
        self._drop(known.announce.request, forget=not preempted)
        if preempted:
            self._news.hurry(known)  # what it has counts where it goes on
        return [_refused(known.announce, reason, preempted)]

    def _drop(self, request: RequestId, forget: bool = True) -> None:
        self._scheduler.remove(request)
        known = self._requests.pop(request)
        if forget:
            self._news.forget(known)


def _refused(announce: Announce, reason: str, preempted: bool = False) -> Send:
    message: Message = Refused(announce.request, announce.attempt, reason, preempted)
    return Send(announce.router, message)
